"""Content: items that are made of what the history's items are made of.

An item's vector is its categories, weighted by TF-IDF and brought down to ``factors`` numbers by a
truncated singular value decomposition, beside its text vector where there is one; a history is the
recency-weighted sum of its items' vectors, and scores are cosines:

    a(i)  = U_i · S        of  T ≈ U · S · Vᵀ,  T[i, g] = 1 + log((1 + I) / (1 + df(g))) if i has g
    v(i)  = [√(1 − text) · a(i) / ‖a(i)‖,  √text · x(i)] / ‖·‖
    score(h, c) = ⟨Σ_e recency ** age(e) · v(item(e)) / ‖·‖, v(c)⟩

The decomposition is latent semantic analysis (Deerwester et al., JASIS 1990): categories that occur
on the same items come to mean much the same. An item with neither categories nor text scores 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

import numpy as np
import scipy.sparse as sp
from pydantic import Field
from scipy.sparse.linalg import svds

from fusionrec.config import Config
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.errors import DataError
from fusionrec.retrieval.halves import Stored, single
from fusionrec.retrieval.index import IndexConfig, VectorIndex, build, load
from fusionrec.retrieval.rows import CSR
from fusionrec.sources.answers import Nearest
from fusionrec.sources.blas import one_thread
from fusionrec.sources.protocol import Ranked, TrainingData
from fusionrec.space import Range


class ContentConfig(Config):
    """Settings of :class:`Content`."""

    factors: Annotated[int, Range(16, 512, log=True)] = Field(default=128, ge=1)
    """Numbers that the categories of an item are brought down to; all where there are no more."""
    text: Annotated[float, Range(0, 1)] = Field(default=0.5, ge=0, le=1)
    """Part of the text vectors in the cosine, once jobs.embed has run."""
    recency: Annotated[float, Range(0.3, 1)] = Field(default=0.8, gt=0, le=1)
    """Weight of an event relative to the next newer one of its history; 1 forgets the order."""
    history_items: int = Field(default=50, ge=1)
    """Newest events that are looked at."""
    index: IndexConfig = IndexConfig()


class Content:
    """Scores items by the cosine of what they are made of."""

    name = "content"

    def __init__(self, config: ContentConfig | None = None, index: VectorIndex | None = None):
        self.config = config or ContentConfig()
        self._index = index

    def fit(self, data: TrainingData) -> Self:
        """Decompose. Cost: a few dozen products of the sparse matrix with ``factors`` vectors.

        Raises:
            DataError: no item has categories or text.
        """
        vectors = _attributes(data.catalogue, self.config.factors)
        if data.item_vectors is not None:
            shares = np.sqrt(np.array([1 - self.config.text, self.config.text], dtype=np.float32))
            parts = (shares[0] * vectors, shares[1] * np.asarray(data.item_vectors))
            vectors = _normalised(np.concatenate(parts, axis=1))
        if not vectors.any():
            raise DataError(
                "source content needs items with categories or text vectors, and there are none: "
                "leave content out of --sources"
            )

        def queries(count: int) -> FloatArray:
            chosen = np.random.default_rng(self.config.index.seed).permutation(len(data.histories))
            return self._profiles(data.histories.take(np.sort(chosen[:count])), vectors)

        return type(self)(self.config, build(vectors, self.config.index, queries))

    @property
    def reads_item_vectors(self) -> bool:
        """Where they have a part in the cosine."""
        return self.config.text > 0

    def ask(self, histories: Histories) -> Nearest:
        """Search with the histories' profiles."""
        assert self._index is not None, "content is not fitted"
        return Nearest(histories, self._index, self._profiles(histories, self._index.vectors))

    def top(self, histories: Histories, k: int) -> Ranked:
        """The best ``k`` items by cosine; nothing for an empty history."""
        return self.ask(histories).top(k)

    def score(self, histories: Histories, candidates: CodeArray) -> FloatArray:
        """[B, C] cosines of ``candidates``."""
        return self.ask(histories).score(candidates)

    def save(self, directory: Path) -> None:
        """Write ``config.json``, and the vectors with their index."""
        assert self._index is not None, "content is not fitted"
        self._index.save(directory)
        (directory / "config.json").write_text(self.config.model_dump_json(indent=2))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the settings, memory-map the vectors and their index."""
        config = ContentConfig.model_validate_json((directory / "config.json").read_bytes())
        return cls(config, load(directory))

    def _profiles(self, histories: Histories, vectors: Stored) -> FloatArray:
        """[B, D] profiles of length 1; zeros where nothing is known of any item.

        One history at a time, so that its profile does not depend on who else is in the batch.
        """
        newest = histories.newest(self.config.history_items)
        weights = (self.config.recency**newest.ages).astype(np.float32)
        profiles = np.zeros((len(newest), vectors.shape[1]), dtype=np.float32)
        with one_thread():  # for products this small, starting threads takes longer than they save
            for row in range(len(newest)):
                events = slice(newest.offsets[row], newest.offsets[row + 1])
                items = single(vectors[newest.items[events]])
                profiles[row] = weights[events] @ items
        return _normalised(profiles)


def _attributes(catalogue: Catalogue, factors: int) -> FloatArray:
    """[I, factors] the categories of the items, of length 1; zeros for an item without any."""
    matrix = _weighted(catalogue)
    if factors >= min(matrix.shape):
        return _normalised(matrix.toarray())
    # From a fixed start, so that the same catalogue gives the same vectors.
    start = np.random.default_rng(0).random(min(matrix.shape))
    left, sizes, _ = svds(matrix.astype(np.float64), k=factors, v0=start)
    return _normalised((left * sizes).astype(np.float32))


def _weighted(catalogue: Catalogue) -> CSR:
    """[I, G] the inverse document frequency of each category that an item has."""
    names: dict[str, int] = {}
    rows = [sorted({names.setdefault(n, len(names)) for n in row}) for row in catalogue.categories]
    indptr = np.cumsum([0, *(len(row) for row in rows)])
    columns = np.array([code for row in rows for code in row], dtype=np.int32)
    frequency = np.bincount(columns, minlength=len(names))
    rarity = 1 + np.log((1 + len(rows)) / (1 + frequency))
    values = rarity[columns].astype(np.float32)
    return sp.csr_array((values, columns, indptr), shape=(len(rows), len(names)))


def _normalised(vectors: FloatArray) -> FloatArray:
    """Rows of length 1; those of zeros, and of nothing but rounding, become zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled = vectors / np.maximum(lengths, np.float32(1e-6))
    return np.where(lengths > 1e-6, scaled, np.float32(0)).astype(np.float32, copy=False)
