r"""Several objectives at once over one transformer, each with a head of its own where it has one.

A batch holds a batch of every objective. With weights w_t, given or equal, loss = Σ w_t·L_t. With
uncertainty weighting each objective has a learned log variance s_t, from 0,

    loss = Σ_t exp(−s_t)·L_t + s_t / 2,

so that an objective whose loss stays high is trusted less (Kendall, Gal & Cipolla: Multi-task
learning using uncertainty to weigh losses, CVPR 2018; their form for classification, for all).

Shape legend: B examples of a batch, of each objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import IntArray
from fusionrec.errors import ConfigError
from fusionrec.training.examples import Examples
from fusionrec.training.objectives.decoder import DecoderSettings, DecoderTask
from fusionrec.training.objectives.distillation import DistillationSettings, DistillationTask
from fusionrec.training.objectives.encoder import EncoderSettings, EncoderTask
from fusionrec.training.objectives.pretraining import PretrainingSettings, PretrainingTask
from fusionrec.training.objectives.rating import RatingSettings, RatingTask
from fusionrec.training.objectives.reranker import RerankerSettings, RerankerTask
from fusionrec.training.objectives.settings import Need, TaskSettings, given, named, part
from fusionrec.training.task import Batch, Forward, Task


class Part(StrEnum):
    """What can be combined."""

    ENCODER = "encoder"
    RERANKER = "reranker"
    DECODER = "decoder"
    PRETRAINING = "pretraining"
    RATING = "rating"
    DISTILLATION = "distillation"


class MultiTaskSettings(
    EncoderSettings,
    RerankerSettings,
    DecoderSettings,
    PretrainingSettings,
    RatingSettings,
    DistillationSettings,
):
    """What is combined, and how; each objective is told what it is told alone."""

    objectives: tuple[Part, ...] = Field((Part.ENCODER, Part.PRETRAINING), min_length=2)
    """What is trained at once: encoder, reranker, pretraining, rating, distillation; or decoder and
    pretraining (multi-task)."""
    objective_weights: tuple[float, ...] | None = None
    """A factor for the loss of each objective; by default they are learned (multi-task)."""

    @field_validator("objectives")
    @classmethod
    def _each_once(cls, objectives: tuple[Part, ...]) -> tuple[Part, ...]:
        if len(set(objectives)) < len(objectives):
            raise ValueError("an objective is named twice")
        return objectives

    @field_validator("objective_weights")
    @classmethod
    def _one_for_each(
        cls, weights: tuple[float, ...] | None, info: ValidationInfo
    ) -> tuple[float, ...] | None:
        count = len(info.data.get("objectives", weights or ()))
        if weights is not None and len(weights) != count:
            raise ValueError(f"there are {count} objectives: give a weight for each")
        return weights

    @property
    def needs(self) -> frozenset[Need]:
        """What any of the objectives does."""
        return frozenset[Need]().union(*(self.of(part).needs for part in self.objectives))

    @property
    def read(self) -> frozenset[str]:
        """What the chosen objectives read, and how they are combined."""
        own = MultiTaskSettings.__annotations__
        return frozenset(own).union(*(self.of(part).read for part in self.objectives))

    @property
    def compares_batch(self) -> bool:
        """Where the encoder's objective is among them."""
        return Part.ENCODER in self.objectives

    def of(self, part: Part) -> TaskSettings:
        """The settings of one objective."""
        kind = _PARTS[part][0]
        return kind(**{name: getattr(self, name) for name in kind.model_fields})

    def refuse_misfits(self) -> None:
        """Refuse what does not go around one transformer.

        Raises:
            ConfigError: names the setting.
        """
        others = set(self.objectives) - {Part.DECODER, Part.PRETRAINING}
        if Part.DECODER in self.objectives and others:
            raise ConfigError(
                f"setting objectives = {','.join(self.objectives)} is wrong: a decoder has its "
                f"transformer in common with pretraining alone, and {min(others)} reads with an "
                "encoder; set --objectives decoder,pretraining, or leave decoder out"
            )
        if self.towers > 1:
            raise ConfigError(
                f"setting towers = {self.towers} is wrong: several objectives have one transformer "
                "in common; leave --towers out, or give --task encoder"
            )


_PARTS: dict[Part, tuple[type[TaskSettings], Any]] = {
    Part.ENCODER: (EncoderSettings, EncoderTask),
    Part.RERANKER: (RerankerSettings, RerankerTask),
    Part.DECODER: (DecoderSettings, DecoderTask),
    Part.PRETRAINING: (PretrainingSettings, PretrainingTask),
    Part.RATING: (RatingSettings, RatingTask),
    Part.DISTILLATION: (DistillationSettings, DistillationTask),
}


