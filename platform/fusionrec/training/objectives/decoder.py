"""The decoder as reranker: it answers with the letter of what came next, or with yes or no.

With letters the loss is the softmax over the logits of the letters in the prompt, at the place of
the answer: LlamaRec's cross-entropy, restricted to the given candidates as its scores are. The
candidates are put in a new random order each epoch, so that their places carry no hint. With
yes-no it is the pointwise logistic loss of logit(Yes) − logit(No), as in TALLRec; where the
architecture allows it, a history is computed once for all its candidates
(:mod:`fusionrec.training.prefixes`). Prompts and papers: :mod:`fusionrec.language.decoder`.

Shape legend: B examples of a batch, M negatives, C = 1 + M candidates, P ≤ B·C prompts.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import IntArray
from fusionrec.data.text import history_texts, item_text
from fusionrec.errors import ConfigError
from fusionrec.language.decoder import (
    LETTERS,
    DecoderConfig,
    DecoderReranker,
    Prompt,
    answer_logits,
)
from fusionrec.training import pieces, prefixes
from fusionrec.training.examples import Examples, lists
from fusionrec.training.losses.listwise import listwise_softmax
from fusionrec.training.objectives.reranker import RankingLoss, described, ranking_loss
from fusionrec.training.objectives.settings import HistorySettings, Need, identity, named, part
from fusionrec.training.task import Batch, drawn, shuffled, with_draws


class DecoderSettings(HistorySettings):
    """How the decoder is trained."""

    prompt: Prompt = Prompt.LETTERS
    """letters: all candidates in one prompt, which answers with a letter; yes-no: a prompt for each
    candidate (decoder)."""
    orders: int = Field(1, ge=1)
    """Prompts with the candidates in so many orders, whose logits are averaged when it is served
    (decoder with letters)."""

    @property
    def needs(self) -> frozenset[Need]:
        """Lists of candidates."""
        return frozenset({Need.HISTORIES, Need.NEGATIVES})


class DecoderTask:
    """See the module."""

    name = "decoder"
    head: tuple[str, ...] = ()

    def __init__(self, settings: DecoderSettings, catalogue: Catalogue, examples: Examples) -> None:
        """Take what is trained on.

        Raises:
            ConfigError: more candidates than letters.
        """
        num_candidates = 1 + examples.negatives.shape[1]
        if settings.prompt is Prompt.LETTERS and num_candidates > len(LETTERS):
            raise ConfigError(
                f"setting num_negatives = {num_candidates - 1} is wrong: a prompt has "
                f"{len(LETTERS)} letters; set --num-negatives {len(LETTERS) - 1} or less"
            )
        self._settings, self._catalogue, self._examples = settings, catalogue, examples

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See :class:`~fusionrec.training.task.Task`."""
        return identity(self.name, self._settings, self._examples.fingerprint)

    def build_model(self) -> torch.nn.Module:
        """The decoder with its language model head."""
        settings = self._settings
        config = DecoderConfig(
            model=settings.encoder,
            revision=settings.revision,
            prompt=settings.prompt,
            orders=settings.orders,
            **settings.limits,
        )
        found = DecoderReranker.load(
            settings.encoder, revision=settings.revision, device="cpu", config=config
        )
        self._prompts = found.prompts
        yes_no = settings.prompt is Prompt.YES_NO
        self._shares = yes_no and prefixes.shares(found.model)
        model: torch.nn.Module = found.model
        return model

    def plan(self, batch_size: int, generator: np.random.Generator) -> list[IntArray]:
        """Random batches, and a random order of each example's candidates."""
        return with_draws(
            shuffled(len(self._examples), batch_size, generator), len(self._examples), generator
        )

    def batch(self, examples: IntArray) -> Batch:
        """Tokens of P prompts, or of B rows of them, and which candidates exist [B, C].

        With letters, the place of the answer [B], too.
        """
        positions, seeds = drawn(examples, len(self._examples))
        rows = self._examples.take(positions)
        codes, exists = lists(rows)
        histories = history_texts(self._catalogue, rows.histories, self._settings.history_items)
        texts = [[item_text(self._catalogue, int(c)) for c in row[row >= 0]] for row in codes]
        if self._shares:
            shared = prefixes.rows(
                [self._prompts.prefix(history) for history in histories],
                [[self._prompts.suffix(text) for text in row] for row in texts],
                self._prompts.tokenizer.pad_token_id,
            )
            return named("prompt", shared) | {"exists": torch.from_numpy(exists)}
        if self._settings.prompt is Prompt.YES_NO:
            prompts = [
                self._prompts.yes_no(history, text)
                for history, row in zip(histories, texts, strict=True)
                for text in row
            ]
            target = {}
        else:
            orders = [
                np.random.default_rng(int(seed)).permutation(len(row))
                for seed, row in zip(seeds, texts, strict=True)
            ]
            prompts = [
                self._prompts.letters(history, [row[place] for place in order])
                for history, row, order in zip(histories, texts, orders, strict=True)
            ]
            target = {"answer": torch.tensor([int(order.argmin()) for order in orders])}
            # As many letters as candidates are used, whichever codes are missing.
            exists = np.arange(codes.shape[1]) < exists.sum(axis=1, keepdims=True)
        each = 2 if self._settings.prompt is Prompt.YES_NO else 1  # prompts of an example, or more
        tokens = pieces.cut(self._prompts.tokenizer, prompts, each * len(rows))
        return named("prompt", tokens) | target | {"exists": torch.from_numpy(exists)}

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """See the module."""
        exists = batch["exists"]
        prompts, answers = part(batch, "prompt"), self._prompts.answers
        if self._shares:
            logits = prefixes.logits(model, prompts, answers)
        else:
            logits = pieces.joined(lambda own: answer_logits(model, own, answers), prompts)
        if self._settings.prompt is Prompt.YES_NO:
            margins = logits[:, 0] - logits[:, 1]
            scores = torch.zeros(exists.shape, device=logits.device)
            scores = scores.masked_scatter(exists, margins)
            return ranking_loss(RankingLoss.POINTWISE, scores, exists)
        scores = logits[:, : exists.shape[1]]
        return listwise_softmax(scores, one_hot(batch["answer"], exists.shape[1]), exists)

    def describe(self, examples: IntArray) -> list[dict[str, Any]]:
        """The texts."""
        positions, _ = drawn(examples, len(self._examples))
        return described(self._catalogue, self._examples, positions, self._settings.history_items)

    def save(self, model: torch.nn.Module, directory: Path) -> None:
        """What ``DecoderReranker.load`` reads."""
        DecoderReranker(model, self._prompts.tokenizer, self._prompts.config).save(directory)
