"""The encoder: texts become unit vectors, so that a dot product is a cosine.

A transformer's last hidden states are pooled over the text's tokens and normalised. Costs about
3–5 ms a film text with MiniLM on two CPU cores. Knows neither users nor items:
``fusionrec.data.text`` makes the texts.

Shape legend: B texts, L tokens, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field
from transformers import AutoModel, AutoTokenizer

from fusionrec.config import Config
from fusionrec.data.histories import FloatArray
from fusionrec.errors import ModelError
from fusionrec.language.graphs import FixedShapes, captured
from fusionrec.language.inference import (
    check_max_tokens,
    infer,
    pad,
    pick_device,
    usable,
    weights_dtype,
)
from fusionrec.language.layers import pack, quantise
from fusionrec.language.models import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_MODEL,
    fitting_max_tokens,
    load_pretrained,
    read_json,
    read_settings,
    resolve,
    save_pretrained,
    settings_name,
)
from fusionrec.language.precision import Precision
from fusionrec.language.tokens import Row, tokenize

Pooling = Literal["mean", "cls"]

ITEM_TOWER = "item"
"""Inside of an encoder's folder that of the items' tower, where they have one of their own."""


class EncoderConfig(Config):
    """What makes a model folder an encoder; ``encoder.json`` beside the weights."""

    model: str = DEFAULT_MODEL
    """Where the weights came from: package:NAME, a folder, or a name on the hub."""
    revision: str | None = None
    """Commit of a hub model."""
    max_tokens: int = Field(default=DEFAULT_MAX_TOKENS, ge=8)
    """Tokens that are read of a text, special tokens included; the rest is cut off."""
    pooling: Pooling = "mean"
    """How the token states become one vector: their mean, or the state of the first token."""
    history_items: int = Field(default=5, ge=1)
    """Newest items that make the text of a history."""
    dimensions: int | None = Field(default=None, ge=1)
    """Of a vector only the first so many, where the model was trained for it; by default all."""


def vectors(
    model: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    pooling: Pooling,
    dimensions: int | None = None,
) -> torch.Tensor:
    """[B, D] L2-normalised float32 vectors of B tokenised texts, with gradients where enabled.

    Mean pooling is ``Σ_l mask_l·h_l / Σ_l mask_l`` over the L tokens, special tokens included, as
    in Sentence-BERT (Reimers & Gurevych, 2019). A text without a token gives a row of zeros.

    Args:
        model: a transformer whose output has ``last_hidden_state`` [B, L, D].
        inputs: ``input_ids`` and ``attention_mask``, both [B, L], and what else the model takes.
        pooling: see :class:`EncoderConfig`.
        dimensions: D, less than the model's own where the beginnings of its vectors are vectors.
    """
    hidden = model(**inputs).last_hidden_state.float()
    if pooling == "cls":
        pooled = hidden[:, 0]
    else:
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
    return torch.nn.functional.normalize(pooled[:, :dimensions], dim=-1)


class Encoder:
    """A text model on a device. Safe to call from several threads."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: EncoderConfig,
        device: torch.device | None = None,
        precision: Precision = Precision.AUTO,
    ) -> None:
        """Wrap a model loaded in ``precision``; it is moved to ``device`` (default: left there).

        Raises:
            ModelError: the model has fewer positions than ``config.max_tokens``, or dimensions.
        """
        check_max_tokens(model, config.max_tokens, config.model)
        if config.dimensions is not None and config.dimensions > model.config.hidden_size:
            raise ModelError(
                f"dimensions = {config.dimensions} is more than the {model.config.hidden_size} of "
                f"model {config.model}; set it to {model.config.hidden_size} or less"
            )
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer
        self.config = config
        self.precision = precision
        self._captured: FixedShapes | None = None
        # The first look at a tokenizer changes its settings, which raises while another thread
        # encodes.
        (self._shortest,) = tokenize(tokenizer, config.max_tokens, [""])

    @classmethod
    def load(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        precision: Precision = Precision.AUTO,
        frozen: bool = False,
        peaks: Sequence[float] = (),
        items: bool = False,
    ) -> Self:
        """Load what :meth:`save` wrote, or any model that :func:`~.models.resolve` finds.

        Of two towers this is the one of histories, or with ``items`` that of the items; where there
        is one, it is both.

        A model that is not one of ours brings its pooling and length along where it was published
        for sentence-transformers. ``device`` is the GPU by default, where there is one. With
        ``precision`` bf16 on a device without instructions for it, fp32 is loaded, which is faster
        there; in bf16 a text's vector depends a little on the batch that it is in.
        ``frozen`` models can be neither trained nor saved, and answer faster: on a GPU as CUDA
        graphs, which are captured now. In int8 they are faster where their ``peaks`` are known, as
        :func:`~.layers.quantise` says.

        Raises:
            ModelError: there is no such model, or it cannot be loaded.
        """
        folder = resolve(model, revision)
        if items and has_two_towers(folder):
            folder = resolve(folder / ITEM_TOWER)
        config = read_settings(EncoderConfig, folder) or _published(folder, str(model), revision)
        place = pick_device(device)
        precision = usable(precision, place, frozen=frozen)
        dtype = weights_dtype(precision)
        backbone = load_pretrained(AutoModel.from_pretrained, folder, dtype=dtype)
        tokenizer = load_pretrained(AutoTokenizer.from_pretrained, folder)
        loaded = cls(backbone.eval(), tokenizer, config, place, precision)
        if precision is Precision.INT8:
            quantise(loaded.model, peaks)
        elif frozen:
            pack(loaded.model)
        if frozen:
            loaded._capture()
        return loaded

    @property
    def dimension(self) -> int:
        """D."""
        return self.config.dimensions or int(self.model.config.hidden_size)

    def inputs(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tokenised ``texts`` as [B, L] tensors on the CPU: what :func:`vectors` takes."""
        return pad(self.tokenizer, tokenize(self.tokenizer, self.config.max_tokens, texts))

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> FloatArray:
        """[B, D] L2-normalised vectors of ``texts``, in their order; zeros for a blank text."""
        out = np.zeros((len(texts), self.dimension), dtype=np.float32)
        filled = [index for index, text in enumerate(texts) if text.strip()]
        if filled:
            rows = tokenize(
                self.tokenizer, self.config.max_tokens, [texts[index] for index in filled]
            )
            out[filled] = self.run(rows, batch_size)
        return out

    def run(self, rows: Sequence[Row], batch_size: int = 64) -> FloatArray:
        """[B, D] vectors of one tokenised text or more; what is captured has batches of its own."""
        if self._captured is not None:
            return self._captured(rows)
        return infer(self.model, self.tokenizer, rows, self._vectors, batch_size, self.precision)

    def save(self, directory: Path) -> None:
        """Write a model folder (safetensors, tokenizer) and ``encoder.json``."""
        save_pretrained(self.model, self.tokenizer, directory, self.config)

    def _capture(self) -> None:
        self._captured = captured(
            self.model,
            self.tokenizer,
            self._vectors,
            shape=(self.dimension,),
            shortest=self._shortest,
            max_tokens=self.config.max_tokens,
            precision=self.precision,
        )

    def _vectors(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return vectors(self.model, inputs, self.config.pooling, self.config.dimensions)


def has_two_towers(folder: Path) -> bool:
    """Whether items have a tower of their own in an encoder's ``folder``."""
    return (folder / ITEM_TOWER / settings_name(EncoderConfig)).is_file()


def _published(folder: Path, model: str, revision: str | None) -> EncoderConfig:
    """Settings of a model that is not one of ours, from sentence-transformers' files if any."""
    values: dict[str, Any] = {"model": model, "revision": revision}
    length = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    values["max_tokens"] = length or fitting_max_tokens(folder)
    pooling = _published_pooling(folder, model)
    if pooling is not None:
        values["pooling"] = pooling
    return EncoderConfig(**values)


def _published_pooling(folder: Path, model: str) -> str | None:
    """The pooling that sentence-transformers' folder names, in its old form or its new one."""
    published = read_json(folder / "1_Pooling" / "config.json")
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
