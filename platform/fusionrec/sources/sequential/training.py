"""Training the sequential model: epochs over histories until held-out events are found no better.

Of the training histories, the newest event of some is held out: later than all that their users
are learned from, and with timestamps, of the histories that end last. After each epoch the model
ranks the catalogue for them; training ends once NDCG@10 has not risen for a while, and the weights
of the best epoch are kept.

It runs on the CPU, on as many threads as torch has. The memory is 16 bytes for each number in the
item vectors (values, gradients, two moments of Adam), besides the best epoch's 4.

Shape legend: B histories, I items, D the width, N events of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fusionrec.data.histories import FloatArray, Histories
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.sequential.batches import Windows
from fusionrec.sources.sequential.config import SASRecConfig
from fusionrec.sources.sequential.loss import Negatives, sampled_softmax
from fusionrec.sources.sequential.model import SequentialModel

HELD_OUT = 3000
"""Most events that are held out: ranking the catalogue for them is a small part of an epoch."""
_SCORES = 8_000_000
"""Scores of held-out events that are there at a time (32 MB)."""
_STEPS, _SMALL = 32, 256
"""Small data make so many batches an epoch at least, unless they would be smaller than so many
events: an epoch of a few steps learns too little to tell whether the next will gain."""
_K = 10


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one pass over the histories came to."""

    loss: float
    """Mean over the batches, in nats; with few negatives an estimate."""
    ndcg: float
    """NDCG@10 of the held-out events; 0 where there are none."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What serving needs."""

    weights: dict[str, FloatArray]
    """The parameters of the blocks, by name."""
    vectors: FloatArray
    """[I, D]; zeros for an item of which nothing is known: neither events nor text."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The newest events of some histories, and what came before them."""

    histories: Histories
    targets: Tensor
    """[B] item codes."""

    @classmethod
    def of(cls, data: TrainingData, share: float, seed: int) -> tuple[Histories, Self]:
        """The histories that are left to learn from, and what is held out of them.

        ``share`` of the events, at most ``HELD_OUT``, from histories that a question is left of.
        """
        histories = data.histories
        (enough,) = np.nonzero(histories.lengths >= 3)
        count = min(len(enough), HELD_OUT, int(share * len(histories.items)))
        ends = histories.offsets[1:] - 1
        if data.has_timestamps:
            order = np.argsort(-histories.timestamps[ends[enough]], kind="stable")
        else:
            order = np.random.default_rng(seed).permutation(len(enough))
        chosen = np.sort(enough[order[:count]])
        keep = np.ones(len(histories.items), dtype=np.bool_)
        keep[ends[chosen]] = False
        lengths = np.bincount(histories.rows[keep], minlength=len(histories))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        left = Histories(histories.items[keep], histories.timestamps[keep], offsets)
        chosen = chosen[np.argsort(lengths[chosen], kind="stable")]  # little padding in a block
        targets = torch.from_numpy(histories.items[ends[chosen]]).long()
        return left, cls(left.take(chosen), targets)

    def __len__(self) -> int:
        return len(self.histories)

    def blocks(self, size: int) -> Iterator[Self]:
        """Parts of ``size`` histories."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield type(self)(self.histories.slice(start, stop), self.targets[start:stop])


class Training:
    """A model that gets better with each :meth:`epoch`, until it is :attr:`done`."""

    def __init__(self, data: TrainingData, config: SASRecConfig) -> None:
        self._config = config
        left, self._held_out = HeldOut.of(data, config.held_out, config.seed)
        self._windows = Windows(left, config.max_length, last_only=config.target == "last")
        self._batch_events = min(config.batch_events, max(_SMALL, len(left.items) // _STEPS))
        self._warm = torch.from_numpy(np.bincount(left.items, minlength=data.num_items) > 0)
        self._negatives = Negatives(
            left.items, data.num_items, config.num_negatives, config.popularity_share
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            texts = data.item_vectors if config.text else None
            self._model = SequentialModel(config, data.num_items, texts)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.epochs: list[Epoch] = []
        self._best = 0
        self._kept = self._state()

    @property
    def done(self) -> bool:
        """Whether another epoch would be one too many."""
        made = len(self.epochs)
        if made == self._config.epochs or not len(self._windows):
            return True
        return len(self._held_out) > 0 and made - self._best > self._config.patience

    def epoch(self) -> Epoch:
        """Learn from every question once, then measure."""
        number = len(self.epochs)
        stream = np.random.SeedSequence([self._config.seed, number])
        with torch.random.fork_rng(devices=[]):  # dropout and negatives draw from the global one
            torch.manual_seed(int(stream.generate_state(1)[0]))
            loss = self._learn(np.random.default_rng(stream))
        epoch = Epoch(loss, self._measure())
        if not self.epochs or epoch.ndcg >= self.epochs[self._best].ndcg or not len(self._held_out):
            self._best, self._kept = number, self._state()
        self.epochs.append(epoch)
        return epoch

    @torch.no_grad()
    def learned(self) -> Learned:
        """The model after its best epoch; before the first, items have no vectors but by text."""
        now = self._state()
        self._model.load_state_dict(self._kept)
        warm = self._warm if self.epochs else torch.zeros_like(self._warm)
        vectors = self._model.items.known(warm)
        self._model.load_state_dict(now)
        weights = {
            name: value.numpy()
            for name, value in self._kept.items()
            if not name.startswith("items.")
        }
        return Learned(weights, vectors.numpy())

    def _state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._model.state_dict().items()}

    def _learn(self, generator: np.random.Generator) -> float:
        model, losses = self._model.train(), []
        for batch in self._windows.batches(self._batch_events, generator):
            asked = torch.from_numpy(batch.asked)
            events = model(torch.from_numpy(batch.events))[asked]
            following = torch.from_numpy(batch.following)[asked]
            drawn, log_expected = self._negatives.draw()
            loss = sampled_softmax(
                events, following, model.items(following), drawn, model.items(drawn), log_expected
            )
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            losses.append(loss.item())
        return float(np.mean(losses))

    @torch.no_grad()
    def _measure(self) -> float:
        """NDCG@10 of the held-out events, among the items with events, the history's own apart."""
        self._model.eval()
        vectors = self._model.items.known(self._warm)
        gains = [torch.zeros(0)]
        for part in self._held_out.blocks(max(1, _SCORES // len(vectors))):
            scores = self._newest(part.histories) @ vectors.T
            scores[:, ~self._warm] = -torch.inf
            seen = torch.from_numpy(part.histories.items).long()
            scores[torch.from_numpy(part.histories.rows), seen] = -torch.inf
            found = scores.gather(1, part.targets[:, None])
            rank = 1 + (scores > found).sum(dim=1)
            hit = (rank <= _K) & ~torch.isinf(found[:, 0])
            gains.append(hit / torch.log2(rank + 1.0))
        return float(torch.cat(gains).sum()) / max(len(self._held_out), 1)

    def _newest(self, histories: Histories) -> Tensor:
        """[B, D] the vectors of the histories."""
        read = histories.newest(self._config.max_length)
        codes = torch.zeros(len(read), int(read.lengths.max()), dtype=torch.int64)
        place = torch.from_numpy(np.arange(len(read.items)) - read.offsets[read.rows])
        codes[torch.from_numpy(read.rows), place] = torch.from_numpy(read.items).long()
        events: Tensor = self._model(codes)
        return events[torch.arange(len(read)), torch.from_numpy(read.lengths - 1)]
