"""A task on its way from the job to the workers: a folder with its settings, texts and examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fusionrec.config import Config
from fusionrec.data.catalogue import Catalogue
from fusionrec.language.models import resolve
from fusionrec.training.examples import Examples
from fusionrec.training.objectives.encoder import EncoderSettings, EncoderTask
from fusionrec.training.objectives.reranker import RerankerSettings, RerankerTask
from fusionrec.training.objectives.settings import TaskSettings
from fusionrec.training.task import Task

__all__ = ["OBJECTIVES", "TaskSettings", "load_task", "save_task"]


class Objective(NamedTuple):
    """What belongs together under one name."""

    settings: type[TaskSettings]
    task: Any
    """Of settings, catalogue and examples; a Task."""


OBJECTIVES = {
    "encoder": Objective(EncoderSettings, EncoderTask),
    "reranker": Objective(RerankerSettings, RerankerTask),
}
"""By the name that jobs.finetune --task knows."""


class _Stored(Config):
    name: str
    settings: dict[str, Any]


def save_task(
    name: str,
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
    stored = _Stored(name=name, settings=settings.model_dump(mode="json"))
    (directory / "task.json").write_text(stored.model_dump_json(indent=1), encoding="utf-8")


def load_task(directory: Path) -> Task:
    """The inverse of :func:`save_task`."""
    stored = _Stored.model_validate_json((directory / "task.json").read_bytes())
    objective = OBJECTIVES[stored.name]
    task: Task = objective.task(
        objective.settings.model_validate(stored.settings),
        Catalogue.load(directory / "catalogue.parquet"),
        Examples.load(directory),
    )
    return task
