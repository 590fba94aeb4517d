"""Vector index: the nearest items of a query vector, by inner product.

Exact (FAISS flat). Scores do not depend on who else is in the batch: FAISS is kept from switching
to matrix products for larger batches, whose last bits differ, because the endpoint and the offline
evaluation batch differently and must agree.
"""

from __future__ import annotations

import faiss
import numpy as np

from fusionrec.data.histories import CodeArray, FloatArray, Histories

_NEVER = 2**31 - 1


class VectorIndex:
    """Inner-product search over [I, D] vectors."""

    def __init__(self, vectors: FloatArray) -> None:
        self._vectors = vectors
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(np.ascontiguousarray(vectors))
        faiss.cvar.distance_compute_blas_threshold = _NEVER

    def search(self, queries: FloatArray, k: int) -> tuple[CodeArray, FloatArray]:
        """[B, K] the best items of each of [B, D] queries, ties to the lower code; −1 beyond I."""
        scores, codes = self._index.search(np.ascontiguousarray(queries), k)
        order = np.lexsort((codes, -scores), axis=1)
        codes, scores = np.take_along_axis(codes, order, 1), np.take_along_axis(scores, order, 1)
        return codes.astype(np.int32), np.where(codes < 0, 0, scores).astype(np.float32)

    def top_unseen(
        self, queries: FloatArray, histories: Histories, k: int
    ) -> tuple[CodeArray, FloatArray]:
        """[B, K] as :meth:`search`: positive scores only, without the items of each history."""
        items = np.full((len(histories), k), -1, dtype=np.int32)
        values = np.zeros((len(histories), k), dtype=np.float32)
        # The history's own items are found too, and dropped: ask for so many more.
        found, scores = self.search(queries, k + int(histories.lengths.max(initial=0)))
        for row in range(len(histories)):
            new = (found[row] >= 0) & (scores[row] > 0)
            new &= ~np.isin(found[row], histories.row(row))
            best = found[row][new][:k]
            items[row, : len(best)] = best
            values[row, : len(best)] = scores[row][new][:k]
        return items, values

    def score(self, query: FloatArray, codes: CodeArray) -> FloatArray:
        """[C] inner products of one [D] query with the items ``codes``; 0 where a code is −1."""
        products = np.einsum("cd,d->c", self._vectors[np.maximum(codes, 0)], query)
        return np.where(codes >= 0, products, 0).astype(np.float32)
