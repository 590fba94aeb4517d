"""Ranks: where each target stands in a ranking. Everything else in this package starts from them.

A target's rank is 1 plus the number of items scored higher. Items of equal score are one *tied
block*, and a target in it gets the rank that it would have on average if the block were shuffled:
with ``a`` items scored higher and ``m`` in the block, ``a + (m + 1) / 2``, which may end in .5. An
optimistic rule (first of the block) would reward a source for scoring everything alike, and most
sources score most items 0. Where ``t`` targets of one case share a block, the j-th of them gets its
own expected place, ``a + j (m + 1) / (t + 1)``, which is the mean rank for t = 1 and keeps the
ranks of one case at least 1 apart, so that no metric can leave [0, 1].

An item that is not ranked at all (it is in the history, it is outside the list, its score is −∞)
has rank infinity.

Shape legend: B cases, N targets of all of them, I items, C listed items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from fusionrec.data.histories import BoolArray, CodeArray, FloatArray, Histories, IntArray
from fusionrec.data.ties import tied_targets

RealArray: TypeAlias = npt.NDArray[np.float64]

BLOCK_BYTES = 8 * 2**20
"""Size of one block of dense scores: a handful of them is held at a time, and small ones stay in
the processor's cache."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of the N targets of B cases, ragged like the targets themselves."""

    ranks: RealArray
    """[N] from 1; infinite where the target is not ranked."""
    offsets: IntArray
    """[B+1]; case b has ``ranks[offsets[b]:offsets[b+1]]``."""

    def __post_init__(self) -> None:
        assert self.offsets[0] == 0
        assert self.offsets[-1] == len(self.ranks)
        assert not len(self.ranks) or self.ranks.min() >= 1, "a rank is at least 1 and not NaN"

    @classmethod
    def of(cls, rows: Iterable[Sequence[float]]) -> Self:
        """From nested sequences."""
        arrays = [np.asarray(row, dtype=np.float64) for row in rows]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(array) for array in arrays], out=offsets[1:])
        return cls(np.concatenate(arrays) if arrays else np.empty(0), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> IntArray:
        """[B] number of targets of each case."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> IntArray:
        """[N] the case of each target."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def where(self, mask: BoolArray) -> Self:
        """Only the targets of ``mask`` [N], and only the cases that keep one.

        The ranks stay as they are: the dropped targets are still in the list, they just no longer
        count as answers.
        """
        lengths = np.bincount(self.rows[mask], minlength=len(self))
        offsets = np.concatenate([[0], np.cumsum(lengths[lengths > 0])]).astype(np.int64)
        return type(self)(self.ranks[mask], offsets)


class Scorer(Protocol):
    """The part of a candidate source that ranking needs."""

    def score(self, histories: Histories, candidates: CodeArray, /) -> FloatArray:
        """[B, C] the scores of ``candidates`` [B, C]."""
        ...


def dense_ranks(scores: FloatArray, histories: Histories, targets: Histories) -> Ranks:
    """Ranks among all items from ``scores`` [B, I]; items of the history are excluded.

    ``targets`` are distinct within a case. A target in the history gets infinity. O(N · I).
    """
    assert len(scores) == len(histories) == len(targets)
    scores = np.array(scores)  # a copy: the scorer may hand out its own array
    scores[histories.rows, histories.items] = -np.inf
    return _ranks(scores, targets.rows, scores[targets.rows, targets.items], targets.offsets)


def list_ranks(items: CodeArray, scores: FloatArray, targets: Histories) -> Ranks:
    """Ranks within lists: ``items`` [B, C] (−1 is padding) with ``scores`` [B, C], in any order.

    A target outside its list gets infinity. Nothing is excluded: an item of the history that a list
    contains keeps its place, and :func:`seen_items` counts such mistakes.
    """
    assert items.shape == scores.shape
    assert len(items) == len(targets)
    rows = targets.rows
    scores = np.where(items >= 0, scores, -np.inf).astype(scores.dtype)
    found = np.full(len(rows), -np.inf, dtype=scores.dtype)
    for part in _blocks(len(rows), items.shape[1] * 8):
        index, place = np.nonzero(items[rows[part]] == targets.items[part, None])
        found[part.start + index] = scores[rows[part]][index, place]
    return _ranks(scores, rows, found, targets.offsets)


def hit_lists(items: CodeArray, targets: Histories) -> IntArray:
    """The rows of lists ``items`` [B, C] that hold a target of theirs, ascending.

    Of the others every order is worth the same, so that no model needs to read them.
    """
    ranks = list_ranks(items, np.zeros(items.shape, dtype=np.float32), targets)
    return np.unique(ranks.rows[np.isfinite(ranks.ranks)])


def full_ranks(
    source: Scorer,
    histories: Histories,
    targets: Histories,
    num_items: int,
    *,
    block_bytes: int = BLOCK_BYTES,
    advance: Callable[[int], object] = lambda _: None,
) -> Ranks:
    """Ranks of ``targets`` when ``source`` scores the whole catalogue, in blocks of histories.

    ``advance`` is called with the number of histories of each finished block. The memory is a few
    times ``block_bytes``, whatever B is.
    """
    catalogue = np.arange(num_items, dtype=np.int32)
    parts: list[RealArray] = []
    for part in _blocks(len(histories), num_items * 4, block_bytes):
        block = histories.slice(part.start, part.stop)
        candidates = np.broadcast_to(catalogue, (len(block), num_items))
        scores = source.score(block, candidates)
        parts.append(dense_ranks(scores, block, targets.slice(part.start, part.stop)).ranks)
        advance(len(block))
    return Ranks(np.concatenate(parts) if parts else np.empty(0), targets.offsets)


def seen_items(items: CodeArray, histories: Histories) -> int:
    """How many places of the lists ``items`` [B, C] hold an item of the case's own history."""
    stride = int(max(items.max(initial=0), histories.items.max(initial=0))) + 1
    row, place = np.nonzero(items >= 0)
    listed = row * stride + items[row, place]
    return int(np.isin(listed, histories.rows * stride + histories.items).sum())


def _ranks(scores: FloatArray, rows: IntArray, found: FloatArray, offsets: IntArray) -> Ranks:
    """Ranks of targets scored ``found`` [N] in the rows ``rows`` [N] of ``scores`` [B, C]."""
    assert not np.isnan(scores).any(), "a score is NaN: it has no place in a ranking"
    num_targets = len(rows)
    above, tied = np.zeros(num_targets, dtype=np.int64), np.ones(num_targets, dtype=np.int64)
    for part in _blocks(num_targets, scores.shape[1] * 4):
        block, score = scores[rows[part]], found[part, None]
        above[part] = np.count_nonzero(block > score, axis=1)
        tied[part] = np.count_nonzero(block == score, axis=1)
    order, share = tied_targets(rows, found)
    ranks = above + order * (tied + 1) / (share + 1)
    ranks[np.isneginf(found)] = np.inf
    return Ranks(ranks, offsets)


def _blocks(count: int, row_bytes: int, block_bytes: int = BLOCK_BYTES) -> Iterable[slice]:
    step = max(1, block_bytes // max(row_bytes, 1))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
