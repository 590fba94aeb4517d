"""Semantic: items whose text vectors point where the history's does.

    score(h, c) = ⟨vector(h), vector(c)⟩        both L2-normalised: the cosine

The vector of the history comes from the embedder, as part of :class:`Histories`; a history without
one, and an item without text, score 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np

from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.errors import DataError
from fusionrec.retrieval.index import VectorIndex
from fusionrec.sources.protocol import Ranked, TrainingData


class Semantic:
    """Scores items by the cosine of text vectors."""

    name = "semantic"

    def __init__(self, vectors: FloatArray | None = None) -> None:
        self._vectors = vectors
        self._index = None if vectors is None else VectorIndex(vectors)

    def fit(self, data: TrainingData) -> Self:
        """Index the item vectors.

        Raises:
            DataError: the training data carries none.
        """
        if data.item_vectors is None:
            raise DataError(
                "source semantic needs the catalogue's text vectors: run `python -m jobs.embed` "
                "first, or leave semantic out of --sources"
            )
        return type(self)(data.item_vectors)

    def top(self, histories: Histories, k: int) -> Ranked:
        """The best ``k`` items by cosine, exactly."""
        if histories.vectors is None or self._index is None:
            return Ranked(
                np.full((len(histories), k), -1, dtype=np.int32),
                np.zeros((len(histories), k), dtype=np.float32),
            )
        return Ranked(*self._index.top_unseen(histories.vectors, histories, k))

    def score(self, histories: Histories, candidates: CodeArray) -> FloatArray:
        """[B, C] cosines of ``candidates``."""
        result = np.zeros(candidates.shape, dtype=np.float32)
        if histories.vectors is None or self._index is None:
            return result
        for row in range(len(histories)):
            result[row] = self._index.score(histories.vectors[row], candidates[row])
        return result

    def save(self, directory: Path) -> None:
        """Write ``vectors.npy``."""
        assert self._vectors is not None, "semantic is not fitted"
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / "vectors.npy", self._vectors, allow_pickle=False)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Memory-map the vectors and index them."""
        return cls(np.load(directory / "vectors.npy", mmap_mode="r", allow_pickle=False))
