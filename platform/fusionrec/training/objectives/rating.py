r"""Rating prediction: a cross-encoder reads history and item and says how the user will rate it.

The user's level needs no text; the model learns what is left of it. With the rating r, the one to
be expected e (see :mod:`fusionrec.training.ratings`) and the logit s of history and item,

    loss = 1/B Σ ((r − e)/σ − s)²,    prediction = e + σ·s,

σ being the standard deviation of r − e over the examples. Regression on pairs of texts as in Devlin
et al., BERT (2019, its STS-B task); ratings from text as in Zheng et al., DeepCoNN (WSDM 2017), who
read what the user wrote and what was written of the item. Here these reviews, where they are asked
for, stand behind the texts of history and item; see :mod:`fusionrec.training.reviews` for which.

Shape legend: B examples of a batch, P examples.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fusionrec.config import Config
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import CodeArray, IntArray
from fusionrec.data.text import history_texts, item_text, with_reviews
from fusionrec.language.reranker import Reranker
from fusionrec.language.tokens import tokenize
from fusionrec.training import pieces
from fusionrec.training.examples import Examples
from fusionrec.training.objectives.settings import (
    HEAD,
    HistorySettings,
    Need,
    identity,
    named,
    part,
)
from fusionrec.training.task import Batch, shuffled

RATER = "rating.json"


class RatingSettings(HistorySettings):
    """How the rater is trained."""

    num_reviews: int = Field(0, ge=0)
    """Newest earlier reviews that are read: so many of the user's, behind the history, and so many
    that others wrote of the item (rating). They want a larger --max-tokens."""

    @property
    def needs(self) -> frozenset[Need]:
        """Histories, and what was given to the items that came next."""
        return frozenset({Need.HISTORIES, Need.RATINGS})


class RaterConfig(Config):
    """``rating.json`` beside the weights."""

    scale: float
    """σ, in the unit of the ratings."""
    num_reviews: int = 0
    """Of user and item each, that are read."""


class RatingTask:
    """See the module."""

    name = "rating"
    head = HEAD

    def __init__(self, settings: RatingSettings, catalogue: Catalogue, examples: Examples) -> None:
        assert examples.ratings is not None
        assert examples.expected is not None
        self._settings, self._catalogue, self._examples = settings, catalogue, examples
        self._rest = examples.ratings - examples.expected  # [P]
        self._scale = float(self._rest.std()) or 1.0

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See :class:`~fusionrec.training.task.Task`."""
        return identity(self.name, self._settings, self._examples.fingerprint)

    def build_model(self) -> torch.nn.Module:
        """A classifier with one logit."""
        found = Reranker.load(
            self._settings.encoder, revision=self._settings.revision, device="cpu"
        )
        self._config = found.config.model_copy(update=self._settings.limits)
        self._tokenizer = found.tokenizer
        model: torch.nn.Module = found.model
        return model

    def plan(self, batch_size: int, generator: np.random.Generator) -> list[IntArray]:
        """Random batches."""
        return shuffled(len(self._examples), batch_size, generator)

    def batch(self, examples: IntArray) -> Batch:
        """Tokens of B pairs, and [B] what the ratings are above the expected, in units of σ."""
        histories, items = self._texts(examples)
        rows = tokenize(self._tokenizer, self._config.max_tokens, histories, items)
        rest = torch.from_numpy(self._rest[examples] / self._scale).float()
        return named("pair", pieces.cut(self._tokenizer, rows, len(rows))) | {"rest": rest}

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Mean squared error in units of σ²."""
        logits = pieces.joined(lambda own: model(**own).logits, part(batch, "pair"))[:, 0].float()
        return (logits - batch["rest"]).square().mean()

    def describe(self, examples: IntArray) -> list[dict[str, Any]]:
        """The texts."""
        ratings = self._examples.ratings
        assert ratings is not None
        return [
            {"example": int(e), "history": history, "item": item, "rating": float(ratings[e])}
            for e, history, item in zip(examples, *self._texts(examples), strict=True)
        ]

    def save(self, model: torch.nn.Module, directory: Path) -> None:
        """What ``Reranker.load`` reads, and ``rating.json``."""
        Reranker(model, self._tokenizer, self._config).save(directory)
        config = RaterConfig(scale=self._scale, num_reviews=self._settings.num_reviews)
        text = config.model_dump_json() + "\n"
        (directory / RATER).write_text(text, encoding="utf-8")

    def _texts(self, examples: IntArray) -> tuple[list[str], list[str]]:
        rows = self._examples.take(examples)
        histories = history_texts(self._catalogue, rows.histories, self._settings.history_items)
        items = [item_text(self._catalogue, int(code)) for code in rows.positives]
        if rows.reviews is None:
            return histories, items
        own, others = (self._reviewed(rows.reviews[:, side]) for side in (0, 1))
        return with_reviews(histories, own), with_reviews(items, others)

    def _reviewed(self, codes: CodeArray) -> list[list[str]]:
        texts = self._examples.review_texts
        return [[texts[code] for code in row if code >= 0] for row in codes]
