r"""A decoder language model as reranker: it reads candidates in a prompt and is asked one word.

With *letters*, all candidates of a history stand in one prompt, each behind a letter, and one
forward pass gives their scores, the logits of the letters (Yue et al., LlamaRec: two-stage
recommendation using large language models for ranking, 2023). What a place in the prompt adds to
them can be averaged out over several orders. With *yes-no*, every candidate gets a
prompt of its own and the score is logit(Yes) − logit(No) (Bao et al., TALLRec, RecSys 2023); the
history is then read once for all its candidates, whose prompts share it as a prefix. Nothing is
generated, so no item can be invented.

What is too long is cut from the end of the history's text first, then from each candidate's.

Shape legend: B histories, C candidates of one history, P prompts, L tokens, V words.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusionrec.config import Config
from fusionrec.data.histories import FloatArray
from fusionrec.errors import ModelError
from fusionrec.language.inference import (
    check_max_tokens,
    infer,
    inference,
    pad,
    pick_device,
    usable,
    weights_dtype,
)
from fusionrec.language.models import (
    DEFAULT_MODEL,
    load_pretrained,
    read_settings,
    resolve,
    save_pretrained,
)
from fusionrec.language.precision import Precision
from fusionrec.language.tokens import Row

LETTERS = string.ascii_uppercase
"""Candidates of one prompt at most."""

_HEAD = "A user chose, newest first: "
_WHICH = "\nWhich of these came next?"
_WHETHER = "\nDid this come next? "
_ANSWER = "\nAnswer:"
_HISTORY_SHARE = 0.3
"""Of the prompt: what candidates leave to the history at least."""


class Prompt(StrEnum):
    """What the decoder is asked."""

    LETTERS = "letters"
    YES_NO = "yes-no"


class DecoderConfig(Config):
    """What makes a model folder a decoder reranker; ``decoder.json`` beside the weights."""

    model: str = DEFAULT_MODEL
    """Where the weights came from: package:NAME, a folder, or a name on the hub."""
    revision: str | None = None
    """Commit of a hub model."""
    max_tokens: int = Field(default=512, ge=8)
    """Tokens of a prompt."""
    history_items: int = Field(default=10, ge=1)
    """Newest items that make the text of a history."""
    prompt: Prompt = Prompt.LETTERS
    """letters: all candidates in one prompt; yes-no: a prompt for each."""
    orders: int = Field(default=1, ge=1)
    """Of the letters: prompts with the candidates in so many orders, whose logits are averaged."""


class Prompts:
    """Prompts as tokens; the tokenizer pads on the left, so that answers are at the end."""

    def __init__(self, tokenizer: Any, config: DecoderConfig) -> None:
        """Prepare ``tokenizer``.

        Raises:
            ModelError: it is an encoder's, or an answer is not one token of it.
        """
        if tokenizer.mask_token is not None:
            raise ModelError(
                f"model {config.model} is an encoder, not a causal language model: take a decoder"
            )
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer, self.config = tokenizer, config
        first = tokenizer("a")["input_ids"][:1]
        self._start = first if first == [tokenizer.bos_token_id] else []
        self._fixed = {t: self._ids(t) for t in (_HEAD, _WHICH, _WHETHER, _ANSWER)}
        words = LETTERS if config.prompt is Prompt.LETTERS else ("Yes", "No")
        self.answers = torch.tensor([self._answer(word) for word in words])
        """[26] tokens of the letters, or [2] of yes and no."""
        if len(set(self.answers.tolist())) < len(words):
            raise ModelError(
                f"model {config.model} writes several answers as the same token: take another model"
            )

    def letters(self, history: str, candidates: Sequence[str]) -> Row:
        """One prompt with up to 26 candidates in their order."""
        assert 0 < len(candidates) <= len(LETTERS)
        fixed = sum(len(self._fixed[t]) for t in (_HEAD, _WHICH, _ANSWER)) + len(self._start)
        room = self.config.max_tokens - fixed
        each = max(4, int((1 - _HISTORY_SHARE) * room) // len(candidates))
        items = [
            self._ids(f"\n{letter}. {text}")[:each]
            for letter, text in zip(LETTERS, candidates, strict=False)
        ]
        left = max(0, room - sum(map(len, items)))
        ids = [*self._start, *self._fixed[_HEAD], *self._ids(history)[:left], *self._fixed[_WHICH]]
        for item in items:
            ids += item
        return _row([*ids, *self._fixed[_ANSWER]])

    def yes_no(self, history: str, candidate: str) -> Row:
        """The prompt of one candidate: the prefix of its history and what follows."""
        return _row([*self.prefix(history), *self.suffix(candidate)])

    def prefix(self, history: str) -> list[int]:
        """What the prompts of all candidates of a history have in common."""
        fixed = len(self._start) + len(self._fixed[_HEAD]) + len(self._fixed[_WHETHER])
        left = max(0, self.config.max_tokens - fixed - self._suffix_tokens)
        text = self._ids(history)[:left]
        return [*self._start, *self._fixed[_HEAD], *text, *self._fixed[_WHETHER]]

    def suffix(self, candidate: str) -> list[int]:
        """What comes after the prefix."""
        answer = self._fixed[_ANSWER]
        return [*self._ids(candidate)[: self._suffix_tokens - len(answer)], *answer]

    @property
    def _suffix_tokens(self) -> int:
        return len(self._fixed[_ANSWER]) + max(4, int(0.5 * self.config.max_tokens))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _answer(self, word: str) -> int:
        before, whole = self._fixed[_ANSWER], self._ids(f"{_ANSWER} {word}")
        if whole[:-1] != before:
            raise ModelError(
                f"model {self.config.model} cannot answer with {word!r} in one token: take a "
                "decoder whose tokenizer can"
            )
        return whole[-1]


def answer_logits(model: Any, inputs: Mapping[str, Tensor], answers: Tensor) -> Tensor:
    """[P, A] float32 logits of A ``answers`` after each of P prompts padded on the left."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(
        input_ids=inputs["input_ids"],
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=1,
        use_cache=False,
    ).logits[:, -1]
    found: Tensor = logits[:, answers.to(logits.device)].float()
    return found


