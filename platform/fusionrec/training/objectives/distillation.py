"""Distillation: a small model learns a large one's scores of each example's list.

The teacher, a reranker of either kind, has scored the positive and the hard negatives once, before
the run. The student is a cross-encoder, or the encoder, whose scores are cosines divided by the
temperature. Margin-MSE compares differences of scores, KL the distributions over the list; formulas
and papers are in :mod:`fusionrec.training.losses.distillation`. The teacher's scores are divided by
their standard deviation over all lists, so that a student's few logits can reach their margins.

Shape legend: B examples of a batch, M negatives, C = 1 + M candidates, P ≤ B·C pairs or items.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import IntArray
from fusionrec.training.examples import Examples, lists
from fusionrec.training.losses.distillation import list_kl, margin_mse
from fusionrec.training.objectives.encoder import EncoderSettings, EncoderTask
from fusionrec.training.objectives.reranker import RerankerSettings, RerankerTask
from fusionrec.training.objectives.settings import HEAD, HistorySettings, Need, identity
from fusionrec.training.task import Batch, shuffled


class DistillationLoss(StrEnum):
    """How the student's scores are compared with the teacher's."""

    MARGIN_MSE = "margin-mse"
    KL = "kl"


class DistillationSettings(HistorySettings):
    """What learns, and how."""

    student: Literal["encoder", "reranker"] = "reranker"
    """Which model learns from the teacher (distillation)."""
    distillation_loss: DistillationLoss = DistillationLoss.MARGIN_MSE
    """margin-mse: the differences of scores; kl: the shares of a softmax over the list
    (distillation)."""
    temperature: float = Field(0.05, gt=0)
    """Divides the cosines of the encoder."""

    @property
    def needs(self) -> frozenset[Need]:
        """Lists of candidates with a teacher's scores."""
        return frozenset({Need.HISTORIES, Need.NEGATIVES, Need.TEACHER})


class DistillationTask:
    """See the module."""

    name = "distillation"

    def __init__(
        self, settings: DistillationSettings, catalogue: Catalogue, examples: Examples
    ) -> None:
        assert examples.scores is not None
        self._settings, self._catalogue, self._examples = settings, catalogue, examples
        _, exists = lists(examples)
        spread = float(examples.scores[exists].std()) or 1.0
        self._teacher = torch.from_numpy(examples.scores / spread).float()  # [P, C]
        shared = {"encoder": settings.encoder, "revision": settings.revision} | settings.limits
        self._student: EncoderTask | RerankerTask
        if settings.student == "encoder":
            own = EncoderSettings(**shared, temperature=settings.temperature)
            self._student = EncoderTask(own, catalogue, examples)
        else:
            self._student = RerankerTask(RerankerSettings(**shared), catalogue, examples)
        self.head: tuple[str, ...] = HEAD if settings.student == "reranker" else ()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See :class:`~fusionrec.training.task.Task`."""
        return identity(self.name, self._settings, self._examples.fingerprint)

    def build_model(self) -> torch.nn.Module:
        """The student's."""
        return self._student.build_model()

    def plan(self, batch_size: int, generator: np.random.Generator) -> list[IntArray]:
        """Random batches."""
        return shuffled(len(self._examples), batch_size, generator)

    def batch(self, examples: IntArray) -> Batch:
        """The lists as the student reads them, and [B, C] the teacher's scores."""
        teacher = {"teacher": self._teacher[torch.from_numpy(examples)]}
        return self._student.lists(examples) | teacher

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """The chosen distillation loss."""
        scores = self._student.scores(model, batch)
        if self._settings.distillation_loss is DistillationLoss.KL:
            return list_kl(scores, batch["teacher"], batch["exists"])
        return margin_mse(scores, batch["teacher"], batch["exists"])

    def describe(self, examples: IntArray) -> list[dict[str, Any]]:
        """The texts."""
        return self._student.describe(examples)

    def save(self, model: torch.nn.Module, directory: Path) -> None:
        """As the student's own objective does."""
        self._student.save(model, directory)
