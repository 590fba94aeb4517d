"""Batches of histories of about equal length, so that little is padded.

A history of n events makes n − 1 questions, "what came after this one", and all are learned in one
pass over it. One that is longer than the model reads is cut into windows, from its newest event
back, so that every event is learned once an epoch.

Shape legend: B windows of a batch, L questions of the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fusionrec.data.histories import BoolArray, Histories, IntArray


@dataclass(frozen=True, slots=True)
class Batch:
    """B windows, padded behind."""

    events: IntArray
    """[B, L] item codes."""
    following: IntArray
    """[B, L] the item that came after each."""
    asked: BoolArray
    """[B, L] whether it is a question."""

    def share(self, number: int, count: int) -> Batch:
        """One of ``count`` parts, of about equally many windows."""
        rows = slice(number, None, count)
        return Batch(self.events[rows], self.following[rows], self.asked[rows])


class Windows:
    """The windows of all histories."""

    def __init__(self, histories: Histories, max_length: int, *, last_only: bool) -> None:
        """``last_only``: only what came after the last event of a window is asked."""
        questions = np.maximum(histories.lengths - 1, 0)
        pieces = -(-questions // max_length)
        history = np.repeat(np.arange(len(histories)), pieces)
        newer = np.arange(len(history)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        left = questions[history] - newer * max_length
        self._lengths = np.minimum(left, max_length)
        self._starts = histories.offsets[history] + left - self._lengths
        self._items = histories.items.astype(np.int64)
        self._last_only = last_only

    def __len__(self) -> int:
        return len(self._starts)

    def batches(self, max_events: int, generator: np.random.Generator) -> Iterator[Batch]:
        """All windows once: at random among those of equal length, the batches in random order."""
        order = generator.permutation(len(self))
        order = order[np.argsort(-self._lengths[order], kind="stable")]
        parts, start = [], 0
        while start < len(order):
            stop = start + max(1, max_events // int(self._lengths[order[start]]))
            parts.append(order[start:stop])
            start = stop
        for index in generator.permutation(len(parts)):
            yield self._batch(parts[index])

    def _batch(self, windows: IntArray) -> Batch:
        lengths = self._lengths[windows, None]
        place = np.arange(lengths.max())
        real = place < lengths
        event = np.where(real, self._starts[windows, None] + place, 0)
        asked = place == lengths - 1 if self._last_only else real
        return Batch(self._items[event], self._items[event + 1], asked)
