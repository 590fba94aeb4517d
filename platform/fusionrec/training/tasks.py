"""The two language models as tasks: the encoder and the reranker.

Both read the catalogue's texts and :class:`~fusionrec.training.examples.Examples`. Texts are
tokenised batch by batch, which costs a hundredth of the step that follows. Shape legend: B examples
of a batch, M negatives, I items, D dimensions.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field

from fusionrec.config import Config
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import IntArray
from fusionrec.data.text import history_texts, item_text
from fusionrec.language.encoder import Encoder, vectors
from fusionrec.language.inference import pad, tokenize
from fusionrec.language.models import DEFAULT_MODEL, resolve
from fusionrec.language.objectives.info_nce import info_nce
from fusionrec.language.objectives.listwise import listwise_softmax
from fusionrec.language.reranker import Reranker
from fusionrec.training.checkpoints import sha256_of
from fusionrec.training.examples import Examples
from fusionrec.training.task import Batch, shuffled

_HEAD = ("classifier", "score", "pre_classifier", "pooler")
"""How architectures call what stands on top of the transformer."""


class TaskSettings(Config):
    """What is trained on the examples."""

    encoder: str = DEFAULT_MODEL
    """Weights to start from: package:NAME, a folder, or a name on the hub."""
    revision: str | None = None
    """Commit of a hub model."""
    max_tokens: int = Field(64, ge=8)
    """Tokens that are read of a text (encoder) or of a pair of texts (reranker), in training and
    ever after."""
    history_items: int = Field(5, ge=1)
    """Newest items that make the text of a history."""
    temperature: float = Field(0.05, gt=0)
    """Divides the cosines of the encoder before the softmax."""
    popularity_correction: bool = False
    """Whether the encoder's loss undoes that popular items are drawn as negatives more often. Off,
    because popularity is a source of its own in the fusion, and text should say something else."""


class EncoderTask:
    """Vectors of histories near the vectors of what came next: InfoNCE over the batch's items."""

    name = "encoder"
    head: tuple[str, ...] = ()

    def __init__(self, settings: TaskSettings, catalogue: Catalogue, examples: Examples) -> None:
        self._settings, self._catalogue, self._examples = settings, catalogue, examples

    @property
    def identity(self) -> dict[str, Any]:
        """See :class:`~fusionrec.training.task.Task`."""
        return _identity(self.name, self._settings, self._examples)

    def build_model(self) -> torch.nn.Module:
        """The transformer; pooling is part of the loss."""
        found = Encoder.load(self._settings.encoder, revision=self._settings.revision, device="cpu")
        # Not the encoder itself: the engine alone decides how many copies of the weights there are.
        self._tokenizer = found.tokenizer
        self._config = found.config.model_copy(update=_limits(self._settings))
        model: torch.nn.Module = found.model
        return model

    def plan(self, batch_size: int, generator: np.random.Generator) -> list[IntArray]:
        """Random batches."""
        return shuffled(len(self._examples), batch_size, generator)

    def batch(self, examples: IntArray) -> Batch:
        """Tokens of histories and items, and [B, B] which items the user of a history had."""
        rows = self._examples.take(examples)
        histories, items = self._texts(rows)
        batch = {"had": torch.from_numpy(rows.seen_by(rows.users, rows.positives))}
        if self._settings.popularity_correction:
            batch["log_popularity"] = self._log_popularity[torch.from_numpy(rows.positives).long()]
        for part, texts in (("history", histories), ("item", items)):
            tokens = pad(self._tokenizer, tokenize(self._tokenizer, self._config.max_tokens, texts))
            batch |= {f"{part}.{name}": tensor for name, tensor in tokens.items()}
        return batch

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """InfoNCE; an item that a history's user had anyway is no negative of that history."""
        histories = vectors(model, _part(batch, "history"), self._config.pooling)
        items = vectors(model, _part(batch, "item"), self._config.pooling)
        return info_nce(
            histories,
            items,
            batch["had"],
            temperature=self._settings.temperature,
            log_popularity=batch.get("log_popularity"),
        )

    def describe(self, examples: IntArray) -> list[dict[str, Any]]:
        """The texts."""
        rows = self._examples.take(examples)
        histories, items = self._texts(rows)
        return [
            {"example": int(example), "history": history, "item": item}
            for example, history, item in zip(examples, histories, items, strict=True)
        ]

    def save(self, model: torch.nn.Module, directory: Path) -> None:
        """What ``Encoder.load`` reads."""
        Encoder(model, self._tokenizer, self._config).save(directory)

    @cached_property
    def _log_popularity(self) -> torch.Tensor:
        """[I] log of each item's share of the training events, one event added to each."""
        counts = np.bincount(self._examples.seen.items, minlength=len(self._catalogue)) + 1
        return torch.from_numpy(np.log(counts / counts.sum())).float()

    def _texts(self, rows: Examples) -> tuple[list[str], list[str]]:
        histories = history_texts(self._catalogue, rows.histories, self._settings.history_items)
        return histories, [item_text(self._catalogue, int(code)) for code in rows.positives]


