"""The reranker: what came next above hard negatives, in each example's list of 1 + M items.

A cross-encoder reads history and candidate together and gives one logit; the lists are scored
jointly, and one of three losses compares them: listwise softmax, pairwise logistic (RankNet, BPR)
or pointwise logistic. Formulas and papers are with them, in :mod:`fusionrec.training.losses`.

Shape legend: B examples of a batch, M negatives, C = 1 + M candidates, P ≤ B·C pairs.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import IntArray
from fusionrec.data.text import history_texts, item_text
from fusionrec.language.reranker import Reranker
from fusionrec.language.tokens import tokenize
from fusionrec.training import pieces
from fusionrec.training.examples import Examples, lists
from fusionrec.training.losses.listwise import listwise_softmax
from fusionrec.training.losses.pairwise import pairwise_logistic
from fusionrec.training.losses.pointwise import pointwise_logistic
from fusionrec.training.objectives.settings import (
    HEAD,
    HistorySettings,
    Need,
    identity,
    named,
    part,
)
from fusionrec.training.task import Batch, shuffled


class RankingLoss(StrEnum):
    """How a list's scores are compared with what came next."""

    LISTWISE = "listwise"
    PAIRWISE = "pairwise"
    POINTWISE = "pointwise"


class RerankerSettings(HistorySettings):
    """How the reranker is trained."""

    ranking_loss: RankingLoss = RankingLoss.LISTWISE
    """listwise: softmax over the list; pairwise: each negative below the positive; pointwise: each
    candidate by itself (reranker)."""

    @property
    def needs(self) -> frozenset[Need]:
        """Lists of candidates."""
        return frozenset({Need.HISTORIES, Need.NEGATIVES})


class RerankerTask:
    """See the module."""

    name = "reranker"
    head = HEAD

    def __init__(
        self, settings: RerankerSettings, catalogue: Catalogue, examples: Examples
    ) -> None:
        assert examples.negatives.shape[1] > 0
        self._settings, self._catalogue, self._examples = settings, catalogue, examples

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See :class:`~fusionrec.training.task.Task`."""
        return identity(self.name, self._settings, self._examples.fingerprint)

    def build_model(self) -> torch.nn.Module:
        """A classifier with one logit."""
        found = Reranker.load(
            self._settings.encoder, revision=self._settings.revision, device="cpu"
        )
        self._tokenizer = found.tokenizer
        self._config = found.config.model_copy(update=self._settings.limits)
        model: torch.nn.Module = found.model
        return model

    def plan(self, batch_size: int, generator: np.random.Generator) -> list[IntArray]:
        """Random batches."""
        return shuffled(len(self._examples), batch_size, generator)

    def batch(self, examples: IntArray) -> Batch:
        """Tokens of P pairs, the positive of each list first, and which of [B, C] exist."""
        rows = self._examples.take(examples)
        codes, exists = lists(rows)
        histories = history_texts(self._catalogue, rows.histories, self._settings.history_items)
        owners, places = np.nonzero(exists)
        rows_of_tokens = tokenize(
            self._tokenizer,
            self._config.max_tokens,
            [histories[row] for row in owners],
            [item_text(self._catalogue, int(code)) for code in codes[owners, places]],
        )
        # Of each list there are two pairs at least.
        pairs = pieces.cut(self._tokenizer, rows_of_tokens, 2 * len(rows))
        return named("pair", pairs) | {"exists": torch.from_numpy(exists)}

    def lists(self, examples: IntArray) -> Batch:
        """What :meth:`scores` reads: here the whole batch."""
        return self.batch(examples)

    def scores(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """[B, C] logits; 0 where there is no candidate."""
        exists = batch["exists"]
        logits = pieces.joined(lambda own: model(**own).logits, part(batch, "pair"))[:, 0].float()
        return torch.zeros(exists.shape, device=logits.device).masked_scatter(exists, logits)

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """The chosen ranking loss."""
        return ranking_loss(self._settings.ranking_loss, self.scores(model, batch), batch["exists"])

    def describe(self, examples: IntArray) -> list[dict[str, Any]]:
        """The texts."""
        return described(self._catalogue, self._examples, examples, self._settings.history_items)

    def save(self, model: torch.nn.Module, directory: Path) -> None:
        """What ``Reranker.load`` reads."""
        Reranker(model, self._tokenizer, self._config).save(directory)


def ranking_loss(kind: RankingLoss, scores: Tensor, exists: Tensor) -> Tensor:
    """The loss of [B, C] scores of lists whose first candidate came next."""
    first = torch.zeros_like(scores)
    first[:, 0] = 1.0
    losses = {
        RankingLoss.LISTWISE: listwise_softmax,
        RankingLoss.PAIRWISE: pairwise_logistic,
        RankingLoss.POINTWISE: pointwise_logistic,
    }
    return losses[kind](scores, first, exists)


def described(
    catalogue: Catalogue, examples: Examples, positions: IntArray, history_items: int
) -> list[dict[str, Any]]:
    """The texts of examples with negatives."""
    rows = examples.take(positions)
    histories = history_texts(catalogue, rows.histories, history_items)
    return [
        {
            "example": int(position),
            "history": histories[row],
            "item": item_text(catalogue, int(rows.positives[row])),
            "negatives": [item_text(catalogue, int(c)) for c in rows.negatives[row] if c >= 0],
        }
        for row, position in enumerate(positions)
    ]
