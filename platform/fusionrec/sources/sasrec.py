"""SASRec: a transformer reads a history in its order and says where the next item lies.

    score(h, c) = ⟨vector(h), vector(c)⟩

Kang & McAuley, "Self-Attentive Sequential Recommendation" (ICDM 2018), with what has been found
since to make it strong: the softmax over the catalogue or a large sample of it instead of one
negative (Klenitskiy & Vasilev, "Turning Dross Into Gold Loss", RecSys 2023), and the choices of
eSASRec (Tikhonovich et al., RecSys 2025) as settings. torch trains it and is not needed after that:
:mod:`fusionrec.sources.sequential.forward` works the vector of a history out in numpy.

A softmax does not see what is added to all scores alike, so the item vectors are kept centred: the
average item scores 0, and what a list may hold, positive scores, is better than that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from safetensors.numpy import load_file, save_file

from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.retrieval.halves import Stored, single
from fusionrec.retrieval.index import VectorIndex, build, load
from fusionrec.sources.answers import Nearest
from fusionrec.sources.blas import one_thread
from fusionrec.sources.protocol import Ranked, TrainingData
from fusionrec.sources.sequential.config import SASRecConfig as SASRecConfig
from fusionrec.sources.sequential.forward import Forward

if TYPE_CHECKING:
    from fusionrec.sources.epochs import Training
    from fusionrec.sources.sequential.training import Learned

_CENTRE = "centre"
_WEIGHTS = "weights.safetensors"


class SASRec:
    """Scores items by how near they are to where a transformer expects the next one."""

    name = "sasrec"

    def __init__(
        self,
        config: SASRecConfig | None = None,
        index: VectorIndex | None = None,
        weights: dict[str, FloatArray] | None = None,
    ) -> None:
        """``weights``: the blocks' parameters, and ``centre`` [D], what was taken off the items."""
        self.config = config or SASRecConfig()
        self._index = index
        self._weights = weights
        self._forward = None if weights is None else Forward.of(weights)

    @property
    def epochs(self) -> int:
        """The most that a fit makes."""
        return self.config.epochs

    def fit(self, data: TrainingData) -> Self:
        """Train until held-out events are found no better.

        Cost of an epoch: 6 · events · (parameters of the blocks + num_negatives · width)
        multiplications.
        """
        learned = self._training(data).run("training sasrec")
        return self._of(learned, data.histories)

    def fit_in_steps(self, data: TrainingData, after: Collection[int]) -> Iterator[Self]:
        """The source as it is after each of the epochs ``after``, and after the last.

        One that ended early stays as it is.
        """
        for learned in self._training(data).in_steps(after):
            yield self._of(learned, data.histories)

    @property
    def reads_item_vectors(self) -> bool:
        """Where its item vectors are made of them, too."""
        return self.config.text

    def ask(self, histories: Histories) -> Nearest:
        """Read the histories, and search with their vectors."""
        assert self._index is not None, "sasrec is not fitted"
        return Nearest(histories, self._index, self._read(histories, self._index.vectors))

    def top(self, histories: Histories, k: int) -> Ranked:
        """The best ``k`` items by inner product; nothing for an empty history."""
        return self.ask(histories).top(k)

    def score(self, histories: Histories, candidates: CodeArray) -> FloatArray:
        """[B, C] inner products of ``candidates``."""
        return self.ask(histories).score(candidates)

    def save(self, directory: Path) -> None:
        """Write ``config.json``, ``weights.safetensors``, and the vectors with their index."""
        assert self._index is not None, "sasrec is not fitted"
        assert self._weights is not None
        self._index.save(directory)
        save_file(self._weights, directory / _WEIGHTS)
        (directory / "config.json").write_text(self.config.model_dump_json(indent=2))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read settings and weights, memory-map the vectors and their index."""
        config = SASRecConfig.model_validate_json((directory / "config.json").read_bytes())
        return cls(config, load(directory), load_file(directory / _WEIGHTS))

    def _training(self, data: TrainingData) -> Training[Learned]:
        # Here: torch is what only training needs.
        from fusionrec.sources.epochs import Training
        from fusionrec.sources.sequential.training import SequentialLearner

        return Training(SequentialLearner(data, self.config), self.config)

    def _of(self, learned: Learned, histories: Histories) -> Self:
        """The fitted source; ``histories`` are what an approximate index is tuned on."""
        vectors = learned.vectors
        known = vectors.any(axis=1, keepdims=True)
        centre = vectors.sum(axis=0) / np.float32(max(known.sum(), 1))
        centred = np.where(known, vectors - centre, np.float32(0))
        fitted = type(self)(self.config, weights={**learned.weights, _CENTRE: centre})

        def read(count: int) -> FloatArray:
            chosen = np.random.default_rng(self.config.index.seed).permutation(len(histories))
            return fitted._read(histories.take(np.sort(chosen[:count])), centred)

        fitted._index = build(centred, self.config.index, read)
        return fitted

    def _read(self, histories: Histories, vectors: Stored) -> FloatArray:
        """[B, D] vectors of ``histories``; zeros where nothing is known of any item."""
        assert self._forward is not None
        assert self._weights is not None
        centre = self._weights[_CENTRE]
        result = np.zeros((len(histories), len(centre)), dtype=np.float32)
        with one_thread():  # for matrices this small, starting threads takes longer than they save
            for row in range(len(histories)):
                items = vectors[histories.row(row)[-self._forward.max_length :]]
                items = single(items[items.any(axis=1)])
                if len(items):
                    result[row] = self._forward(items + centre)
        return result