class RerankerTask:
    """What came next above hard negatives: a softmax over each example's list of 1 + M items."""

    name = "reranker"
    head = _HEAD

    def __init__(self, settings: TaskSettings, catalogue: Catalogue, examples: Examples) -> None:
        assert examples.negatives.shape[1] > 0
        self._settings, self._catalogue, self._examples = settings, catalogue, examples

    @property
    def identity(self) -> dict[str, Any]:
        """See :class:`~fusionrec.training.task.Task`."""
        return _identity(self.name, self._settings, self._examples)

    def build_model(self) -> torch.nn.Module:
        """A classifier with one logit."""
        found = Reranker.load(
            self._settings.encoder, revision=self._settings.revision, device="cpu"
        )
        self._tokenizer = found.tokenizer
        self._config = found.config.model_copy(update=_limits(self._settings))
        model: torch.nn.Module = found.model
        return model

    def plan(self, batch_size: int, generator: np.random.Generator) -> list[IntArray]:
        """Random batches."""
        return shuffled(len(self._examples), batch_size, generator)

    def batch(self, examples: IntArray) -> Batch:
        """Tokens of B × (1 + M) pairs, the positive first, and which of them exist."""
        rows = self._examples.take(examples)
        codes = np.column_stack([rows.positives, rows.negatives])
        exists = codes >= 0
        histories = history_texts(self._catalogue, rows.histories, self._settings.history_items)
        lists, places = np.nonzero(exists)
        rows_of_tokens = tokenize(
            self._tokenizer,
            self._config.max_tokens,
            [histories[row] for row in lists],
            [item_text(self._catalogue, int(code)) for code in codes[lists, places]],
        )
        pairs = pad(self._tokenizer, rows_of_tokens)
        return {f"pair.{n}": t for n, t in pairs.items()} | {"exists": torch.from_numpy(exists)}

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Listwise softmax."""
        exists = batch["exists"]
        logits = model(**_part(batch, "pair")).logits[:, 0].float()
        scores = torch.zeros(exists.shape, device=logits.device).masked_scatter(exists, logits)
        first = torch.zeros_like(scores)
        first[:, 0] = 1.0
        return listwise_softmax(scores, first, exists)

    def describe(self, examples: IntArray) -> list[dict[str, Any]]:
        """The texts."""
        rows = self._examples.take(examples)
        histories = history_texts(self._catalogue, rows.histories, self._settings.history_items)
        return [
            {
                "example": int(example),
                "history": histories[row],
                "item": item_text(self._catalogue, int(rows.positives[row])),
                "negatives": [
                    item_text(self._catalogue, int(c)) for c in rows.negatives[row] if c >= 0
                ],
            }
            for row, example in enumerate(examples)
        ]

    def save(self, model: torch.nn.Module, directory: Path) -> None:
        """What ``Reranker.load`` reads."""
        Reranker(model, self._tokenizer, self._config).save(directory)


AnyTask: TypeAlias = EncoderTask | RerankerTask


class _Stored(Config):
    name: Literal["encoder", "reranker"]
    settings: TaskSettings


def save_task(
    name: Literal["encoder", "reranker"],
    settings: TaskSettings,
    catalogue: Catalogue,
    examples: Examples,
    directory: Path,
) -> None:
    """Leave in ``directory`` all that a worker needs to make the task; the JSON comes last."""
    examples.save(directory)
    catalogue.save(directory / "catalogue.parquet")
    if Path(settings.encoder).expanduser().is_dir():  # workers run in another folder
        settings = settings.model_copy(update={"encoder": str(resolve(settings.encoder))})
    stored = _Stored(name=name, settings=settings)
    (directory / "task.json").write_text(stored.model_dump_json(indent=1), encoding="utf-8")


def load_task(directory: Path) -> AnyTask:
    """The inverse of :func:`save_task`."""
    stored = _Stored.model_validate_json((directory / "task.json").read_bytes())
    kind = EncoderTask if stored.name == "encoder" else RerankerTask
    catalogue = Catalogue.load(directory / "catalogue.parquet")
    return kind(stored.settings, catalogue, Examples.load(directory))


def _identity(name: str, settings: TaskSettings, examples: Examples) -> dict[str, Any]:
    # The weights themselves: a folder keeps its name when its model is trained again.
    folder = resolve(settings.encoder, settings.revision)
    weights = {path.name: sha256_of(path) for path in sorted(folder.glob("*.safetensors"))}
    made_of = {"name": name, "examples": examples.fingerprint, "weights": weights}
    return made_of | settings.model_dump(mode="json")


def _limits(settings: TaskSettings) -> dict[str, int]:
    return {"max_tokens": settings.max_tokens, "history_items": settings.history_items}


def _part(batch: Batch, name: str) -> Batch:
    prefix = f"{name}."
    return {key.removeprefix(prefix): t for key, t in batch.items() if key.startswith(prefix)}