class DecoderReranker:
    """A causal language model that scores candidates. Safe to call from several threads."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: DecoderConfig,
        device: torch.device | None = None,
        precision: Precision = Precision.AUTO,
    ) -> None:
        """Wrap a model loaded in ``precision``; it is moved to ``device`` (default: left there).

        Raises:
            ModelError: the model has too few positions, or no single tokens for the answers.
        """
        check_max_tokens(model, config.max_tokens, config.model)
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer
        self.config = config
        self.precision = precision
        self.prompts = Prompts(tokenizer, config)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        precision: Precision = Precision.AUTO,
        config: DecoderConfig | None = None,
    ) -> Self:
        """Load what :meth:`save` wrote, or any decoder that :func:`~.models.resolve` finds.

        ``config`` replaces the settings of the folder. See ``Reranker.load`` for the rest.

        Raises:
            ModelError: there is no such model, or it is not a decoder.
        """
        folder = resolve(model, revision)
        found = config or read_settings(DecoderConfig, folder)
        found = found or DecoderConfig(model=str(model), revision=revision)
        place = pick_device(device)
        precision = usable(precision, place)
        decoder = load_pretrained(
            AutoModelForCausalLM.from_pretrained, folder, dtype=weights_dtype(precision)
        )
        tokenizer = load_pretrained(AutoTokenizer.from_pretrained, folder)
        return cls(decoder.eval(), tokenizer, found, place, precision)

    @property
    def reads_lists(self) -> bool:
        """Whether a candidate's score depends on those beside it, and on their order."""
        return self.config.prompt is Prompt.LETTERS

    def score(
        self,
        history_texts: Sequence[str],
        candidate_texts: Sequence[Sequence[str]],
        batch_size: int = 16,
    ) -> list[FloatArray]:
        """Scores of the candidates of each of B histories: B arrays [C], in their order.

        A blank history says nothing about any candidate: zeros. Above 26 candidates, letters are
        asked in several prompts, and logits are compared across them.
        """
        assert len(history_texts) == len(candidate_texts)
        ask = self._letters if self.config.prompt is Prompt.LETTERS else self._yes_no
        return [
            ask(history, list(candidates), batch_size)
            if history.strip() and candidates
            else np.zeros(len(candidates), dtype=np.float32)
            for history, candidates in zip(history_texts, candidate_texts, strict=True)
        ]

    def save(self, directory: Path) -> None:
        """Write a model folder (safetensors, tokenizer) and ``decoder.json``."""
        save_pretrained(self.model, self.tokenizer, directory, self.config)

    def _letters(self, history: str, candidates: list[str], batch_size: int) -> FloatArray:
        step = len(LETTERS)
        groups = [candidates[start : start + step] for start in range(0, len(candidates), step)]
        # Rotations by equal steps: every candidate meets as many places.
        turns = [
            [round(turn * len(group) / self.config.orders) for turn in range(self.config.orders)]
            for group in groups
        ]
        rows = [
            self.prompts.letters(history, [*group[turn:], *group[:turn]])
            for group, shifts in zip(groups, turns, strict=True)
            for turn in shifts
        ]
        logits = infer(self.model, self.tokenizer, rows, self._answers, batch_size, self.precision)
        found, row = [], 0
        for group, shifts in zip(groups, turns, strict=True):
            turned = [
                np.roll(logits[row + place, : len(group)], turn)
                for place, turn in enumerate(shifts)
            ]
            found.append(np.mean(turned, axis=0, dtype=np.float32))
            row += len(shifts)
        scores: FloatArray = np.concatenate(found)
        return scores

    def _yes_no(self, history: str, candidates: list[str], batch_size: int) -> FloatArray:
        """The history's keys and values are computed once and shared by its candidates."""
        device = self.model.device
        prefix = torch.tensor([self.prompts.prefix(history)], device=device)
        scores = np.empty(len(candidates), dtype=np.float32)
        with inference(self.model, self.precision):
            shared = self.model(input_ids=prefix, use_cache=True, logits_to_keep=1).past_key_values
            for start in range(0, len(candidates), batch_size):
                group = candidates[start : start + batch_size]
                inputs = pad(self.tokenizer, [_row(self.prompts.suffix(text)) for text in group])
                mask = inputs["attention_mask"].to(device)
                cache = copy.deepcopy(shared)
                cache.batch_repeat_interleave(len(group))
                logits = self.model(
                    input_ids=inputs["input_ids"].to(device),
                    attention_mask=torch.cat([mask.new_ones(len(group), prefix.shape[1]), mask], 1),
                    position_ids=prefix.shape[1] + (mask.cumsum(dim=1) - 1).clamp(min=0),
                    past_key_values=cache,
                    logits_to_keep=1,
                ).logits[:, -1]
                yes, no = logits[:, self.prompts.answers.to(device)].float().T
                scores[start : start + len(group)] = (yes - no).cpu().numpy()
        return scores

    def _answers(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return answer_logits(self.model, inputs, self.prompts.answers)


def _row(ids: list[int]) -> Row:
    return {"input_ids": ids, "attention_mask": [1] * len(ids)}
