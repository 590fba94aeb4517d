"""Splits against a plain reading of the protocols, event by event."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrec.data.dataset import Dataset, DatasetInfo, Events
from fusionrec.data.histories import Histories
from fusionrec.data.splits import Cases, Protocol, Split, split
from fusionrec.errors import DataError

NUM_ITEMS = 8
Log = list[tuple[int, int, int]]


class InMemory(Dataset):
    """A data set that was never written: user, item, timestamp in file order."""

    def __init__(self, log: Log, has_timestamps: bool = True) -> None:
        info = DatasetInfo(
            name="log",
            format="table",
            fingerprint="",
            num_interactions=len(log),
            num_users=len({user for user, _, _ in log}),
            num_items=NUM_ITEMS,
            has_timestamps=has_timestamps,
        )
        super().__init__(Path("nowhere"), info)
        users = list(dict.fromkeys(user for user, _, _ in log))
        self.__dict__["events"] = Events(
            users=np.array([users.index(user) for user, _, _ in log], dtype=np.int32),
            items=np.array([item for _, item, _ in log], dtype=np.int32),
            timestamps=np.array([time for _, _, time in log], dtype=np.int64),
            values=np.full(len(log), np.nan, dtype=np.float32),
            user_ids=tuple(str(user) for user in users),
        )


entries = st.tuples(st.integers(0, 4), st.integers(0, NUM_ITEMS - 1), st.integers(0, 12))
# Eleven events of five users give one of them three: every log can be split in both ways.
logs = st.lists(entries, min_size=11, max_size=45)


def rows(histories: Histories) -> list[list[int]]:
    return [histories.row(index).tolist() for index in range(len(histories))]


def in_order(log: Log) -> dict[str, Log]:
    """Each user's events by (timestamp, position in the file)."""
    users: dict[str, Log] = {}
    for event in sorted(log, key=lambda event: event[2]):  # sorted() is stable
        users.setdefault(str(event[0]), []).append(event)
    return users


def items(log: Log) -> list[int]:
    return [item for _, item, _ in log]


def test_leave_one_out_known_answer() -> None:
    # User 7 has ties: the file's order decides. User 9 is too short to be a case.
    log = [(7, 0, 50), (7, 1, 10), (9, 5, 1), (7, 2, 50), (7, 3, 10), (9, 6, 2), (8, 4, 3)]
    log += [(8, 5, 2), (8, 6, 1)]
    parts = split(InMemory(log))
    assert parts.user_ids == ("7", "9", "8")
    assert rows(parts.train) == [[1, 3], [5, 6], [6]]
    assert rows(parts.known) == [[1, 3, 0], [5, 6], [6, 5]]
    assert parts.test.users.tolist() == parts.validation.users.tolist() == [0, 2]
    assert rows(parts.validation.histories) == [[1, 3], [6]]
    assert rows(parts.validation.targets) == [[0], [5]]
    assert rows(parts.test.histories) == [[1, 3, 0], [6, 5]]
    assert rows(parts.test.targets) == [[2], [4]]
    assert parts.item_counts.tolist() == [0, 1, 0, 1, 0, 1, 2, 0]


@settings(deadline=None)  # a busy machine is no fault of the code
@given(logs)
def test_leave_one_out_is_the_plain_reading(log: Log) -> None:
    users = in_order(log)
    parts = split(InMemory(log))
    for row, user in enumerate(parts.user_ids):
        own = items(users[user])
        is_case = len(own) >= 3
        assert rows(parts.train)[row] == (own[:-2] if is_case else own)
        assert rows(parts.known)[row] == (own[:-1] if is_case else own)
        assert (row in parts.test.users) == (row in parts.validation.users) == is_case
    for cases, cut in ((parts.validation, 2), (parts.test, 1)):
        own = [items(users[parts.user_ids[user]]) for user in cases.users]
        assert rows(cases.histories) == [events[:-cut] for events in own]
        assert rows(cases.targets) == [[events[-cut]] for events in own]


