"""Answers: what a source thinks of a batch of histories, worked out once.

A batch is asked twice, for its best items and then for the scores of what other sources proposed,
and most of the cost of either is the same. Three shapes serve all sources.

Shape legend: B histories, I items, C candidates, K items returned, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.retrieval.index import VectorIndex
from fusionrec.retrieval.lists import empty
from fusionrec.retrieval.neighbours import gather, gather_sums, top_of_dense, top_of_sums
from fusionrec.retrieval.sums import Sum
from fusionrec.sources.protocol import Answer, Ranked


def scored(histories: Histories, scores: FloatArray | Sequence[Sum]) -> Answer:
    """The answer out of the scores of all items: [B, I], or B sums."""
    if isinstance(scores, np.ndarray):
        return _Dense(histories, scores)
    return _Summed(histories, scores)


@dataclass(frozen=True, slots=True)
class _Dense:
    histories: Histories
    scores: FloatArray

    def top(self, k: int) -> Ranked:
        return Ranked(*top_of_dense(self.scores, self.histories, k))

    def score(self, candidates: CodeArray) -> FloatArray:
        return gather(self.scores, candidates)


@dataclass(frozen=True, slots=True)
class _Summed:
    histories: Histories
    scores: Sequence[Sum]

    def top(self, k: int) -> Ranked:
        return Ranked(*top_of_sums(self.scores, self.histories, k))

    def score(self, candidates: CodeArray) -> FloatArray:
        return gather_sums(self.scores, candidates)


@dataclass(frozen=True, slots=True)
class Nearest:
    """The answer of an index to the vectors of the histories."""

    histories: Histories
    index: VectorIndex | None
    """None where there is nothing to search."""
    queries: FloatArray | None
    """[B, D]; None where there is nothing to search for."""

    def top(self, k: int) -> Ranked:
        """The nearest items that are not in the history."""
        if self.index is None or self.queries is None:
            return Ranked(*empty(len(self.histories), k))
        return Ranked(*self.index.top_unseen(self.queries, self.histories, k))

    def score(self, candidates: CodeArray) -> FloatArray:
        """[B, C] inner products."""
        result = np.zeros(candidates.shape, dtype=np.float32)
        if self.index is not None and self.queries is not None:
            for row in range(len(self.histories)):
                result[row] = self.index.score(self.queries[row], candidates[row])
        return result
