"""EASE: the linear autoencoder with a closed-form solution; for large catalogues, item by item.

    P = (Xᵀ X + regularisation · I)⁻¹,   W[a, b] = −P[a, b] / P[b, b],   W[a, a] = 0

Steck, "Embarrassingly Shallow Autoencoders for Sparse Data" (WWW 2019). X [users, I] is binary.

Column b of W is the ridge regression of item b on all others. Where there are too many items for a
dense inverse, it is that on the ``support`` items that tell most of b, and 0 elsewhere:

    W[S, b] = (G[S, S] + regularisation · I)⁻¹ G[S, b],   G = Xᵀ X

S are the items a of the largest G[a, b]² / (G[a, a] + regularisation), by how much a alone lowers
the squared error. A sparse approximation of the inverse as in Steck, "Markov Random Fields for
Collaborative Filtering" (NeurIPS 2019), which picks by correlation. With as many items in S as were
ever met together with b, W is nearly EASE's: only what runs through others is missing.

Shape legend: I items with training events, S items of a support.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import scipy.linalg
from pydantic import Field

from fusionrec.config import Config
from fusionrec.data.histories import FloatArray, Histories, IntArray
from fusionrec.errors import DataError
from fusionrec.progress import bar
from fusionrec.retrieval.neighbours import profiles, top_neighbours, top_neighbours_dense
from fusionrec.retrieval.rows import CSR, SparseRows
from fusionrec.sources.blas import one_thread
from fusionrec.sources.protocol import TrainingData
from fusionrec.space import Range

_TOLD = 1000
"""Items between two steps of the bar."""


class EASE(Config):
    """Learns the regression of each item on all others, or on those that tell most of it."""

    kind: Literal["ease"] = "ease"
    regularisation: Annotated[float, Range(1, 5000, log=True)] = Field(default=50.0, gt=0)
    """The λ on the diagonal, in events."""
    max_items: int = Field(default=20_000, ge=1)
    """Items with training events up to which the inverse is dense: it takes 4 · items² bytes and a
    third of items³ multiplications, twice. With more, each is regressed on its support alone."""
    support: Annotated[int, Range(10, 200, log=True)] = Field(default=50, ge=1)
    """Items that one is regressed on where there are more than max_items. It takes support³ / 3
    multiplications an item, and searching what its support was met with."""
    max_pairs: int = Field(default=200_000_000, ge=1)
    """Pairs of items of one history, over all histories, up to which that is done: 12 bytes each,
    less where pairs come again."""

    def learn(self, data: TrainingData, neighbours: int) -> SparseRows:
        """Solve, over the items that have training events.

        Raises:
            DataError: more than ``max_items`` of them, and more than ``max_pairs`` pairs.
        """
        if not self.can_solve(data.histories):
            raise DataError(
                f"ease.max_pairs = {self.max_pairs}, but the histories hold "
                f"{num_pairs(data.histories)} pairs of items; use the source item-knn or "
                "transitions instead, or raise ease.max_pairs"
            )
        counts = np.bincount(data.histories.items, minlength=data.num_items)
        (warm,) = np.nonzero(counts)
        ones = np.ones(len(data.histories.items), dtype=np.float32)
        seen = profiles(data.histories, ones, data.num_items)[:, warm]
        seen.data[:] = 1
        gram = CSR(seen.T @ seen)
        solve = self._dense if len(warm) <= self.max_items else self._sparse
        small = solve(gram, neighbours).matrix.tocoo()
        full = type(small)((small.data, (warm[small.row], warm[small.col])), 2 * (data.num_items,))
        return top_neighbours(full.tocsr(), neighbours)

    def can_solve(self, histories: Histories) -> bool:
        """Whether there are few enough items with events, or pairs of them, in ``histories``."""
        num_warm = len(np.unique(histories.items))
        return num_warm <= self.max_items or num_pairs(histories) <= self.max_pairs

    def _dense(self, pairs: CSR, neighbours: int) -> SparseRows:
        """The closed form, from [I, I] ``pairs``."""
        gram = np.asfortranarray(pairs.toarray())
        gram[np.diag_indices_from(gram)] += np.float32(self.regularisation)
        # In place: factorise, then invert from the factor; both touch the lower triangle only.
        factor, failed = scipy.linalg.lapack.spotrf(gram, lower=1, overwrite_a=1, clean=0)
        assert failed == 0, "a Gram matrix plus a positive diagonal is positive definite"
        weights, failed = scipy.linalg.lapack.spotri(factor, lower=1, overwrite_c=1)
        assert failed == 0
        _mirror_lower(weights)
        weights /= -np.diag(weights).copy()
        weights[np.diag_indices_from(weights)] = 0
        return top_neighbours_dense(weights, neighbours)

    def _sparse(self, pairs: CSR, neighbours: int) -> SparseRows:
        """Each item on its support, from [I, I] ``pairs``."""
        pairs.sort_indices()
        num_items = pairs.shape[0]
        diagonal = pairs.diagonal() + np.float32(self.regularisation)
        supports, weights = [], []
        with one_thread(), bar("solving ease item by item", num_items) as advance:
            for item in range(num_items):
                entries = slice(pairs.indptr[item], pairs.indptr[item + 1])
                others, together = pairs.indices[entries], pairs.data[entries]
                told = np.where(others == item, 0, together * together / diagonal[others])
                best = np.sort(np.argsort(-told, kind="stable")[: self.support])
                best = best[told[best] > 0]
                supports.append(others[best])
                weights.append(self._regressed(pairs, others[best], together[best]))
                if item % _TOLD == _TOLD - 1:
                    advance(_TOLD)
        columns = np.repeat(np.arange(num_items), [len(each) for each in supports])
        found = (np.concatenate(weights), (np.concatenate(supports), columns))
        return top_neighbours(CSR(found, shape=pairs.shape), neighbours)

    def _regressed(self, pairs: CSR, support: IntArray, together: FloatArray) -> FloatArray:
        """[S] the weights of ``support`` [S], met ``together`` [S] times with the item."""
        if not len(support):
            return np.empty(0, dtype=np.float32)
        gram = np.zeros((len(support), len(support)), dtype=np.float32, order="F")
        for row, item in enumerate(support.tolist()):
            # Searched, not sliced: what a popular item was met with is most of the catalogue.
            entries = slice(pairs.indptr[item], pairs.indptr[item + 1])
            others, together_with = pairs.indices[entries], pairs.data[entries]
            found = np.minimum(np.searchsorted(others, support), len(others) - 1)
            gram[row] = np.where(others[found] == support, together_with[found], 0)
        gram[np.diag_indices_from(gram)] += np.float32(self.regularisation)
        _, weights, failed = scipy.linalg.lapack.sposv(gram, together, lower=1, overwrite_a=1)
        assert failed == 0, "a Gram matrix plus a positive diagonal is positive definite"
        result: FloatArray = weights
        return result


def num_pairs(histories: Histories) -> int:
    """Ordered pairs of events of one history, over all of them."""
    return int((histories.lengths.astype(np.int64) ** 2).sum())


def _mirror_lower(matrix: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    """Copy the lower triangle onto the upper one, in blocks that stay in the cache."""
    size = 512
    for start in range(0, len(matrix), size):
        stop = start + size
        square = matrix[start:stop, start:stop]
        square[:] = np.tril(square) + np.tril(square, -1).T
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
