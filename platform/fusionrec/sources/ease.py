"""EASE: the linear autoencoder with a closed-form solution.

    P = (Xᵀ X + regularisation · I)⁻¹,   W[a, b] = −P[a, b] / P[b, b],   W[a, a] = 0

Steck, "Embarrassingly Shallow Autoencoders for Sparse Data" (WWW 2019). X [users, I] is binary.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import scipy.linalg
from pydantic import Field

from fusionrec.config import Config
from fusionrec.errors import DataError
from fusionrec.retrieval.neighbours import profiles, top_neighbours, top_neighbours_dense
from fusionrec.retrieval.rows import SparseRows
from fusionrec.sources.protocol import TrainingData
from fusionrec.space import Range


class EASE(Config):
    """Learns the regression of each item on all others."""

    kind: Literal["ease"] = "ease"
    regularisation: Annotated[float, Range(1, 5000, log=True)] = Field(default=50.0, gt=0)
    """The λ on the diagonal, in events."""
    max_items: int = Field(default=20_000, ge=1)
    """Items with training events above which the dense solve is refused: it takes
    4 · items² bytes and a third of items³ multiplications, twice."""

    def learn(self, data: TrainingData, neighbours: int) -> SparseRows:
        """Solve, over the items that have training events.

        Raises:
            DataError: more than ``max_items`` of them.
        """
        counts = np.bincount(data.histories.items, minlength=data.num_items)
        (warm,) = np.nonzero(counts)
        if len(warm) > self.max_items:
            gib = 4 * len(warm) ** 2 / 2**30
            raise DataError(
                f"ease.max_items = {self.max_items}, but {len(warm)} items have training events "
                f"and a dense solve would take {gib:.0f} GiB; use the source item-knn or "
                "transitions instead, or raise ease.max_items"
            )
        ones = np.ones(len(data.histories.items), dtype=np.float32)
        seen = profiles(data.histories, ones, data.num_items)[:, warm]
        seen.data[:] = 1
        gram = np.asfortranarray((seen.T @ seen).toarray())
        gram[np.diag_indices_from(gram)] += np.float32(self.regularisation)
        # In place: factorise, then invert from the factor; both touch the lower triangle only.
        factor, failed = scipy.linalg.lapack.spotrf(gram, lower=1, overwrite_a=1, clean=0)
        assert failed == 0, "a Gram matrix plus a positive diagonal is positive definite"
        weights, failed = scipy.linalg.lapack.spotri(factor, lower=1, overwrite_c=1)
        assert failed == 0
        _mirror_lower(weights)
        weights /= -np.diag(weights).copy()
        weights[np.diag_indices_from(weights)] = 0
        small = top_neighbours_dense(weights, neighbours).matrix.tocoo()
        full = type(small)((small.data, (warm[small.row], warm[small.col])), 2 * (data.num_items,))
        return top_neighbours(full.tocsr(), neighbours)


def _mirror_lower(matrix: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    """Copy the lower triangle onto the upper one, in blocks that stay in the cache."""
    size = 512
    for start in range(0, len(matrix), size):
        stop = start + size
        square = matrix[start:stop, start:stop]
        square[:] = np.tril(square) + np.tril(square, -1).T
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
