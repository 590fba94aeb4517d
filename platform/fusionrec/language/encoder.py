"""The encoder: texts become unit vectors, so that a dot product is a cosine.

A transformer's last hidden states are pooled over the text's tokens and normalised. Texts are
sorted by their number of tokens before they are batched: a batch is padded to its longest text, and
without the order most of the work would be on padding. Costs about 3–5 ms per film text with MiniLM
on two CPU cores. Knows neither users nor items; ``fusionrec.data.text`` makes the texts.

Shape legend: B texts, L tokens, D dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, ValidationError
from transformers import AutoModel, AutoTokenizer

from fusionrec.config import Config
from fusionrec.data.histories import FloatArray
from fusionrec.errors import ModelError
from fusionrec.language.models import (
    DEFAULT_MODEL,
    check_max_tokens,
    inference,
    load_pretrained,
    pick_device,
    resolve,
)

Pooling = Literal["mean", "cls"]
_SETTINGS = "encoder.json"


class EncoderConfig(Config):
    """What makes a model folder an encoder; ``encoder.json`` beside the weights."""

    model: str = DEFAULT_MODEL
    """Where the weights came from: package:NAME, a folder, or a name on the hub."""
    revision: str | None = None
    """Commit of a hub model."""
    max_tokens: int = Field(default=256, ge=8)
    """Tokens that are read of a text, special tokens included; the rest is cut off."""
    pooling: Pooling = "mean"
    """How the token states become one vector: their mean, or the state of the first token."""
    history_items: int = Field(default=5, ge=1)
    """Newest items that make the text of a history."""


def vectors(
    model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], pooling: Pooling
) -> torch.Tensor:
    """[B, D] L2-normalised float32 vectors of B tokenised texts, with gradients where enabled.

    Mean pooling is ``Σ_l mask_l·h_l / Σ_l mask_l`` over the L tokens, special tokens included, as
    in Sentence-BERT (Reimers & Gurevych, 2019). A text without a token gives a row of zeros.

    Args:
        model: a transformer whose output has ``last_hidden_state`` [B, L, D].
        inputs: ``input_ids`` and ``attention_mask``, both [B, L], and what else the model takes.
        pooling: see :class:`EncoderConfig`.
    """
    hidden = model(**inputs).last_hidden_state.float()
    if pooling == "cls":
        pooled = hidden[:, 0]
    else:
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
    return torch.nn.functional.normalize(pooled, dim=-1)


class Encoder:
    """A text model on a device. Safe to call from several threads."""

    def __init__(
        self, model: Any, tokenizer: Any, config: EncoderConfig, device: torch.device | None = None
    ) -> None:
        """Wrap a loaded model, which is moved to ``device`` (by default left where it is).

        Raises:
            ModelError: the model has fewer positions than ``config.max_tokens``.
        """
        check_max_tokens(model, config.max_tokens, config.model)
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer
        self.config = config
        # Sets the tokenizer's truncation now: to change it while another thread encodes raises.
        self._tokenize([""])

    @classmethod
    def load(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load what :meth:`save` wrote, or any model that :func:`~.models.resolve` finds.

        A model that is not one of ours brings its pooling and length along where it was published
        for sentence-transformers. ``device`` is the GPU by default, where there is one.

        Raises:
            ModelError: there is no such model, or it cannot be loaded.
        """
        folder = resolve(model, revision)
        config = _settings(folder, str(model), revision)
        backbone = load_pretrained(AutoModel.from_pretrained, folder, dtype=torch.float32)
        tokenizer = load_pretrained(AutoTokenizer.from_pretrained, folder)
        return cls(backbone.eval(), tokenizer, config, pick_device(device))

    @property
    def dimension(self) -> int:
        """D."""
        return int(self.model.config.hidden_size)

    def inputs(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tokenised ``texts`` as [B, L] tensors on the CPU: what :func:`vectors` takes."""
        return self._pad(self._tokenize(texts))

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> FloatArray:
        """[B, D] L2-normalised vectors of ``texts``, in their order; zeros for a blank text."""
        out = np.zeros((len(texts), self.dimension), dtype=np.float32)
        filled = [index for index, text in enumerate(texts) if text.strip()]
        rows = self._tokenize([texts[index] for index in filled])
        # Longest first: a batch that does not fit into memory fails at once.
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))
        device = self.model.device
        with inference(self.model, device):
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                inputs = self._pad([rows[row] for row in batch])
                on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
                found = vectors(self.model, on_device, self.config.pooling)
                out[[filled[row] for row in batch]] = found.cpu().numpy()
        return out

    def save(self, directory: Path) -> None:
        """Write a model folder (safetensors, tokenizer) and ``encoder.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        (directory / _SETTINGS).write_text(self.config.model_dump_json(indent=2) + "\n", "utf-8")

    def _tokenize(self, texts: Sequence[str]) -> list[dict[str, list[int]]]:
        if not texts:
            return []
        found = self.tokenizer(list(texts), truncation=True, max_length=self.config.max_tokens)
        return [{name: found[name][row] for name in found} for row in range(len(texts))]

    def _pad(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer.pad(rows, return_tensors="pt"))


def _settings(folder: Path, model: str, revision: str | None) -> EncoderConfig:
    path = folder / _SETTINGS
    if path.is_file():
        try:
            return EncoderConfig.model_validate_json(path.read_bytes())
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ModelError(f"{path} cannot be read ({reason}); save the encoder again") from error
    config = EncoderConfig(model=model, revision=revision)
    length = _json(folder / "sentence_bert_config.json").get("max_seq_length")
    pooling = _published_pooling(folder, model)
    return config.model_copy(
        update={"max_tokens": length or config.max_tokens, "pooling": pooling or config.pooling}
    )


def _published_pooling(folder: Path, model: str) -> str | None:
    """The pooling that sentence-transformers' folder names, in its old form or its new one."""
    published = _json(folder / "1_Pooling" / "config.json")
    if not published:
        return None
    old = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    modes = [
        name for name, on in published.items() if name.startswith("pooling_mode_") and on is True
    ]
    mode = published.get("pooling_mode") or "+".join(old.get(name, name) for name in modes)
    if mode not in ("mean", "cls"):
        raise ModelError(f"model {model} pools by {mode}, which is not among mean and cls")
    return str(mode)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); fetch the model again") from error
    return dict(values) if isinstance(values, dict) else {}
