"""Ratings beside the examples, and what to expect of a rating before any text is read.

A user's expected rating is the damped mean of those that came before,

    e = (Σ r + λ·μ) / (n + λ),   λ = 5,

with μ the mean of all training ratings: half of what the bias model of Koren (2008) knows, and the
half that a text cannot. Shape legend: N events, P examples, U users, I items, B cases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fusionrec.data.dataset import Events
from fusionrec.data.histories import BoolArray, CodeArray, FloatArray, Histories, IntArray
from fusionrec.errors import TrainingError
from fusionrec.training.examples import Examples

_DAMPING = 5.0


@dataclass(frozen=True, slots=True)
class Ratings:
    """The ratings of training histories, and those behind them."""

    train: FloatArray
    """[N] in the order of the training histories; NaN where none was given."""
    later: dict[tuple[int, int], float]
    """(user, item) → the first rating that the training histories do not hold."""
    histories: Histories
    """[U] training histories."""

    @classmethod
    def of(cls, events: Events, train: Histories) -> Ratings:
        """From the events that ``train`` holds the first of, per user by time.

        Raises:
            TrainingError: there are no ratings in the training histories.
        """
        order, known = _by_time(events, train)
        users, items = events.users[order], events.items[order]
        values = events.values[order]
        if np.isnan(values[known]).all():
            raise TrainingError(
                "there are no ratings to learn from: no training event has a value; leave "
                "--task rating out"
            )
        rest = np.flatnonzero(~known & ~np.isnan(values))[::-1]  # the first one wins
        later = {(int(users[e]), int(items[e])): float(values[e]) for e in rest}
        return cls(values[known].astype(np.float32), later, train)

    @property
    def mean(self) -> float:
        """μ."""
        return float(np.nanmean(self.train.astype(np.float64)))

    @property
    def by_user(self) -> FloatArray:
        """[U] the expected rating after all training events."""
        return self._before(np.arange(len(self.histories)), self.histories.lengths)

    def beside(self, examples: Examples) -> Examples:
        """``examples`` whose positive was rated, with its rating and the one to be expected.

        Args:
            examples: Made from the same training histories, these still whole.
        """
        places = examples.histories.lengths
        ratings = self.train[self.histories.offsets[examples.users] + places]
        expected = self._before(examples.users, places)
        rated = replace(examples, ratings=ratings, expected=expected)
        return rated.take(np.flatnonzero(~np.isnan(ratings)))

    def targets(
        self, users: IntArray, targets: Histories
    ) -> tuple[IntArray, CodeArray, IntArray, FloatArray]:
        """(case, item, time, rating) of those targets of B cases that were rated after training."""
        rows, items = targets.rows, targets.items
        found = [
            self.later.get((int(users[r]), int(i)), np.nan)
            for r, i in zip(rows, items, strict=True)
        ]
        ratings = np.array(found, dtype=np.float32)
        kept = ~np.isnan(ratings)
        return rows[kept], items[kept], targets.timestamps[kept], ratings[kept]

    def _before(self, users: IntArray, places: IntArray) -> FloatArray:
        """The expected rating of each user's event at each place."""
        known = ~np.isnan(self.train)
        sums = np.concatenate(
            [[0.0], np.cumsum(np.where(known, self.train, 0.0), dtype=np.float64)]
        )
        counts = np.concatenate([[0], np.cumsum(known)])
        first = self.histories.offsets[users]
        total, count = (each[first + places] - each[first] for each in (sums, counts))
        expected: FloatArray = ((total + _DAMPING * self.mean) / (count + _DAMPING)).astype(
            np.float32
        )
        return expected


def training_events(events: Events, train: Histories) -> IntArray:
    """[N] the events that ``train`` holds, in its order, as positions in ``events``."""
    order, known = _by_time(events, train)
    return order[known]


def _by_time(events: Events, train: Histories) -> tuple[IntArray, BoolArray]:
    """Positions of all events by user and time, and which of these the training histories hold."""
    order = np.lexsort((np.arange(len(events.items)), events.timestamps, events.users))
    users = events.users[order]
    starts = np.searchsorted(users, np.arange(len(train)))
    known: BoolArray = np.arange(len(users)) - starts[users] < train.lengths[users]
    assert (events.items[order[known]] == train.items).all()
    return order, known
