r"""Adaptive pretraining: the model first reads the texts of the data, as it once read others.

They are those of the catalogue and the reviews of training events: those of validation and test
would tell what came next (see :mod:`fusionrec.training.reviews`). Joined, with a separator after
each, they are cut into blocks of L tokens. An encoder, one whose tokenizer has a mask, learns
masked language modelling (Devlin et al., BERT, 2019): of 15% of the tokens, 80% become the mask,
10% a random token, 10% stay, drawn anew each epoch (Liu et al., RoBERTa, 2019, who also dropped
next-sentence prediction without loss), and

    loss = −1/|M| Σ_{l in M} log p(x_l | masked block),   M the chosen tokens.

With next-sentence prediction, as BERT had it, the examples are pairs instead of blocks: the two
parts of a text, cut at the sentence's end that is nearest to its middle, or in half of the cases
the first part of one and the second of another text that has another, drawn anew each epoch. With
the label y of a pair, 0 where the second part follows, the loss has −log p(y | masked pair) added.

A decoder learns causal language modelling: −1/(L−1) Σ_l log p(x_l | x_<l). Gururangan et al.,
Don't stop pretraining (ACL 2020), show what it brings. A model whose head came without weights
learns that too; fewer than a hundred steps then teach the head more than the model.

Shape legend: B blocks or pairs of a batch, L tokens of a block, T tokens of all texts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
)

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import IntArray
from fusionrec.data.text import item_texts
from fusionrec.errors import ConfigError, TrainingError
from fusionrec.language.encoder import Encoder
from fusionrec.language.inference import pad as padded
from fusionrec.language.models import load_pretrained, resolve, save_pretrained
from fusionrec.language.tokens import tokenize
from fusionrec.training.objectives.settings import Need, TaskSettings, identity
from fusionrec.training.task import Batch, drawn, shuffled, with_draws
from fusionrec.training.vocabulary import UNPREDICTED, causal_loss, guesses

_TRIES = 20
"""Draws of another text's second part, where many items share theirs, such as a category."""
_AT_ONCE = 1_000
"""Texts whose tokens are lists at a time, which take more memory than arrays."""
_SENTENCE = re.compile(r"(?<=[.!?…])\s+")


