"""RecVAE: an autoencoder reads the items of a history and says which others belong to it.

    x̂(h)        recency ** age of each item of the history, of length 1
    z(h)        the mean of what a small network believes of x̂(h)
    score(h, c) = ⟨z(h), w(c)⟩ + b(c) − the mean of that over all items

Shenbin, Alekseev, Tutubalina, Malykh, Nikolenko, "RecVAE: A New Variational Autoencoder for Top-N
Recommendations with Implicit Feedback" (WSDM 2020): Mult-VAE (Liang, Krishnan, Hoffman, Jebara,
"Variational Autoencoders for Collaborative Filtering", WWW 2018) with a deeper encoder, a linear
decoder, a prior that holds on to what was believed before, a divergence that weighs as much as the
history is long, and encoder and decoder learning in turn. The weights by recency are not theirs.
torch trains it and is not needed after that: :mod:`fusionrec.sources.autoencoder.forward` works the
vector of a history out in numpy, also of one that training never saw.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from safetensors.numpy import load_file, save_file

from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.retrieval.index import VectorIndex, build, load
from fusionrec.retrieval.neighbours import profiles
from fusionrec.sources.answers import Nearest
from fusionrec.sources.autoencoder.config import RecVAEConfig as RecVAEConfig
from fusionrec.sources.autoencoder.forward import encode
from fusionrec.sources.blas import one_thread
from fusionrec.sources.protocol import Ranked, TrainingData

if TYPE_CHECKING:
    from fusionrec.sources.autoencoder.training import Learned
    from fusionrec.sources.epochs import Training

_FIRST, _WEIGHTS = "first.npy", "weights.safetensors"


class RecVAE:
    """Scores items by what an autoencoder makes of a history."""

    name = "recvae"

    def __init__(
        self,
        config: RecVAEConfig | None = None,
        index: VectorIndex | None = None,
        first: FloatArray | None = None,
        parameters: dict[str, FloatArray] | None = None,
    ) -> None:
        """``first``: [I, H], what each item adds to the first layer; ``parameters``: the others."""
        self.config = config or RecVAEConfig()
        self._index = index
        self._first = first
        self._parameters = parameters

    @property
    def epochs(self) -> int:
        """The most that a fit makes."""
        return self.config.epochs

    def fit(self, data: TrainingData) -> Self:
        """Train until held-out events are found no better.

        Cost of an epoch: 6 · (encoder_passes + 1) · histories · warm items · factors
        multiplications.
        """
        learned = self._training(data).run("training recvae")
        return self._of(learned, data.histories)

    def fit_in_steps(self, data: TrainingData, after: Collection[int]) -> Iterator[Self]:
        """The source as it is after each of the epochs ``after``, and after the last.

        One that ended early stays as it is.
        """
        for learned in self._training(data).in_steps(after):
            yield self._of(learned, data.histories)

    def ask(self, histories: Histories) -> Nearest:
        """Encode the histories, and search with their vectors."""
        assert self._index is not None, "recvae is not fitted"
        return Nearest(histories, self._index, self._encode(histories))

    def top(self, histories: Histories, k: int) -> Ranked:
        """The best ``k`` of the items that are above average; nothing for an empty history."""
        return self.ask(histories).top(k)

    def score(self, histories: Histories, candidates: CodeArray) -> FloatArray:
        """[B, C] scores of ``candidates``."""
        return self.ask(histories).score(candidates)

    def save(self, directory: Path) -> None:
        """Write ``config.json``, the weights, and the vectors with their index."""
        assert self._index is not None, "recvae is not fitted"
        assert self._first is not None
        assert self._parameters is not None
        self._index.save(directory)
        np.save(directory / _FIRST, self._first, allow_pickle=False)
        save_file(self._parameters, directory / _WEIGHTS)
        (directory / "config.json").write_text(self.config.model_dump_json(indent=2))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read settings and weights, memory-map what there is of every item."""
        config = RecVAEConfig.model_validate_json((directory / "config.json").read_bytes())
        first = np.load(directory / _FIRST, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        return cls(config, load(directory), first, load_file(directory / _WEIGHTS))

    def _training(self, data: TrainingData) -> Training[Learned]:
        # Here: torch is what only training needs.
        from fusionrec.sources.autoencoder.training import AutoencoderLearner
        from fusionrec.sources.epochs import Training

        return Training(AutoencoderLearner(data, self.config), self.config)

    def _of(self, learned: Learned, histories: Histories) -> Self:
        """The fitted source; ``histories`` are what an approximate index is tuned on."""
        vectors = learned.vectors
        known = vectors.any(axis=1, keepdims=True)
        centre = vectors.sum(axis=0) / np.float32(max(known.sum(), 1))
        centred = np.where(known, vectors - centre, np.float32(0))
        fitted = type(self)(self.config, None, learned.first, learned.parameters)

        def encoded(count: int) -> FloatArray:
            chosen = np.random.default_rng(self.config.index.seed).permutation(len(histories))
            return fitted._encode(histories.take(np.sort(chosen[:count])))

        fitted._index = build(centred, self.config.index, encoded)
        return fitted

    def _encode(self, histories: Histories) -> FloatArray:
        """[B, D + 1] vectors of ``histories``, 1 for the biases; zeros where nothing is known."""
        assert self._first is not None
        assert self._parameters is not None
        weights = (self.config.recency**histories.ages).astype(np.float32)
        read = profiles(histories, weights, len(self._first))
        result = np.zeros((len(histories), self.config.factors + 1), dtype=np.float32)
        with one_thread():  # for matrices this small, starting threads takes longer than they save
            for row in range(len(histories)):
                entries = slice(read.indptr[row], read.indptr[row + 1])
                items, known = self._first[read.indices[entries]], read.data[entries]
                known = np.where(items.any(axis=1), known, np.float32(0))
                if known.any():
                    result[row, :-1] = encode(
                        self._parameters, known / np.linalg.norm(known) @ items
                    )
                    result[row, -1] = 1
        return result
