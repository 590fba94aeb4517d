"""Leakage-safe splits of a data set into what is known and what is to be predicted.

*Leave-one-out*: a user's events are ordered by (timestamp, position in the file). The last is the
test target, the one before it the validation target, the rest is training data; at test time the
validation event belongs to the history. A user with fewer than three events is training data only.

*Global time*: one cut for everybody. The newest 10% of events by time are test, the 10% before them
validation, the rest training data. A user with events in a window is one case of that window: the
history is all that came before the window, the targets are the distinct new items within it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from fusionrec.data.dataset import Dataset, Events
from fusionrec.data.histories import Histories, IntArray
from fusionrec.errors import DataError


class Protocol(StrEnum):
    """How a data set is split."""

    LEAVE_ONE_OUT = "leave-one-out"
    GLOBAL_TIME = "global-time"


@dataclass(frozen=True, slots=True)
class Cases:
    """B questions with their answers."""

    users: IntArray
    """[B] rows of ``Split.user_ids``."""
    histories: Histories
    """[B] what was known when the question was asked; may be empty."""
    targets: Histories
    """[B] the items to be found, at least one each."""

    def __len__(self) -> int:
        return len(self.users)

    def take(self, indices: npt.ArrayLike) -> Cases:
        """The cases at ``indices``."""
        index = np.asarray(indices, dtype=np.int64)
        return Cases(self.users[index], self.histories.take(index), self.targets.take(index))

    def sample(self, max_cases: int, seed: int) -> Cases:
        """All cases, or a random ``max_cases`` of them in their order."""
        if len(self) <= max_cases:
            return self
        chosen = np.random.default_rng(seed).choice(len(self), max_cases, replace=False)
        return self.take(np.sort(chosen))


@dataclass(frozen=True, slots=True)
class Split:
    """Training histories, and the cases that measure what was learned from them."""

    protocol: Protocol
    user_ids: tuple[str, ...]
    num_items: int
    train: Histories
    """[users] one history a user, perhaps empty: the only thing that may be fitted on."""
    validation: Cases
    test: Cases
    known: Histories
    """[users] everything up to the test targets excluded: what serving knows of each user."""

    @property
    def item_counts(self) -> IntArray:
        """[I] training events of each item; an item with none is *cold*."""
        return np.bincount(self.train.items, minlength=self.num_items)


def split(
    dataset: Dataset,
    protocol: Protocol = Protocol.LEAVE_ONE_OUT,
    events: Events | None = None,
) -> Split:
    """Split ``dataset``; of its ``events``, where they are given, in their order.

    Raises:
        DataError: a global time split of data without times, or a data set too small to split.
    """
    if protocol is Protocol.LEAVE_ONE_OUT:
        return _leave_one_out(events or dataset.events, dataset.info.num_items)
    if not dataset.info.has_timestamps:
        raise DataError(
            f"data set {dataset.info.name} has an order of events but no timestamps, so it cannot "
            "be split by global time; use --protocol leave-one-out"
        )
    return _global_time(events or dataset.events, dataset.info.num_items)


def _grouped(events: Events, keep: npt.NDArray[np.bool_]) -> Histories:
    """One history a user from the events of ``keep``, by (timestamp, position in the file)."""
    (index,) = np.nonzero(keep)
    order = index[np.lexsort((index, events.timestamps[index], events.users[index]))]
    offsets = np.zeros(len(events.user_ids) + 1, dtype=np.int64)
    np.cumsum(np.bincount(events.users[order], minlength=len(events.user_ids)), out=offsets[1:])
    return Histories(events.items[order], events.timestamps[order], offsets)


def _leave_one_out(events: Events, num_items: int) -> Split:
    everything = _grouped(events, np.ones(len(events.items), dtype=np.bool_))
    (enough,) = np.nonzero(everything.lengths >= 3)
    if not len(enough):
        raise DataError("no user has the three events that a leave-one-out split needs")
    short = everything.lengths < 3
    before_test, full = everything.take(enough).without_last(1), everything.take(enough)
    # Users too short to be cases keep their events for training.
    train = _select(everything, (everything.ages >= 2) | np.repeat(short, everything.lengths))
    known = _select(everything, (everything.ages >= 1) | np.repeat(short, everything.lengths))
    return Split(
        protocol=Protocol.LEAVE_ONE_OUT,
        user_ids=events.user_ids,
        num_items=num_items,
        train=train,
        validation=Cases(enough, full.without_last(2), before_test.newest(1)),
        test=Cases(enough, before_test, full.newest(1)),
        known=known,
    )


def _select(histories: Histories, keep: npt.NDArray[np.bool_]) -> Histories:
    offsets = np.zeros_like(histories.offsets)
    np.cumsum(np.bincount(histories.rows[keep], minlength=len(histories)), out=offsets[1:])
    return Histories(histories.items[keep], histories.timestamps[keep], offsets)


def _global_time(events: Events, num_items: int) -> Split:
    order = np.lexsort((np.arange(len(events.items)), events.timestamps))
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    first_test = len(order) - len(order) // 10
    first_validation = first_test - len(order) // 10
    if first_test == len(order):
        raise DataError("a global time split needs at least ten events")
    train = _grouped(events, position < first_validation)
    known = _grouped(events, position < first_test)
    in_validation = (position >= first_validation) & (position < first_test)
    return Split(
        protocol=Protocol.GLOBAL_TIME,
        user_ids=events.user_ids,
        num_items=num_items,
        train=train,
        validation=_window(train, _grouped(events, in_validation), num_items),
        test=_window(known, _grouped(events, position >= first_test), num_items),
        known=known,
    )


def _window(before: Histories, window: Histories, num_items: int) -> Cases:
    """Cases of one time window: distinct items of the window that are new to their user."""
    seen = before.rows * num_items + before.items
    keys = window.rows * num_items + window.items
    first = np.zeros(len(keys), dtype=np.bool_)
    first[np.unique(keys, return_index=True)[1]] = True
    targets = _select(window, first & ~np.isin(keys, seen))
    (users,) = np.nonzero(targets.lengths > 0)
    return Cases(users, before.take(users), targets.take(users))
