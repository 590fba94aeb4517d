"""What all objectives are told, and how a run is recognised by it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from pydantic import Field

from fusionrec.config import Config
from fusionrec.errors import ConfigError
from fusionrec.language.encoder import ITEM_TOWER, has_two_towers
from fusionrec.language.models import DEFAULT_MODEL, resolve
from fusionrec.training.checkpoints import sha256_of
from fusionrec.training.examples import Examples
from fusionrec.training.task import Batch

HEAD = ("classifier", "score", "pre_classifier", "pooler")
"""How architectures call what stands on top of the transformer of a classifier."""


class Need(StrEnum):
    """What an objective is trained on besides the catalogue's texts."""

    HISTORIES = "histories"
    NEGATIVES = "negatives"
    RATINGS = "ratings"
    TEACHER = "teacher"
    REVIEWS = "reviews"


class TaskSettings(Config):
    """What is trained, whatever for."""

    encoder: str = DEFAULT_MODEL
    """Weights to start from: package:NAME, a folder, or a name on the hub."""
    revision: str | None = None
    """Commit of a hub model."""
    max_tokens: int = Field(64, ge=8)
    """Tokens that are read of a text (encoder, pretraining), of a pair of texts (reranker, rating)
    or of a prompt (decoder), in training and ever after."""

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the texts."""
        return frozenset()

    @property
    def read(self) -> frozenset[str]:
        """Names of the settings that are read."""
        return frozenset(type(self).model_fields)

    @property
    def compares_batch(self) -> bool:
        """Whether an example's loss depends on the others of its batch: on the batch's size."""
        return False


class HistorySettings(TaskSettings):
    """What is read of a history."""

    history_items: int = Field(5, ge=1)
    """Newest items that make the text of a history."""

    @property
    def needs(self) -> frozenset[Need]:
        """Histories and what came next."""
        return frozenset({Need.HISTORIES})

    @property
    def limits(self) -> dict[str, int]:
        """What the trained model keeps to ever after."""
        return {"max_tokens": self.max_tokens, "history_items": self.history_items}


def given(
    needs: frozenset[Need], examples: Examples | None, reviews: Sequence[str]
) -> dict[str, Any]:
    """What a task is made with besides settings and catalogue, by parameter."""
    histories = {"examples": examples} if Need.HISTORIES in needs else {}
    return histories | ({"reviews": reviews} if Need.REVIEWS in needs else {})


def identity(name: str, settings: TaskSettings, fingerprint: str) -> dict[str, Any]:
    """JSON that names the objective, its settings, examples and the weights it starts from."""
    # The weights themselves: a folder keeps its name when its model is trained again.
    folder = resolve(settings.encoder, settings.revision)
    files = sorted(folder.rglob("*.safetensors"))
    weights = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    made_of = {"name": name, "examples": fingerprint, "weights": weights}
    return made_of | settings.model_dump(mode="json")


def refuse_two_towers(settings: TaskSettings) -> None:
    """What trains one transformer would silently lose the other of an encoder with two towers.

    Raises:
        ConfigError: the items have a tower of their own in what such a task starts from.
    """
    folder = resolve(settings.encoder, settings.revision)
    if getattr(settings, "towers", 1) == 1 and has_two_towers(folder):
        raise ConfigError(
            f"setting encoder = {settings.encoder} is wrong: it has two towers and one is trained; "
            f"give --task encoder --towers 2, or --encoder {settings.encoder}/{ITEM_TOWER} to "
            "start from the one of the items"
        )


def part(batch: Batch, name: str) -> Batch:
    """The tensors of ``batch`` whose names begin with ``name.``, without it."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): t for key, t in batch.items() if key.startswith(prefix)}


def named(name: str, tensors: Batch) -> Batch:
    """The inverse of :func:`part`."""
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}
