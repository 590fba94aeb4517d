"""How many events a user has, and when: sessions on evenings, within a stay of days or years.

Shape legend: U users, T events of the longest history.
"""

from __future__ import annotations

import numpy as np

from fusionrec.data.histories import IntArray

DAY = 86_400
START = 1_609_459_200
"""2021-01-01 00:00 UTC: nobody acts before."""
END = START + 3 * 365 * DAY
"""Nobody acts later than the night after."""


def draw_lengths(
    num_users: int, num_items: int, median: float, rng: np.random.Generator
) -> IntArray:
    """[U] numbers of events: log-normal, at least 3."""
    lengths = np.round(rng.lognormal(np.log(median), 0.85, num_users))
    return np.clip(lengths, 3, min(250, num_items // 5)).astype(np.int64)


def draw_times(lengths: IntArray, rng: np.random.Generator) -> IntArray:
    """[U, T] when the events happen, ascending and distinct; padded with the last one's time.

    A user comes at some time, stays for a while, and acts in sessions of a few events, mostly in
    the evening. Users come faster and faster, and more than half are still there at the end.
    """
    num_users, longest = len(lengths), int(lengths.max())
    span = END - START
    begin = START + (span * 0.98 * rng.beta(1.3, 1.2, num_users)).astype(np.int64)
    staying = rng.random(num_users) < 0.55
    left = begin + ((END - begin) * rng.random(num_users)).astype(np.int64)
    end = np.where(staying, END - (2 * DAY * rng.random(num_users)).astype(np.int64), left)
    end = np.maximum(end, begin)

    num_sessions = np.maximum(1, lengths // 3)
    session_days = begin[:, None] + (
        (end - begin)[:, None] * rng.random((num_users, int(num_sessions.max())))
    ).astype(np.int64)
    session_days[:, 0] = end  # so that a user is there from the first day to the last
    hours = np.clip(rng.normal(19.5, 3.0, session_days.shape), 6.0, 23.0)
    sessions = session_days // DAY * DAY + (hours * 3600).astype(np.int64)
    which = (rng.random((num_users, longest)) * num_sessions[:, None]).astype(np.int64)
    times = np.take_along_axis(sessions, which, axis=1)
    times += rng.integers(0, 3 * 3600, times.shape)
    padding = np.arange(longest) >= lengths[:, None]
    times = np.sort(np.where(padding, np.iinfo(np.int64).max, times), axis=1)
    times = np.where(padding, times[np.arange(num_users), lengths - 1][:, None], times)
    steps = np.arange(longest)
    distinct = np.maximum.accumulate(times - steps, axis=1) + steps
    return np.asarray(distinct, dtype=np.int64)