class MultiTask:
    """See the module."""

    name = "multi-task"

    def __init__(
        self,
        settings: MultiTaskSettings,
        catalogue: Catalogue,
        examples: Examples | None = None,
        reviews: Sequence[str] = (),
    ) -> None:
        """Make the task of each objective.

        Raises:
            ConfigError: they do not go around one transformer.
        """
        settings.refuse_misfits()
        self._weights = settings.objective_weights
        self._tasks: list[Task] = []
        for each in settings.objectives:
            own = settings.of(each)
            self._tasks.append(
                _PARTS[each][1](own, catalogue, **given(own.needs, examples, reviews))
            )
        self._refreshed = [task for task in self._tasks if isinstance(task, EncoderTask)]
        self.head = tuple({part for task in self._tasks for part in task.head} | {"log_variances"})

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See :class:`~fusionrec.training.task.Task`."""
        found: dict[str, Any] = {task.name: task.identity for task in self._tasks}
        return found | {"weights": None if self._weights is None else list(self._weights)}

    def build_model(self) -> torch.nn.Module:
        """The objectives' models, around one transformer."""
        return _Shared(
            {task.name: task.build_model() for task in self._tasks}, learned=self._weights is None
        )

    def plan(self, batch_size: int, generator: np.random.Generator) -> list[IntArray]:
        """Batches of [T, B] positions, a row an objective; the longest plan decides how many."""
        plans = [task.plan(batch_size, generator) for task in self._tasks]
        longest = max(map(len, plans))
        size = min(len(plan[0]) for plan in plans)
        return [
            np.stack([plan[index % len(plan)][:size] for plan in plans]) for index in range(longest)
        ]

    def batch(self, examples: IntArray) -> Batch:
        """The batches of all objectives, under their names."""
        found: Batch = {}
        for task, positions in zip(self._tasks, examples, strict=True):
            found |= named(task.name, task.batch(positions))
        return found

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """See the module."""
        shared = cast("_Shared", model)
        losses = torch.stack(
            [task.loss(shared.of(task.name), part(batch, task.name)) for task in self._tasks]
        )
        if self._weights is not None:
            return (losses * torch.tensor(self._weights, device=losses.device)).sum()
        return (torch.exp(-shared.log_variances) * losses + shared.log_variances / 2).sum()

    def describe(self, examples: IntArray) -> list[dict[str, Any]]:
        """The texts of all objectives."""
        return [
            {"objective": task.name} | row
            for task, positions in zip(self._tasks, examples, strict=True)
            for row in task.describe(positions)
        ]

    @property
    def refresh_every(self) -> int:
        """See :class:`~fusionrec.training.task.Refreshed`; of the one objective that looks."""
        return max(task.refresh_every for task in self._refreshed) if self._refreshed else 0

    def refresh(self, forward: Forward, step: int) -> None:
        """Let the objective that looks at the current model look at its own part of it."""
        for task in self._refreshed:

            def own(
                function: Callable[[torch.nn.Module, Batch], Tensor],
                batch: Batch,
                name: str = task.name,
            ) -> Tensor:
                return forward(
                    lambda model, given: function(cast("_Shared", model).of(name), given), batch
                )

            task.refresh(own, step)

    def chosen(self) -> Batch:
        """What the objectives that looked chose, under their names."""
        found: Batch = {}
        for task in self._refreshed:
            found |= named(task.name, task.chosen())
        return found

    def restore(self, chosen: Batch) -> None:
        """The inverse of :meth:`chosen`."""
        for task in self._refreshed:
            task.restore(part(chosen, task.name))

    def save(self, model: torch.nn.Module, directory: Path) -> None:
        """A folder an objective, each with a copy of the transformer."""
        shared = cast("_Shared", model)
        for task in self._tasks:
            task.save(shared.of(task.name), directory / task.name)


class _Shared(torch.nn.Module):
    """Models that share what architectures call their base model."""

    def __init__(self, models: dict[str, torch.nn.Module], *, learned: bool) -> None:
        super().__init__()
        # The one with most parts has the pooler that a classifier needs and others lack.
        trunk = max(map(_base, models.values()), key=lambda model: len(list(model.parameters())))
        for name, model in models.items():
            if _base(model) is model:
                models[name] = trunk
            else:
                setattr(model, str(model.base_model_prefix), trunk)
                cast("Any", model).tie_weights()  # a masked model's output to the new embeddings
        # Two language models over one transformer are one.
        speaking: list[Any] = [m for m in models.values() if _output(m) is not None]
        for model in speaking[1:]:
            model.set_output_embeddings(_output(speaking[0]))
        self.models = torch.nn.ModuleDict(models)
        if learned:
            self.log_variances = torch.nn.Parameter(torch.zeros(len(models)))

    def of(self, name: str) -> torch.nn.Module:
        return self.models[name]


def _base(model: torch.nn.Module) -> torch.nn.Module:
    found: torch.nn.Module = getattr(model, str(model.base_model_prefix), model)
    return found


def _output(model: Any) -> torch.nn.Module | None:
    found: torch.nn.Module | None = model.get_output_embeddings()
    return found
