"""iALS: matrix factorisation of implicit feedback; a history is folded in when it is asked about.

    minimise  Σ_{h, i} c(h, i) · (p(h, i) − ⟨x_h, y_i⟩)²  +  λ · (Σ_h ‖x_h‖² + Σ_i ‖y_i‖²)

    p = 1 and c = 1 + α · w for an item of the history, p = 0 and c = 1 for all others

``w`` is the recency weight of the event: ``recency ** age``, age 0 the newest. For fixed items the
minimum over one history is a linear system, so histories that training never saw are served too:

    x_h = (YᵀY + λ · 1 + Σ_e α w_e y_e y_eᵀ)⁻¹  Σ_e (1 + α w_e) y_e
    score(h, c) = ⟨x_h, y_c⟩

Hu, Koren, Volinsky, "Collaborative Filtering for Implicit Feedback Datasets" (ICDM 2008); the
items are learned by the package implicit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.sparse as sp
from pydantic import Field

from fusionrec.config import Config
from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.retrieval.halves import Stored, single
from fusionrec.retrieval.index import IndexConfig, VectorIndex, build, load
from fusionrec.retrieval.neighbours import profiles
from fusionrec.retrieval.rows import CSR
from fusionrec.sources.answers import Nearest
from fusionrec.sources.blas import one_thread
from fusionrec.sources.protocol import Ranked, TrainingData
from fusionrec.space import Range

RealArray: TypeAlias = npt.NDArray[np.float64]


class IALSConfig(Config):
    """Settings of :class:`IALS`."""

    factors: Annotated[int, Range(16, 256, log=True)] = Field(default=128, ge=1)
    """Width of the vectors."""
    regularisation: Annotated[float, Range(0.1, 1000, log=True)] = Field(default=10.0, gt=0)
    """The λ."""
    alpha: Annotated[float, Range(0.5, 200, log=True)] = Field(default=40.0, gt=0)
    """How much more a known item weighs than an unknown one."""
    recency: Annotated[float, Range(0.3, 1)] = Field(default=0.8, gt=0, le=1)
    """Weight of an event relative to the next newer one of its history; 1 forgets the order."""
    iterations: int = Field(default=15, ge=1)
    """Sweeps over users and items."""
    seed: int = 0
    """Of the vectors that the sweeps start from."""
    index: IndexConfig = IndexConfig()


class IALS:
    """Scores items by the inner product of latent vectors."""

    name = "ials"

    def __init__(
        self,
        config: IALSConfig | None = None,
        index: VectorIndex | None = None,
        gram: RealArray | None = None,
    ) -> None:
        self.config = config or IALSConfig()
        self._index = index
        self._gram = gram

    def fit(self, data: TrainingData) -> Self:
        """Alternate. Cost: iterations · (events · factors² + (users + items) · factors³) at most.

        Items without events get the zero vector: nothing was learned of them.
        """
        *_, fitted = self.fit_in_steps(data, ())
        return fitted

    @property
    def epochs(self) -> int:
        """Sweeps of a whole fit."""
        return self.config.iterations

    def fit_in_steps(self, data: TrainingData, after: Collection[int]) -> Iterator[Self]:
        """The source as it is after each of the sweeps ``after``, and after the last."""
        # Here: it loads a compiled extension that only fitting needs.
        from implicit.cpu.als import AlternatingLeastSquares

        histories, config = data.histories, self.config
        matrix = self._extra(histories, data.num_items)
        matrix.data += 1  # implicit's confidence of an entry is the entry: p is 1 where one is
        confidence = sp.csr_matrix(matrix)  # implicit knows no sparse arrays
        with one_thread():  # its threads are its own
            model = AlternatingLeastSquares(
                factors=config.factors,
                regularization=config.regularisation,
                alpha=1.0,
                random_state=config.seed,
            )
        done = 0
        for stop in sorted({*(sweep for sweep in after if sweep < self.epochs), self.epochs}):
            model.iterations, done = stop - done, stop
            with one_thread():
                model.fit(confidence, show_progress=False)  # goes on from where it was
            yield self._of(model, histories, data.num_items)

    def _of(self, model: Any, histories: Histories, num_items: int) -> Self:
        config = self.config
        factors = np.ascontiguousarray(model.item_factors, dtype=np.float32)
        factors[np.bincount(histories.items, minlength=num_items) == 0] = 0
        gram = np.asarray(factors.T @ factors, dtype=np.float64)

        def folded_in(count: int) -> FloatArray:
            chosen = np.random.default_rng(config.index.seed).permutation(len(histories))[:count]
            return self._fold_in(histories.take(np.sort(chosen)), factors, gram)

        return type(self)(config, build(factors, config.index, folded_in), gram)

    def ask(self, histories: Histories) -> Nearest:
        """Fold the histories in, and search with their vectors."""
        assert self._index is not None, "ials is not fitted"
        assert self._gram is not None
        queries = self._fold_in(histories, self._index.vectors, self._gram)
        return Nearest(histories, self._index, queries)

    def top(self, histories: Histories, k: int) -> Ranked:
        """The best ``k`` items by inner product; nothing for an empty history."""
        return self.ask(histories).top(k)

    def score(self, histories: Histories, candidates: CodeArray) -> FloatArray:
        """[B, C] inner products of ``candidates``."""
        return self.ask(histories).score(candidates)

    def _fold_in(self, histories: Histories, factors: Stored, gram: RealArray) -> FloatArray:
        """[B, factors] vectors of ``histories``; zeros where nothing is known of any item.

        One history at a time, so that its vector does not depend on who else is in the batch.
        Cost of each: events · factors² + factors³ / 3.
        """
        extra = self._extra(histories, len(factors))
        prior = gram + self.config.regularisation * np.eye(len(gram))
        vectors = np.zeros((len(histories), len(gram)), dtype=np.float32)
        with one_thread():  # for systems this small, starting threads takes ten times as long
            for row in range(len(histories)):
                entries = slice(extra.indptr[row], extra.indptr[row + 1])
                items = single(factors[extra.indices[entries]]).astype(np.float64)
                weight = extra.data[entries, None]
                if items.any():
                    system = prior + (weight * items).T @ items
                    target = ((1 + weight) * items).sum(axis=0)
                    vectors[row] = scipy.linalg.solve(system, target, assume_a="pos")
        return vectors

    def save(self, directory: Path) -> None:
        """Write ``config.json``, ``gram.npy``, and the vectors with their index."""
        assert self._index is not None, "ials is not fitted"
        assert self._gram is not None
        self._index.save(directory)
        np.save(directory / "gram.npy", self._gram, allow_pickle=False)
        (directory / "config.json").write_text(self.config.model_dump_json(indent=2))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the settings, memory-map the vectors and their index."""
        config = IALSConfig.model_validate_json((directory / "config.json").read_bytes())
        gram = np.load(directory / "gram.npy", allow_pickle=False)
        return cls(config, load(directory), gram)

    def _extra(self, histories: Histories, num_items: int) -> CSR:
        """[B, I] α · w: the confidence in the items of each history beyond that in the others."""
        weights = self.config.alpha * self.config.recency**histories.ages
        return profiles(histories, weights.astype(np.float32), num_items)
