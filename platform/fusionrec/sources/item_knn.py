"""Item-kNN: items that the same people chose.

    W[a, b] = c(a, b) / ( (count(a) · count(b))^power + shrinkage )

with c(a, b) = Σ over users who have both of  1 / history length^length_power. ``power=0.5`` and
``length_power=0`` is the cosine of Sarwar et al. (2001), with the shrinkage of Bell & Koren (2007).
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import scipy.sparse as sp
from pydantic import Field

from fusionrec.config import Config
from fusionrec.retrieval.neighbours import profiles, top_neighbours
from fusionrec.retrieval.rows import SparseRows
from fusionrec.sources.protocol import TrainingData
from fusionrec.space import Range


class ItemKNN(Config):
    """Learns from which items share users."""

    kind: Literal["item-knn"] = "item-knn"
    shrinkage: Annotated[float, Range(0.1, 200, log=True)] = Field(default=5.0, ge=0)
    """Added to the denominator: rare pairs count less."""
    power: Annotated[float, Range(0, 1)] = Field(default=0.4, ge=0, le=1)
    """Damping of frequent items; 0.5 is the cosine."""
    length_power: Annotated[float, Range(0, 1)] = Field(default=0.5, ge=0, le=1)
    """Damping of users with long histories; 0 counts every user alike."""

    def learn(self, data: TrainingData, neighbours: int) -> SparseRows:
        """One sparse product. Cost: Σ over users of the squared history length."""
        histories = data.histories
        ones = np.ones(len(histories.items), dtype=np.float32)
        seen = profiles(histories, ones, data.num_items)
        seen.data[:] = 1
        shared = seen.copy()
        # A user who chose an item again is still one user.
        shared.data = np.repeat(
            np.maximum(histories.lengths, 1).astype(np.float32) ** -self.length_power,
            np.diff(shared.indptr),
        )
        weights = sp.csr_array(shared.T @ seen)
        weights.setdiag(0)
        weights.eliminate_zeros()
        counts = np.asarray(seen.sum(axis=0)).ravel().astype(np.float32)
        rows = np.repeat(np.arange(data.num_items), np.diff(weights.indptr))
        damping = (counts[rows] * counts[weights.indices]) ** self.power
        weights.data /= damping + self.shrinkage
        return top_neighbours(weights, neighbours)
