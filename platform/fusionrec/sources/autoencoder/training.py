"""How the autoencoder learns; :mod:`fusionrec.sources.epochs` says until when.

An epoch is a few passes in which the encoder learns, with items left out of the histories, and one
in which the decoder does, with none. It runs on the CPU; the scores of all warm items are worked
out for every history of a batch.

Shape legend: B histories, I items, W warm ones, H the hidden width, D the factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.retrieval.neighbours import profiles
from fusionrec.retrieval.rows import CSR
from fusionrec.sources.autoencoder.config import RecVAEConfig
from fusionrec.sources.autoencoder.model import Autoencoder, Bags
from fusionrec.sources.epochs import SCORES, HeldOut, gains
from fusionrec.sources.protocol import TrainingData

_STEPS, _SMALL = 8, 16
"""Small data make so many batches a pass at least, unless they would be smaller than so many
histories."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What serving needs."""

    parameters: dict[str, FloatArray]
    """Of the encoder, its first layer apart, by name."""
    first: FloatArray
    """[I, H] the first layer's rows; zeros for an item without events."""
    vectors: FloatArray
    """[I, D + 1] the decoder's row and bias of each item; zeros for one without events."""


def bags(histories: Histories, recency: float, num_items: int) -> CSR:
    """[B, I] the recency of each item in each history, every row of length 1."""
    found = profiles(histories, (recency**histories.ages).astype(np.float32), num_items)
    lengths = np.sqrt(np.asarray(found.multiply(found).sum(axis=1)).ravel())
    found.data /= np.repeat(lengths, np.diff(found.indptr)).astype(np.float32)
    return found


class AutoencoderLearner:
    """The model, its histories and its optimizers."""

    def __init__(self, data: TrainingData, config: RecVAEConfig) -> None:
        self._config, self._num_items = config, data.num_items
        left, self._held_out = HeldOut.of(data, config.held_out, config.seed)
        self._warm = np.unique(left.items)
        self._matrix = self._bags(left)
        (self._rows,) = np.nonzero(np.diff(self._matrix.indptr) > 1)
        """One item alone, left out, leaves nothing to learn from."""
        self._batch = min(config.batch_size, max(_SMALL, len(self._rows) // _STEPS))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = Autoencoder(config, max(len(self._warm), 1))
        self._optimizers = [
            torch.optim.Adam(part.parameters(), lr=config.learning_rate, fused=True)
            for part in (self.model.encoder, self.model.decoder)
        ]

    @property
    def has_questions(self) -> bool:
        """Whether any history has two items."""
        return len(self._rows) > 0

    @property
    def num_held_out(self) -> int:
        """Events that the model is measured on."""
        return len(self._held_out)

    def learn(self, generator: np.random.Generator) -> float:
        """Some passes of the encoder, one of the decoder; the encoder's mean loss."""
        encoder, decoder = self._optimizers
        losses = [
            loss
            for _ in range(self._config.encoder_passes)
            for loss in self._pass(encoder, self._config.dropout, generator)
        ]
        self.model.remember()
        list(self._pass(decoder, 0.0, generator))
        return float(np.mean(losses))

    def learned(self, state: dict[str, Tensor] | None) -> Learned:
        """The model in that state; for None, nothing is known of any item."""
        kept = {n: value.numpy() for n, value in (state or self.model.state_dict()).items()}
        shape = (self._num_items, self._config.hidden)
        first = np.zeros(shape, dtype=np.float32)
        vectors = np.zeros((self._num_items, self._config.factors + 1), dtype=np.float32)
        if state is not None:
            first[self._warm] = kept["encoder.first.weight"]
            biases = kept["decoder.bias"][:, None]
            vectors[self._warm] = np.concatenate([kept["decoder.weight"], biases], axis=1)
        parameters = {
            name.removeprefix("encoder."): value
            for name, value in kept.items()
            if name.startswith("encoder.") and not name.startswith("encoder.first.")
            if "log_variance" not in name
        }
        return Learned(parameters, first, vectors)

    def _bags(self, histories: Histories) -> CSR:
        """[B, W] of warm items alone."""
        return bags(histories, self._config.recency, self._num_items)[:, self._warm]

    def _pass(
        self, optimizer: torch.optim.Optimizer, dropout: float, generator: np.random.Generator
    ) -> Iterator[float]:
        """One pass over all histories; the loss of each batch."""
        order = generator.permutation(self._rows)
        for start in range(0, len(order), self._batch):
            loss = self.model.loss(
                _tensors(self._matrix[order[start : start + self._batch]]), dropout=dropout
            )
            self.model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            yield loss.item()

    @torch.no_grad()
    def measure(self) -> float:
        """NDCG@10 of the held-out events, among the warm items, the history's own apart."""
        total = torch.zeros(1, dtype=torch.float64)
        place = np.full(self._num_items, -1, dtype=np.int64)
        place[self._warm] = np.arange(len(self._warm))
        for part in self._held_out.blocks(max(1, SCORES // max(len(self._warm), 1))):
            asked = self._bags(part.histories)
            mean, _ = self.model.encoder(_tensors(asked))
            scores = self.model.decoder(mean)
            rows, seen = asked.nonzero()
            scores[torch.from_numpy(rows).long(), torch.from_numpy(seen).long()] = -torch.inf
            target = torch.from_numpy(place[part.targets.numpy()])
            found = gains(scores, target.clamp(min=0)) * (target >= 0)
            total += found.sum(dtype=torch.float64)
        return float(total) / max(len(self._held_out), 1)


def _tensors(matrix: CSR) -> Bags:
    lengths = np.diff(matrix.indptr)
    items: CodeArray = matrix.indices
    return Bags(
        items=torch.from_numpy(items.astype(np.int64)),
        weights=torch.from_numpy(matrix.data.astype(np.float32)),
        offsets=torch.from_numpy(matrix.indptr[:-1].astype(np.int64)),
        rows=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
    )
