"""Training in epochs, until held-out events are found no better: the loop of SASRec and RecVAE.

Of the training histories, the newest event of some is held out. After each epoch the model ranks
the catalogue for them; training ends once NDCG@10 has not risen for a while, and the weights of the
best epoch are kept.

Sources import this when they are fitted, and no earlier: it needs torch, and serving does not.

Shape legend: B histories, I items.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusionrec.data.histories import Histories
from fusionrec.progress import bar
from fusionrec.sources.held_out import hold_out
from fusionrec.sources.protocol import TrainingData

HELD_OUT = 3000
"""Most events that are held out: ranking the catalogue for them is a small part of an epoch."""
SCORES = 8_000_000
"""Scores of held-out events that are there at a time (32 MB)."""
_K = 10

L = TypeVar("L", covariant=True)


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one pass over the histories came to."""

    loss: float
    """Mean over the batches, in nats; with few negatives an estimate."""
    ndcg: float
    """NDCG@10 of the held-out events; 0 where there are none."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The newest events of some histories, and what came before them."""

    histories: Histories
    targets: Tensor
    """[B] item codes."""

    @classmethod
    def of(cls, data: TrainingData, share: float, seed: int) -> tuple[Histories, Self]:
        """The histories that are left to learn from, and what is held out of them.

        ``share`` of the events, at most ``HELD_OUT``; see :func:`hold_out`.
        """
        left, histories, targets = hold_out(data, share, HELD_OUT, seed)
        return left, cls(histories, torch.from_numpy(targets).long())

    def __len__(self) -> int:
        return len(self.histories)

    def share(self, number: int, count: int) -> Self:
        """One of ``count`` parts of about equal size."""
        rows = np.arange(number, len(self), count)
        return type(self)(self.histories.take(rows), self.targets[number::count])

    def blocks(self, size: int) -> Iterator[Self]:
        """Parts of ``size`` histories."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield type(self)(self.histories.slice(start, stop), self.targets[start:stop])


def gains(scores: Tensor, targets: Tensor) -> Tensor:
    """[B] NDCG@10 of one target each under [B, I] ``scores``; −∞ marks what is not ranked."""
    found = scores.gather(1, targets[:, None])
    rank = 1 + (scores > found).sum(dim=1)
    hit = (rank <= _K) & ~torch.isinf(found[:, 0])
    return hit / torch.log2(rank + 1.0)


class Settings(Protocol):
    """What a config of such a source says."""

    @property
    def epochs(self) -> int:
        """The most that a training makes."""
        ...

    @property
    def patience(self) -> int:
        """Epochs without a better NDCG@10 after which it ends."""
        ...

    @property
    def seed(self) -> int:
        """Of all that an epoch draws."""
        ...


class Learner(Protocol[L]):
    """A model, and how it learns."""

    @property
    def model(self) -> nn.Module:
        """Its state is what is kept of the best epoch."""
        ...

    @property
    def has_questions(self) -> bool:
        """Whether there is anything to learn from."""
        ...

    @property
    def num_held_out(self) -> int:
        """Events that :meth:`measure` looks at."""
        ...

    def learn(self, generator: np.random.Generator) -> float:
        """Learn from every history; the mean loss. Dropout draws from torch's global generator."""
        ...

    def measure(self) -> float:
        """NDCG@10 of the held-out events."""
        ...

    def learned(self, state: dict[str, Tensor] | None) -> L:
        """What serving needs of the model in that state; None: it has learned nothing yet."""
        ...


class Training(Generic[L]):
    """A model that gets better with each :meth:`epoch`, until it is :attr:`done`.

    In a torch.distributed group it is called by all ranks together; which of them learns what is
    the learner's business.
    """

    def __init__(self, learner: Learner[L], settings: Settings) -> None:
        self._learner, self._settings = learner, settings
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self.epochs: list[Epoch] = []
        self._best = 0
        self._kept: dict[str, Tensor] | None = None

    @property
    def done(self) -> bool:
        """Whether another epoch would be one too many."""
        made = len(self.epochs)
        if made == self._settings.epochs or not self._learner.has_questions:
            return True
        return self._learner.num_held_out > 0 and made - self._best > self._settings.patience

    def epoch(self) -> Epoch:
        """Learn from every history, then measure."""
        number, learner = len(self.epochs), self._learner
        stream = np.random.SeedSequence([self._settings.seed, number])
        with torch.random.fork_rng(devices=[]):  # dropout draws from the global one
            torch.manual_seed(int(stream.generate_state(1 + self._rank)[self._rank]))
            loss = learner.learn(np.random.default_rng(stream))
        epoch = Epoch(loss, learner.measure())
        best = self.epochs[self._best].ndcg if self.epochs else 0.0
        if epoch.ndcg >= best or not learner.num_held_out:
            state = learner.model.state_dict()
            self._best, self._kept = number, {name: each.clone() for name, each in state.items()}
        self.epochs.append(epoch)
        return epoch

    def learned(self) -> L:
        """What serving needs of the model after its best epoch."""
        return self._learner.learned(self._kept)

    def run(self, description: str) -> L:
        """Train to the end, under a bar that says how it goes."""
        with bar(description, self._settings.epochs) as advance:
            while not self.done:
                epoch = self.epoch()
                advance(note=f"loss {epoch.loss:.3f}, held-out NDCG@10 {epoch.ndcg:.4f}")
        return self.learned()

    def in_steps(self, after: Collection[int]) -> Iterator[L]:
        """What is learned after each of the epochs ``after``, and after the last.

        A training that ended early stays as it is.
        """
        last = self._settings.epochs
        for stop in sorted({*(epoch for epoch in after if epoch < last), last}):
            while len(self.epochs) < stop and not self.done:
                self.epoch()
            yield self.learned()
