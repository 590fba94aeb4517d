"""How the sequential model learns, alone or in several processes.

Until when is said by :mod:`fusionrec.sources.epochs`. In a torch.distributed group every rank holds
the model and the data. A batch is the same on all of them, and its negatives are; each rank learns
from its share of the windows, and the gradients are added up before the step. So the steps are
those of one process, up to rounding and dropout. What travels in a step is a gradient of every
parameter: 4 bytes for each number in the item vectors.

What is measured and served is a running mean of the parameters over the steps, in which the noise
of single steps cancels.

It runs on the CPU, on as many threads as torch has. The memory is 20 bytes for each number in the
item vectors (values, gradients, two moments of Adam, the mean), besides the best epoch's 4.

Shape legend: B histories, I items, D the width, N events of a batch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fusionrec.data.histories import FloatArray, Histories
from fusionrec.sources.epochs import SCORES, HeldOut, gains
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.sequential.batches import Batch, Windows
from fusionrec.sources.sequential.config import SASRecConfig
from fusionrec.sources.sequential.loss import Negatives, sampled_softmax
from fusionrec.sources.sequential.model import SequentialModel

_STEPS, _SMALL = 32, 256
"""Small data make so many batches an epoch at least, unless they would be smaller than so many
events: an epoch of a few steps learns too little to tell whether the next will gain."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What serving needs."""

    weights: dict[str, FloatArray]
    """The parameters of the blocks, by name."""
    vectors: FloatArray
    """[I, D]; zeros for an item of which nothing is known: neither events nor text."""


class SequentialLearner:
    """The model, its batches and its optimizer; where there are ranks, all call it together."""

    def __init__(self, data: TrainingData, config: SASRecConfig) -> None:
        self._config = config
        self._rank, self._num_ranks = 0, 1
        if dist.is_initialized():
            self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
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
            self._learning = SequentialModel(config, data.num_items, texts)
        if self._num_ranks > 1:
            # A start from texts takes eigenvectors, whose signs differ between kinds of CPUs.
            for parameter in self._learning.parameters():
                dist.broadcast(parameter.data, 0)
        # All but the texts, which may be a mapped file.
        self.model = copy.deepcopy(self._learning, {id(texts): texts})
        self._steps = 0
        self._optimizer = torch.optim.AdamW(
            self._learning.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )

    @property
    def has_questions(self) -> bool:
        """Whether any history has two events."""
        return len(self._windows) > 0

    @property
    def num_held_out(self) -> int:
        """Events that the model is measured on."""
        return len(self._held_out)

    def learn(self, generator: np.random.Generator) -> float:
        """Learn from every question once; the mean loss of the batches."""
        self._learning.train()
        losses = []
        for batch in self._windows.batches(self._batch_events, generator):
            drawn = self._negatives.draw(generator)
            num_asked = int(batch.asked.sum())
            losses.append(self._step(batch.share(self._rank, self._num_ranks), num_asked, drawn))
        return float(self._sum(torch.tensor(losses, dtype=torch.float64)).mean())

    def _step(self, batch: Batch, num_asked: int, drawn: tuple[Tensor, Tensor]) -> float:
        """Learn from a batch, of which this rank has a share; its part in the mean loss."""
        model, loss = self._learning, 0.0
        self._optimizer.zero_grad()
        if len(batch.asked):
            asked = torch.from_numpy(batch.asked)
            events = model(torch.from_numpy(batch.events))[asked]
            following = torch.from_numpy(batch.following)[asked]
            codes, log_expected = drawn
            part = sampled_softmax(
                events, following, model.items(following), codes, model.items(codes), log_expected
            ) * (len(following) / num_asked)
            part.backward()  # type: ignore[no-untyped-call]
            loss = part.item()
        if self._num_ranks > 1:
            for parameter in model.parameters():
                if parameter.grad is None:  # a batch of fewer windows than ranks
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
        self._optimizer.step()
        self._average()
        return loss

    @torch.no_grad()
    def _average(self) -> None:
        """Take a step's parameters into the mean; of few steps, the first count for little."""
        past = min(self._config.averaging, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        pairs = zip(self.model.parameters(), self._learning.parameters(), strict=True)
        for mean, now in pairs:
            mean.lerp_(now, 1 - past)

    def _sum(self, values: Tensor) -> Tensor:
        """``values`` added up over the ranks, in place."""
        if self._num_ranks > 1:
            dist.all_reduce(values)
        return values

    @torch.no_grad()
    def learned(self, state: dict[str, Tensor] | None) -> Learned:
        """The model in that state; for None, items have no vectors but by text."""
        now = {name: value.clone() for name, value in self.model.state_dict().items()}
        kept = now if state is None else state
        self.model.load_state_dict(kept)
        vectors = self.model.items.known(
            torch.zeros_like(self._warm) if state is None else self._warm
        )
        self.model.load_state_dict(now)
        weights = {
            name: value.numpy() for name, value in kept.items() if not name.startswith("items.")
        }
        return Learned(weights, vectors.numpy())

    @torch.no_grad()
    def measure(self) -> float:
        """NDCG@10 of the held-out events, among the items with events, the history's own apart."""
        self.model.eval()
        vectors = self.model.items.known(self._warm)
        total = torch.zeros(1, dtype=torch.float64)
        own = self._held_out.share(self._rank, self._num_ranks)
        for part in own.blocks(max(1, SCORES // len(vectors))):
            scores = self._newest(part.histories) @ vectors.T
            scores[:, ~self._warm] = -torch.inf
            seen = torch.from_numpy(part.histories.items).long()
            scores[torch.from_numpy(part.histories.rows), seen] = -torch.inf
            total += gains(scores, part.targets).sum(dtype=torch.float64)
        return float(self._sum(total)) / max(len(self._held_out), 1)

    def _newest(self, histories: Histories) -> Tensor:
        """[B, D] the vectors of the histories."""
        read = histories.newest(self._config.max_length)
        codes = torch.zeros(len(read), int(read.lengths.max()), dtype=torch.int64)
        place = torch.from_numpy(np.arange(len(read.items)) - read.offsets[read.rows])
        codes[torch.from_numpy(read.rows), place] = torch.from_numpy(read.items).long()
        events: Tensor = self.model(codes)
        return events[torch.arange(len(read)), torch.from_numpy(read.lengths - 1)]
