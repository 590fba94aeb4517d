"""Collaborative predictors of a rating: what a rater that reads text is compared with.

With the ratings r_ui of N events, μ their mean:

- *biases* (Koren, KDD 2008, eq. 1 and 2): b_ui = μ + b_u + b_i, which minimise
  Σ (r_ui − b_ui)² + λ (Σ b_u² + Σ b_i²);
- *factors*: b_ui + p_u · q_i, the factors fitted to what the biases leave, e_ui = r_ui − b_ui, by
  alternating least squares with weighted regularisation (Zhou et al., AAIM 2008):
  Σ (e_ui − p_u · q_i)² + λ (Σ n_u |p_u|² + Σ n_i |q_i|²), n the ratings of a user or an item;
- *item-kNN* (Koren, eq. 3): b_ui + Σ_j s_ij e_uj / Σ_j s_ij over the k items j that u has rated and
  that are most like i. s_ij = n_ij / (n_ij + λ) ρ_ij, where ρ is the correlation of the e of those
  n_ij users who rated both; items with s ≤ 0 are left out. Without any it is b_ui.

Users and items without a rating have biases and factors of 0. Shape legend: N ratings, U users,
I items, Q questions, F factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from fusionrec.data.histories import IntArray

Reals: TypeAlias = npt.NDArray[np.float64]

_SWEEPS = 30
"""Of the biases; each is exact in its half, and they settle long before."""
_AT_ONCE = 2**15
"""Ratings whose outer products are held at once."""
_ITEMS = 64
"""Items whose likeness to all others is held at once."""


@dataclass(frozen=True, slots=True)
class Rated:
    """What is known: a rating at most for each user and item."""

    users: IntArray
    """[N]"""
    items: IntArray
    """[N]"""
    values: Reals
    """[N]"""
    shape: tuple[int, int]
    """U and I."""


@dataclass(frozen=True, slots=True)
class Biases:
    """μ + b_u + b_i."""

    mean: float
    of_users: Reals
    """[U]"""
    of_items: Reals
    """[I]"""

    @classmethod
    def fit(cls, known: Rated, *, damping: float = 5.0) -> Biases:
        """``damping`` is λ."""
        mean = float(known.values.mean())
        above = known.values - mean
        of_users, of_items = np.zeros(known.shape[0]), np.zeros(known.shape[1])
        counts = [np.bincount(each, minlength=n) + damping for each, n in _sides(known)]
        for _ in range(_SWEEPS):
            left = above - of_users[known.users]
            of_items = np.bincount(known.items, left, known.shape[1]) / counts[1]
            left = above - of_items[known.items]
            of_users = np.bincount(known.users, left, known.shape[0]) / counts[0]
        return cls(mean, of_users, of_items)

    def predict(self, users: IntArray, items: IntArray) -> Reals:
        """[Q] ratings to expect."""
        found: Reals = self.mean + self.of_users[users] + self.of_items[items]
        return found


@dataclass(frozen=True, slots=True)
class Factors:
    """Biases, and factors of what they leave."""

    biases: Biases
    of_users: Reals
    """[U, F]"""
    of_items: Reals
    """[I, F]"""

    @classmethod
    def fit(
        cls,
        known: Rated,
        biases: Biases,
        *,
        rank: int = 8,
        damping: float = 0.2,
        epochs: int = 20,
        seed: int = 0,
    ) -> Factors:
        """``rank`` is F, ``damping`` λ, ``seed`` that of the items' factors at first."""
        left = known.values - biases.predict(known.users, known.items)
        generator = np.random.default_rng(seed)
        of_items = generator.normal(scale=0.1, size=(known.shape[1], rank))
        of_users = np.zeros((known.shape[0], rank))
        for _ in range(epochs):
            of_users = _solved(known.users, of_items[known.items], left, known.shape[0], damping)
            of_items = _solved(known.items, of_users[known.users], left, known.shape[1], damping)
        return cls(biases, of_users, of_items)

    def predict(self, users: IntArray, items: IntArray) -> Reals:
        """[Q] ratings to expect."""
        found: Reals = (self.of_users[users] * self.of_items[items]).sum(axis=1)
        return self.biases.predict(users, items) + found


@dataclass(frozen=True, slots=True)
class ItemKnn:
    """Biases, and what a user gave above them to the most similar items."""

    biases: Biases
    left: csr_array
    """[U, I] e."""
    given: csr_array
    """[U, I] 1 where there is a rating, whatever is left of it."""
    neighbours: int
    shrinkage: float

    @classmethod
    def fit(
        cls, known: Rated, biases: Biases, *, neighbours: int = 40, shrinkage: float = 100.0
    ) -> ItemKnn:
        """``neighbours`` is k, ``shrinkage`` λ."""
        left = known.values - biases.predict(known.users, known.items)
        place = (known.users, known.items)
        given = csr_array((np.ones(len(left)), place), shape=known.shape)
        return cls(
            biases, csr_array((left, place), shape=known.shape), given, neighbours, shrinkage
        )

    def predict(self, users: IntArray, items: IntArray) -> Reals:
        """[Q] ratings to expect."""
        found = self.biases.predict(users, items)
        asked, rows = np.unique(items, return_inverse=True)
        for start in range(0, len(asked), _ITEMS):
            similar = self._similarities(asked[start : start + _ITEMS])
            for q in np.flatnonzero((rows >= start) & (rows < start + _ITEMS)):
                first, last = self.left.indptr[users[q] : users[q] + 2]
                others, above = self.left.indices[first:last], self.left.data[first:last]
                likeness = similar[rows[q] - start, others] * (others != items[q])
                best = np.argsort(-likeness, kind="stable")[: self.neighbours]
                best = best[likeness[best] > 0]
                if len(best):
                    found[q] += likeness[best] @ above[best] / likeness[best].sum()
        return found

    def _similarities(self, items: IntArray) -> Reals:
        """[len(items), I] s."""
        own, whole, squares = self.left[:, items].T, self.left, self.left.power(2)
        products = (own @ whole).toarray()
        common = (self.given[:, items].T @ self.given).toarray()
        norms = (squares[:, items].T @ self.given).toarray()
        norms *= (self.given[:, items].T @ squares).toarray()
        correlation = np.divide(products, np.sqrt(norms), where=norms > 0, out=np.zeros_like(norms))
        found: Reals = common / (common + self.shrinkage) * correlation
        return found


def _sides(known: Rated) -> list[tuple[IntArray, int]]:
    return [(known.users, known.shape[0]), (known.items, known.shape[1])]


def _solved(rows: IntArray, factors: Reals, left: Reals, size: int, damping: float) -> Reals:
    """[size, F] the factors of each row that fit ``left`` best, given those beside it [N, F]."""
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows, minlength=size)
    ends = np.cumsum(counts)
    rank = factors.shape[1]
    found = np.zeros((size, rank))
    present = np.flatnonzero(counts)
    while len(present):
        # As many rows as have so many ratings together, and one at least.
        before = ends[present[0]] - counts[present[0]]
        number = max(1, int(np.searchsorted(ends[present], before + _AT_ONCE, side="right")))
        chunk, present = present[:number], present[number:]
        events = order[before : ends[chunk[-1]]]
        starts = ends[chunk] - counts[chunk] - before
        each = factors[events]
        squares = np.add.reduceat(each[:, :, None] * each[:, None, :], starts)
        squares += (damping * counts[chunk])[:, None, None] * np.eye(rank)
        targets = np.add.reduceat(each * left[events, None], starts)
        found[chunk] = np.linalg.solve(squares, targets[:, :, None])[:, :, 0]
    return found
