r"""Adaptive pretraining: the model first reads the catalogue's texts, as it once read others.

The texts are joined, with a separator after each, and cut into blocks of L tokens. An encoder, one
whose tokenizer has a mask, learns masked language modelling (Devlin et al., BERT, 2019): of 15% of
the tokens, 80% become the mask, 10% a random token, 10% stay, drawn anew each epoch (Liu et al.,
RoBERTa, 2019, who also dropped next-sentence prediction without loss), and

    loss = −1/|M| Σ_{l in M} log p(x_l | masked block),   M the chosen tokens.

A decoder learns causal language modelling: −1/(L−1) Σ_l log p(x_l | x_<l). Gururangan et al.,
Don't stop pretraining (ACL 2020), show what it brings. A model whose head came without weights
learns that too; fewer than a hundred steps then teach the head more than the model.

Shape legend: B blocks of a batch, L tokens of a block, T tokens of the catalogue.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import IntArray
from fusionrec.data.text import item_texts
from fusionrec.errors import TrainingError
from fusionrec.language.encoder import Encoder
from fusionrec.language.models import load_pretrained, resolve, save_pretrained
from fusionrec.training.objectives.settings import TaskSettings, identity
from fusionrec.training.task import Batch, drawn, shuffled, with_draws

_UNPREDICTED = -100


class PretrainingSettings(TaskSettings):
    """How the model reads the catalogue."""

    mask_share: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens that an encoder has to guess (pretraining)."""


class PretrainingTask:
    """See the module."""

    name = "pretraining"
    head: tuple[str, ...] = ("cls", "lm_head", "vocab_transform", "vocab_layer_norm", "predictions")

    def __init__(
        self, settings: PretrainingSettings, catalogue: Catalogue, examples: None = None
    ) -> None:
        """Cut the catalogue into blocks; ``examples`` are not used.

        Raises:
            ModelError: there is no such model.
            TrainingError: the texts do not fill a block.
        """
        assert examples is None
        self._settings = settings
        self._folder = resolve(settings.encoder, settings.revision)
        self._tokenizer = load_pretrained(AutoTokenizer.from_pretrained, self._folder)
        self._blocks = self._cut(item_texts(catalogue))

    @property
    def identity(self) -> dict[str, Any]:
        """See :class:`~fusionrec.training.task.Task`."""
        fingerprint = hashlib.sha256(self._blocks.tobytes()).hexdigest()
        return identity(self.name, self._settings, fingerprint)

    def build_model(self) -> torch.nn.Module:
        """The transformer with a language model head."""
        kind: Any = AutoModelForMaskedLM if self._masked else AutoModelForCausalLM
        model: torch.nn.Module = load_pretrained(
            kind.from_pretrained, self._folder, dtype=torch.float32
        )
        return model

    def plan(self, batch_size: int, generator: np.random.Generator) -> list[IntArray]:
        """Random batches of blocks, and a number for the masks of each."""
        count = len(self._blocks)
        return with_draws(shuffled(count, batch_size, generator), count, generator)

    def batch(self, examples: IntArray) -> Batch:
        """[B, L] tokens, and the labels of those to be predicted."""
        positions, seeds = drawn(examples, len(self._blocks))
        tokens = self._blocks[positions]
        labels = tokens.copy()
        if self._masked:
            generators = [np.random.default_rng(int(seed)) for seed in seeds]
            masks = [self._mask(row, g) for row, g in zip(tokens, generators, strict=True)]
            tokens = np.stack([changed for changed, _ in masks])
            labels[~np.stack([chosen for _, chosen in masks])] = _UNPREDICTED
        ids = torch.from_numpy(tokens)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.from_numpy(labels),
        }

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """See the module; 0 where nothing is to be predicted."""
        inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if not self._masked:
            inputs["use_cache"] = False  # which would copy keys and values that nobody reads
        logits, labels = model(**inputs).logits.float(), batch["labels"]
        if not self._masked:
            # Not the logits: a copy of them would be the largest tensor of the step.
            labels = pad(labels[:, 1:], (0, 1), value=_UNPREDICTED)
        chosen = labels != _UNPREDICTED
        total = cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=_UNPREDICTED, reduction="sum"
        )
        return total / chosen.sum().clamp(min=1)

    def describe(self, examples: IntArray) -> list[dict[str, Any]]:
        """The texts."""
        positions, _ = drawn(examples, len(self._blocks))
        return [
            {"example": int(position), "text": self._tokenizer.decode(self._blocks[position])}
            for position in positions
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

    def _cut(self, texts: list[str]) -> IntArray:
        """[B, L] all texts in the catalogue's order; what does not fill a block is left out."""
        tokenizer, length = self._tokenizer, self._settings.max_tokens
        separator = tokenizer.sep_token_id if self._masked else tokenizer.eos_token_id
        ends = [] if separator is None else [separator]
        rows = tokenizer([t for t in texts if t], add_special_tokens=False)["input_ids"]
        joined = [token for row in rows for token in (*row, *ends)]
        count = len(joined) // length
        if not count:
            raise TrainingError(
                f"the catalogue's texts are {len(joined)} tokens and a block takes {length}: set a "
                "smaller --max-tokens"
            )
        return np.array(joined[: count * length], dtype=np.int64).reshape(count, length)

    def _mask(self, tokens: IntArray, generator: np.random.Generator) -> tuple[IntArray, Any]:
        """([L] what the model sees, [L] which tokens it has to guess)."""
        special = np.isin(tokens, self._tokenizer.all_special_ids)
        chosen = (generator.random(len(tokens)) < self._settings.mask_share) & ~special
        fate = generator.random(len(tokens))
        noise = generator.integers(0, len(self._tokenizer), len(tokens))
        seen = np.where(chosen & (fate < 0.8), self._tokenizer.mask_token_id, tokens)
        return np.where(chosen & (fate >= 0.8) & (fate < 0.9), noise, seen), chosen
