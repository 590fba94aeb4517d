"""Training the autoencoder: epochs over histories until held-out events are found no better.

What is held out, and when training ends, is as in :mod:`fusionrec.sources.sequential.training`. An
epoch is a few passes in which the encoder learns, with items left out of the histories, and one in
which the decoder does, with none. It runs on the CPU; the scores of all warm items are worked out
for every history of a batch.

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
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.sequential.training import Epoch, HeldOut

_STEPS, _SMALL = 8, 16
"""Small data make so many batches a pass at least, unless they would be smaller than so many
histories."""
_SCORES = 8_000_000
"""Scores of held-out events that are there at a time (32 MB)."""
_K = 10


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


class Training:
    """A model that gets better with each :meth:`epoch`, until it is :attr:`done`."""

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
            self._model = Autoencoder(config, max(len(self._warm), 1))
        self._optimizers = [
            torch.optim.Adam(part.parameters(), lr=config.learning_rate, fused=True)
            for part in (self._model.encoder, self._model.decoder)
        ]
        self.epochs: list[Epoch] = []
        self._best = 0
        self._kept = self._state()

    @property
    def done(self) -> bool:
        """Whether another epoch would be one too many."""
        made = len(self.epochs)
        if made == self._config.epochs or not len(self._rows):
            return True
        return len(self._held_out) > 0 and made - self._best > self._config.patience

    def epoch(self) -> Epoch:
        """Learn from every history, then measure."""
        number, config = len(self.epochs), self._config
        stream = np.random.SeedSequence([config.seed, number])
        generator = np.random.default_rng(stream)
        encoder, decoder = self._optimizers
        with torch.random.fork_rng(devices=[]):  # dropout and draws are from the global one
            torch.manual_seed(int(stream.generate_state(1)[0]))
            losses = [
                loss
                for _ in range(config.encoder_passes)
                for loss in self._learn(encoder, config.dropout, generator)
            ]
            self._model.remember()
            list(self._learn(decoder, 0.0, generator))
        epoch = Epoch(float(np.mean(losses)), self._measure())
        if not self.epochs or epoch.ndcg >= self.epochs[self._best].ndcg or not len(self._held_out):
            self._best, self._kept = number, self._state()
        self.epochs.append(epoch)
        return epoch

    def learned(self) -> Learned:
        """The model after its best epoch; before the first, nothing is known of any item."""
        kept = {name: value.numpy() for name, value in self._kept.items()}
        shape = (self._num_items, self._config.hidden)
        first = np.zeros(shape, dtype=np.float32)
        vectors = np.zeros((self._num_items, self._config.factors + 1), dtype=np.float32)
        if self.epochs:
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

    def _state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._model.state_dict().items()}

    def _bags(self, histories: Histories) -> CSR:
        """[B, W] of warm items alone."""
        return bags(histories, self._config.recency, self._num_items)[:, self._warm]

    def _learn(
        self, optimizer: torch.optim.Optimizer, dropout: float, generator: np.random.Generator
    ) -> Iterator[float]:
        """One pass over all histories; the loss of each batch."""
        order = generator.permutation(self._rows)
        for start in range(0, len(order), self._batch):
            loss = self._model.loss(
                _tensors(self._matrix[order[start : start + self._batch]]), dropout=dropout
            )
            self._model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            yield loss.item()

    @torch.no_grad()
    def _measure(self) -> float:
        """NDCG@10 of the held-out events, among the warm items, the history's own apart."""
        gains = [torch.zeros(0)]
        place = np.full(self._num_items, -1, dtype=np.int64)
        place[self._warm] = np.arange(len(self._warm))
        for part in self._held_out.blocks(max(1, _SCORES // max(len(self._warm), 1))):
            asked = self._bags(part.histories)
            mean, _ = self._model.encoder(_tensors(asked))
            scores = self._model.decoder(mean)
            rows, seen = asked.nonzero()
            scores[torch.from_numpy(rows).long(), torch.from_numpy(seen).long()] = -torch.inf
            target = torch.from_numpy(place[part.targets.numpy()])
            found = scores.gather(1, target.clamp(min=0)[:, None])
            rank = 1 + (scores > found).sum(dim=1)
            hit = (rank <= _K) & (target >= 0) & ~torch.isinf(found[:, 0])
            gains.append(hit / torch.log2(rank + 1.0))
        return float(torch.cat(gains).sum()) / max(len(self._held_out), 1)


def _tensors(matrix: CSR) -> Bags:
    lengths = np.diff(matrix.indptr)
    items: CodeArray = matrix.indices
    return Bags(
        items=torch.from_numpy(items.astype(np.int64)),
        weights=torch.from_numpy(matrix.data.astype(np.float32)),
        offsets=torch.from_numpy(matrix.indptr[:-1].astype(np.int64)),
        rows=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
    )
