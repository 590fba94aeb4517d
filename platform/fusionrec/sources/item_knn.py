"""Item-kNN: items that the same people chose.

    W[a, b] = c(a, b) / ( size(a, b) + shrinkage ),   c(a, b) = Σ over users who have both of  w(u)

The shrinkage is that of Bell & Koren (2007). With n(a) the users who have a, α = ``power``:

- cosine: size = (n(a) · n(b))^α; with α = 0.5 that of Sarwar et al. (WWW 2001).
- asymmetric-cosine: n(a)^α · n(b)^(1 − α), Aiolli, "Efficient top-n recommendation for very large
  scale binary rated datasets" (RecSys 2013); a is the item of the history.
- conditional: n(a) · n(b)^α, the conditional probability P(b | a) with frequent b damped, Deshpande
  & Karypis, "Item-based top-N recommendation algorithms" (TOIS 2004).
- jaccard: n(a) + n(b) − c(a, b), Jaccard (1901).
- tversky: c(a, b) + α' · (n(a) − c(a, b)) + β' · (n(b) − c(a, b)), Tversky, "Features of
  similarity" (Psychological Review, 1977); α' = β' = 1 is Jaccard's, 0.5 Dice's.
- bm25: s(a) · s(b), s(a) = (1 + k1 · (1 − b' + b' · n(a) / mean n)) / (1 + k1): items are texts
  whose words are users, Robertson & Zaragoza, "The Probabilistic Relevance Framework" (2009).

A user weighs w(u) = 1 / length^length_power; 0.5 there is the row normalisation of Deshpande &
Karypis. With the weighting idf it is log(I / (1 + length))², for I items and ``length`` of them in
the history, and n(a) becomes c(a, a): the cosine is then that of TF-IDF vectors, and bm25 is BM25's
product, both as in the library implicit.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import numpy as np
import scipy.sparse as sp
from pydantic import Field

from fusionrec.config import Config
from fusionrec.data.histories import FloatArray, IntArray
from fusionrec.retrieval.neighbours import profiles, top_neighbours
from fusionrec.retrieval.rows import CSR, SparseRows
from fusionrec.sources.protocol import TrainingData
from fusionrec.space import Choice, Range

Similarity: TypeAlias = Literal[
    "cosine", "asymmetric-cosine", "conditional", "jaccard", "tversky", "bm25"
]
Weighting: TypeAlias = Literal["length", "idf"]


class ItemKNN(Config):
    """Learns from which items share users."""

    kind: Literal["item-knn"] = "item-knn"
    similarity: Annotated[Similarity, Choice()] = "cosine"
    """What the users that two items share are taken relative to."""
    weighting: Annotated[Weighting, Choice()] = "length"
    """What a user with a long history counts less by: length_power, or idf, the logarithm of the
    share of the catalogue that it is."""
    shrinkage: Annotated[float, Range(0.1, 200, log=True)] = Field(default=5.0, ge=0)
    """Added to the denominator: rare pairs count less."""
    power: Annotated[float, Range(0, 1)] = Field(default=0.4, ge=0, le=1)
    """Damping of frequent items, 0.5 is the cosine; of asymmetric-cosine, that of the history's
    item, the candidate's is what is left of 1; of conditional, that of the candidate."""
    length_power: Annotated[float, Range(0, 1)] = Field(default=0.5, ge=0, le=1)
    """Damping of users with long histories; 0 counts every user alike."""
    tversky_alpha: Annotated[float, Range(0, 2)] = Field(default=0.5, ge=0)
    """Of tversky: what users count who have the history's item alone."""
    tversky_beta: Annotated[float, Range(0, 2)] = Field(default=0.5, ge=0)
    """Of tversky: what users count who have the candidate alone."""
    k1: Annotated[float, Range(0.1, 100, log=True)] = Field(default=1.2, ge=0)
    """Of bm25: how much an item with many users loses."""
    b: Annotated[float, Range(0, 1)] = Field(default=0.75, ge=0, le=1)
    """Of bm25: how far that depends on how many they are."""

    def learn(self, data: TrainingData, neighbours: int) -> SparseRows:
        """One sparse product. Cost: Σ over users of the squared history length."""
        histories = data.histories
        ones = np.ones(len(histories.items), dtype=np.float32)
        seen = profiles(histories, ones, data.num_items)
        # A user who chose an item again is still one user.
        seen.data[:] = 1
        shared = seen.copy()
        shared.data = np.repeat(self._user_weights(seen, histories.lengths), np.diff(seen.indptr))
        weights = sp.csr_array(shared.T @ seen)
        counts = self._counts(weights, np.asarray(seen.sum(axis=0)).ravel().astype(np.float32))
        weights.setdiag(0)
        weights.eliminate_zeros()
        rows = np.repeat(np.arange(data.num_items), np.diff(weights.indptr))
        sizes = self._sizes(weights.data, counts[rows], counts[weights.indices])
        weights.data /= sizes + self.shrinkage
        return top_neighbours(weights, neighbours)

    def _user_weights(self, seen: CSR, lengths: IntArray) -> FloatArray:
        """[B] w(u) of each history, of which ``lengths`` [B] counts the events."""
        if self.weighting == "length":
            weights: FloatArray = np.maximum(lengths, 1).astype(np.float32) ** -self.length_power
            return weights
        idf = np.log(seen.shape[1] / (1 + np.diff(seen.indptr)))
        return np.asarray(idf**2, dtype=np.float32)

    def _counts(self, shared: CSR, num_users: FloatArray) -> FloatArray:
        """[I] n(a), or s(a), of each item, from [I, I] c(a, b) and the users of each [I]."""
        if self.similarity == "bm25":
            relative = num_users / (float(num_users.mean()) or 1)
            size = (1 + self.k1 * (1 - self.b + self.b * relative)) / (1 + self.k1)
            return np.asarray(size, dtype=np.float32)
        return num_users if self.weighting == "length" else np.asarray(shared.diagonal())

    def _sizes(self, shared: FloatArray, own: FloatArray, other: FloatArray) -> FloatArray:
        """[E] size(a, b) of E pairs, from c(a, b), n(a) and n(b) of each."""
        match self.similarity:
            case "cosine":
                return (own * other) ** self.power
            case "asymmetric-cosine":
                return own**self.power * other ** (1 - self.power)
            case "conditional":
                return own * other**self.power
            case "jaccard":
                return own + other - shared
            case "tversky":
                alone = self.tversky_alpha * (own - shared) + self.tversky_beta * (other - shared)
                return shared + alone
            case "bm25":
                return own * other