class PretrainingSettings(TaskSettings):
    """How the model reads the texts."""

    mask_share: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens that an encoder has to guess (pretraining)."""
    next_sentence: bool = False
    """Whether an encoder also has to tell if the second part of a text follows the first
    (pretraining); for architectures with such a head: BERT and near relatives."""
    reviews: bool | None = None
    """Whether the reviews of training events are read behind the catalogue (pretraining); default:
    where there are any."""

    @property
    def needs(self) -> frozenset[Need]:
        """Reviews, where there are any, unless they are left out."""
        return frozenset() if self.reviews is False else frozenset({Need.REVIEWS})


class PretrainingTask:
    """See the module."""

    name = "pretraining"
    head: tuple[str, ...] = (
        "cls",
        "lm_head",
        "vocab_transform",
        "vocab_layer_norm",
        "predictions",
        "pooler",
    )

    def __init__(
        self, settings: PretrainingSettings, catalogue: Catalogue, reviews: Sequence[str] = ()
    ) -> None:
        """Cut the texts of the catalogue, then ``reviews``, into blocks or pairs.

        Raises:
            ConfigError: a decoder is to predict the next sentence.
            ModelError: there is no such model.
            TrainingError: the texts do not fill a block, or two of them cannot be cut in two.
        """
        self._settings = settings
        self._folder = resolve(settings.encoder, settings.revision)
        self._tokenizer = load_pretrained(AutoTokenizer.from_pretrained, self._folder)
        self._pairs: list[tuple[str, str]] = []
        texts = [*item_texts(catalogue), *reviews]
        if settings.next_sentence:
            if not self._masked:
                raise _no_head(settings)
            self._pairs = _pairs(texts)
        else:
            self._blocks = self._cut(texts)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See :class:`~fusionrec.training.task.Task`."""
        content = repr(self._pairs).encode() if self._pairs else self._blocks.tobytes()
        return identity(self.name, self._settings, hashlib.sha256(content).hexdigest())

    def build_model(self) -> torch.nn.Module:
        """The transformer with a language model head, and one for pairs where there are any.

        Raises:
            ConfigError: the architecture has no head for pairs.
        """
        kind: Any = AutoModelForMaskedLM if self._masked else AutoModelForCausalLM
        if self._pairs:
            kind = AutoModelForPreTraining
        model: torch.nn.Module = load_pretrained(
            kind.from_pretrained, self._folder, dtype=torch.float32
        )
        if self._pairs and not hasattr(getattr(model, "cls", None), "seq_relationship"):
            raise _no_head(self._settings)
        return model

    def plan(self, batch_size: int, generator: np.random.Generator) -> list[IntArray]:
        """Random batches of blocks or pairs, and a number for the masks of each."""
        count = self._count
        return with_draws(shuffled(count, batch_size, generator), count, generator)

    def batch(self, examples: IntArray) -> Batch:
        """[B, L] tokens, and the labels of those to be predicted; [B] those of pairs."""
        positions, seeds = drawn(examples, self._count)
        generators = [np.random.default_rng(int(seed)) for seed in seeds]
        found: Batch
        if self._pairs:
            found = self._drawn_pairs(positions, generators)
        else:
            ids = torch.from_numpy(self._blocks[positions])
            found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        tokens = found["input_ids"].numpy()
        labels = tokens.copy()
        if self._masked:
            masks = [self._mask(row, g) for row, g in zip(tokens, generators, strict=True)]
            found["input_ids"] = torch.from_numpy(np.stack([changed for changed, _ in masks]))
            labels[~np.stack([chosen for _, chosen in masks])] = UNPREDICTED
        return found | {"labels": torch.from_numpy(labels)}

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """See the module; 0 where nothing is to be predicted."""
        known = ("input_ids", "attention_mask", "token_type_ids")
        inputs, labels = {name: batch[name] for name in known if name in batch}, batch["labels"]
        if not self._masked:
            return causal_loss(model, inputs, labels)
        rows, columns = (labels != UNPREDICTED).nonzero(as_tuple=True)
        found = guesses(model, inputs, (rows, columns))
        logits = (found.prediction_logits if self._pairs else found.logits)[0].float()
        total = cross_entropy(logits, labels[rows, columns], reduction="sum")
        loss = total / max(1, len(rows))
        if self._pairs:
            loss = loss + cross_entropy(found.seq_relationship_logits.float(), batch["other"])
        return loss

    def describe(self, examples: IntArray) -> list[dict[str, Any]]:
        """The texts."""
        positions, seeds = drawn(examples, self._count)
        if self._pairs:
            generators = [np.random.default_rng(int(seed)) for seed in seeds]
            found = self._drawn_pairs(positions, generators)["input_ids"]
            texts = [self._tokenizer.decode(row, skip_special_tokens=True) for row in found]
        else:
            texts = [self._tokenizer.decode(self._blocks[position]) for position in positions]
        return [
            {"example": int(position), "text": text}
            for position, text in zip(positions, texts, strict=True)
        ]

    def save(self, model: torch.nn.Module, directory: Path) -> None:
        """A folder to start other tasks from; an encoder keeps its pooling and length."""
        if self._masked:
            source = Encoder.load(self._folder, device="cpu")
            settings = source.config.model_copy(update={"model": self._settings.encoder})
            save_pretrained(model, self._tokenizer, directory, settings)
        else:
            decoder: Any = model
            decoder.save_pretrained(directory)
            self._tokenizer.save_pretrained(directory)

    @property
    def _masked(self) -> bool:
        return self._tokenizer.mask_token_id is not None

    @property
    def _count(self) -> int:
        return len(self._pairs) or len(self._blocks)

    def _drawn_pairs(self, positions: IntArray, generators: list[np.random.Generator]) -> Batch:
        """[B, L] tokens of pairs, and ``other`` [B], 1 where the second part is another one."""
        count, seconds, other = len(self._pairs), [], []
        for position, generator in zip(positions.tolist(), generators, strict=True):
            own = second = self._pairs[position][1]
            if generator.random() < 0.5:
                for _ in range(_TRIES):
                    # Of all others each is as likely.
                    step = int(generator.integers(1, count))
                    second = self._pairs[(position + step) % count][1]
                    if second != own:
                        break
            seconds.append(second)
            other.append(int(second != own))
        firsts = [self._pairs[position][0] for position in positions.tolist()]
        rows = tokenize(self._tokenizer, self._settings.max_tokens, firsts, seconds)
        return padded(self._tokenizer, rows) | {"other": torch.tensor(other)}

    def _cut(self, texts: list[str]) -> IntArray:
        """[B, L] all texts in their order; what does not fill a block is left out."""
        tokenizer, length = self._tokenizer, self._settings.max_tokens
        separator = tokenizer.sep_token_id if self._masked else tokenizer.eos_token_id
        ends = [] if separator is None else [separator]
        found = [text for text in texts if text]
        pieces = []
        for start in range(0, len(found), _AT_ONCE):
            some = tokenizer(found[start : start + _AT_ONCE], add_special_tokens=False)
            pieces += [np.array([*row, *ends], dtype=np.int64) for row in some["input_ids"]]
        joined = np.concatenate([np.empty(0, np.int64), *pieces])
        count = len(joined) // length
        if not count:
            raise TrainingError(
                f"the texts are {len(joined)} tokens and a block takes {length}: set a smaller "
                "--max-tokens"
            )
        return joined[: count * length].reshape(count, length)

    def _mask(self, tokens: IntArray, generator: np.random.Generator) -> tuple[IntArray, Any]:
        """([L] what the model sees, [L] which tokens it has to guess)."""
        special = np.isin(tokens, self._tokenizer.all_special_ids)
        chosen = (generator.random(len(tokens)) < self._settings.mask_share) & ~special
        fate = generator.random(len(tokens))
        noise = generator.integers(0, len(self._tokenizer), len(tokens))
        seen = np.where(chosen & (fate < 0.8), self._tokenizer.mask_token_id, tokens)
        return np.where(chosen & (fate >= 0.8) & (fate < 0.9), noise, seen), chosen


def _pairs(texts: list[str]) -> list[tuple[str, str]]:
    """Both parts of each text of two sentences or more."""
    found = []
    for text in texts:
        ends = [match.span() for match in _SENTENCE.finditer(text)]
        if ends:
            end, begin = min(ends, key=lambda span: abs(span[0] - len(text) / 2))
            found.append((text[:end], text[begin:]))
    if len(found) < 2:
        raise TrainingError(
            f"{len(found)} of {len(texts)} texts have two sentences, and next-sentence prediction "
            "compares those of two: leave --next-sentence out"
        )
    return found


def _no_head(settings: PretrainingSettings) -> ConfigError:
    return ConfigError(
        f"setting next_sentence = True is wrong: {settings.encoder} has no head that compares two "
        "sentences; leave --next-sentence out, or start from a BERT"
    )
