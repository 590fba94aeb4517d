"""What is trained: a task knows its model, its examples and its loss, and nothing of the engine.

A task runs the same under every stage of ZeRO, with and without adapters, on one worker and on
many. Shape legend: P examples, B examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch

from fusionrec.data.histories import IntArray

Batch: TypeAlias = dict[str, torch.Tensor]
"""Tensors by name, on the CPU; the engine moves them to the worker's device."""


class Task(Protocol):
    """One objective over one set of examples."""

    @property
    def name(self) -> str:
        """Short, in kebab case."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that names model, examples and settings: a run resumes only with the same one.

        The weights are hashed for it, once.
        """
        ...

    @property
    def head(self) -> tuple[str, ...]:
        """Names of submodules that are trained in full even when adapters train the rest."""
        ...

    def build_model(self) -> torch.nn.Module:
        """A fresh model to train; new weights come from torch's generator, which is seeded.

        Raises:
            ModelError: the model cannot be loaded.
        """
        ...

    def plan(self, batch_size: int, generator: np.random.Generator) -> list[IntArray]:
        """The batches of one epoch in order, each as positions of examples.

        A function of the arguments alone; how many batches there are depends on the size alone.
        Workers take turns: batch i goes to worker i mod their number.
        """
        ...

    def batch(self, examples: IntArray) -> Batch:
        """[B] positions → tensors."""
        ...

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Scalar mean loss of a batch; may call the model several times."""
        ...

    def describe(self, examples: IntArray) -> list[dict[str, Any]]:
        """[B] positions → JSON for a person who asks what was in a batch."""
        ...

    def save(self, model: torch.nn.Module, directory: Path) -> None:
        """Write the trained model as it is loaded later: safetensors and JSON."""
        ...


Forward: TypeAlias = Callable[
    [Callable[[torch.nn.Module, Batch], torch.Tensor], Batch], torch.Tensor
]
"""Runs a function of model and batch through the engine, without gradients and dropout."""


@runtime_checkable
class Refreshed(Protocol):
    """A task that looks at the current model from time to time, to choose what it is shown next."""

    @property
    def refresh_every(self) -> int:
        """Optimizer steps between two looks, the first before the first step; 0 for never."""
        ...

    def refresh(self, forward: Forward, step: int) -> None:
        """Look; called by all workers together."""
        ...

    def chosen(self) -> Batch:
        """The outcome of the last look, the same on all workers; each checkpoint holds it."""
        ...

    def restore(self, chosen: Batch) -> None:
        """Go on with the outcome of an earlier look."""
        ...


def shuffled(num_examples: int, batch_size: int, generator: np.random.Generator) -> list[IntArray]:
    """A plan of full batches in random order; fewer examples than one batch are one batch."""
    order = generator.permutation(num_examples)
    full = num_examples // batch_size
    if full == 0:
        return [order] if num_examples else []
    return list(order[: full * batch_size].reshape(full, batch_size))


_DRAWS = 2**20


def with_draws(
    plan: list[IntArray], num_examples: int, generator: np.random.Generator
) -> list[IntArray]:
    """A plan whose positions carry a random number each: what an epoch makes of an example.

    Positions become ``position + num_examples · number``, so that a mask or an order that is drawn
    anew each epoch is the same again when a run is resumed.
    """
    return [batch + num_examples * generator.integers(0, _DRAWS, len(batch)) for batch in plan]


def drawn(examples: IntArray, num_examples: int) -> tuple[IntArray, IntArray]:
    """[B] positions, and [B] seeds that differ by example and epoch: of :func:`with_draws`."""
    return examples % num_examples, examples
