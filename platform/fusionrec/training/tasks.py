"""A task on its way from the job to the workers: a folder with its settings, texts and examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fusionrec.config import Config
from fusionrec.data.catalogue import Catalogue
from fusionrec.language.models import resolve
from fusionrec.training.examples import Examples
from fusionrec.training.objectives.decoder import DecoderSettings, DecoderTask
from fusionrec.training.objectives.distillation import DistillationSettings, DistillationTask
from fusionrec.training.objectives.encoder import EncoderSettings, EncoderTask
from fusionrec.training.objectives.multitask import MultiTask, MultiTaskSettings
from fusionrec.training.objectives.pretraining import PretrainingSettings, PretrainingTask
from fusionrec.training.objectives.rating import RatingSettings, RatingTask
from fusionrec.training.objectives.reranker import RerankerSettings, RerankerTask
from fusionrec.training.objectives.settings import Need, TaskSettings, given
from fusionrec.training.task import Task

__all__ = ["OBJECTIVES", "TaskSettings", "load_task", "save_task"]


class Objective(NamedTuple):
    """What belongs together under one name."""

    settings: type[TaskSettings]
    task: Any
    """Of settings, catalogue, and what the settings need: examples, reviews; a Task."""


OBJECTIVES = {
    "encoder": Objective(EncoderSettings, EncoderTask),
    "reranker": Objective(RerankerSettings, RerankerTask),
    "decoder": Objective(DecoderSettings, DecoderTask),
    "pretraining": Objective(PretrainingSettings, PretrainingTask),
    "rating": Objective(RatingSettings, RatingTask),
    "distillation": Objective(DistillationSettings, DistillationTask),
    "multi-task": Objective(MultiTaskSettings, MultiTask),
}
"""By the name that jobs.finetune --task knows."""


_REVIEWS = "pretraining-reviews.parquet"


class _Stored(Config):
    name: str
    settings: dict[str, Any]


def save_task(
    name: str,
    settings: TaskSettings,
    catalogue: Catalogue,
    examples: Examples | None,
    directory: Path,
    reviews: Sequence[str] = (),
) -> None:
    """Leave in ``directory`` all that a worker needs to make the task; the JSON comes last.

    ``examples`` is None where the objective reads only texts: those of the catalogue and
    ``reviews``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if examples is not None:
        examples.save(directory)
    catalogue.save(directory / "catalogue.parquet")
    if Need.REVIEWS in settings.needs:
        pq.write_table(pa.table({"text": pa.array(reviews, pa.string())}), directory / _REVIEWS)
    if Path(settings.encoder).expanduser().is_dir():  # workers run in another folder
        settings = settings.model_copy(update={"encoder": str(resolve(settings.encoder))})
    stored = _Stored(name=name, settings=settings.model_dump(mode="json"))
    (directory / "task.json").write_text(stored.model_dump_json(indent=1), encoding="utf-8")


def load_task(directory: Path) -> Task:
    """The inverse of :func:`save_task`."""
    stored = _Stored.model_validate_json((directory / "task.json").read_bytes())
    objective = OBJECTIVES[stored.name]
    settings = objective.settings.model_validate(stored.settings)
    catalogue = Catalogue.load(directory / "catalogue.parquet")
    needs, reviews = settings.needs, []
    examples = Examples.load(directory) if Need.HISTORIES in needs else None
    if Need.REVIEWS in needs:
        reviews = pq.read_table(directory / _REVIEWS).column("text").to_pylist()
    task: Task = objective.task(settings, catalogue, **given(needs, examples, reviews))
    return task