def test_global_time_known_answer() -> None:
    # Twenty events: 16 train, 2 validation, 2 test. User 1 returns to item 3 and meets item 4.
    log = [(0, time % 3, time) for time in range(15)] + [(1, 3, 15)]
    log += [(1, 5, 16), (2, 6, 17), (1, 3, 18), (1, 4, 19)]
    parts = split(InMemory(log), Protocol.GLOBAL_TIME)
    assert rows(parts.train)[1:] == [[3], []]
    assert parts.validation.users.tolist() == [1, 2]
    assert rows(parts.validation.histories) == [[3], []], "a new user has an empty history"
    assert rows(parts.validation.targets) == [[5], [6]]
    assert parts.test.users.tolist() == [1]
    assert rows(parts.test.histories) == [[3, 5]]
    assert rows(parts.test.targets) == [[4]], "what the user knows already is not asked for"
    assert parts.item_counts[[4, 5, 6]].tolist() == [0, 0, 0]


@settings(deadline=None)
@given(logs)
def test_global_time_is_the_plain_reading(log: Log) -> None:
    parts = split(InMemory(log), Protocol.GLOBAL_TIME)
    ordered = sorted(log, key=lambda event: event[2])
    tenth = len(log) // 10
    train, validation = ordered[: -2 * tenth], ordered[-2 * tenth : -tenth]
    known, test = ordered[:-tenth], ordered[-tenth:]
    for histories, events in ((parts.train, train), (parts.known, known)):
        assert rows(histories) == [items(in_order(events).get(u, [])) for u in parts.user_ids]
    for cases, before, window in (
        (parts.validation, train, validation),
        (parts.test, known, test),
    ):
        expected = []
        for row, user in enumerate(parts.user_ids):
            history = items(in_order(before).get(user, []))
            targets = list(dict.fromkeys(items(in_order(window).get(user, []))))
            targets = [item for item in targets if item not in history]
            if targets:
                expected.append((row, history, targets))
        found = zip(cases.users, rows(cases.histories), rows(cases.targets), strict=True)
        assert [(int(user), history, targets) for user, history, targets in found] == expected


@settings(deadline=None)
@given(logs, st.sampled_from(list(Protocol)))
def test_nothing_of_the_future_is_known(log: Log, protocol: Protocol) -> None:
    parts = split(InMemory(log), protocol)
    assert np.all(parts.train.lengths <= parts.known.lengths)
    for cases in (parts.validation, parts.test):
        assert np.all(cases.targets.lengths >= 1)
        for case in range(len(cases)):
            history, targets = cases.histories.take([case]), cases.targets.take([case])
            if len(history.items):
                assert history.timestamps.max() <= targets.timestamps.min()
            assert np.all(np.diff(history.timestamps) >= 0)


@pytest.mark.parametrize("protocol", list(Protocol))
def test_cases_can_be_taken(protocol: Protocol) -> None:
    parts = split(InMemory([(n % 4, n % NUM_ITEMS, n) for n in range(40)]), protocol)
    turned = parts.test.take(np.arange(len(parts.test))[::-1])
    assert turned.users.tolist() == parts.test.users.tolist()[::-1]
    assert rows(turned.targets) == rows(parts.test.targets)[::-1]


def test_a_sample_of_cases_is_theirs_and_in_their_order() -> None:
    cases = Cases(np.arange(9), Histories.of([[0]] * 9), Histories.of([[1]] * 9))
    assert cases.sample(9, seed=0) is cases
    users = cases.sample(4, seed=0).users
    assert len(set(users)) == 4
    assert users.tolist() == sorted(users)
    assert users.tolist() == cases.sample(4, seed=0).users.tolist()
    assert any(users.tolist() != cases.sample(4, seed=seed).users.tolist() for seed in (1, 2, 3))


def test_what_cannot_be_split_is_said() -> None:
    with pytest.raises(DataError, match="three events"):
        split(InMemory([(0, 1, 1), (0, 2, 2), (1, 1, 1)]))
    with pytest.raises(DataError, match="ten events"):
        split(InMemory([(0, 1, 1)] * 9), Protocol.GLOBAL_TIME)
    with pytest.raises(DataError, match="leave-one-out"):
        split(InMemory([(0, 1, 1)] * 20, has_timestamps=False), Protocol.GLOBAL_TIME)


def test_the_embedded_data_set_splits(synthetic: Dataset) -> None:
    for protocol in Protocol:
        parts: Split = split(synthetic, protocol)
        assert parts.user_ids == synthetic.events.user_ids
        assert parts.item_counts.sum() == len(parts.train.items)
