"""What ``jobs.finetune`` does when training has ended: installs, measures, leaves its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionrec.data.dataset import Dataset
from fusionrec.data.splits import split
from fusionrec.progress import console
from fusionrec.training.engine import TrainingResult
from fusionrec.training.memory import Estimate
from fusionrec.training.page import Told, write
from jobs.distilled import distillation_report
from jobs.examples import rating_report
from jobs.installed import install

if TYPE_CHECKING:
    from jobs.finetune import FinetuneConfig


_RATED_CASES = 2_000
"""Cases of validation, and of test, whose ratings a rater is measured on at most."""


def use(config: FinetuneConfig, model: Path) -> None:
    """Do with the trained model what its task is for."""
    places = {objective: model / place for objective, place in config.trained.items()}
    if "distillation" in places:
        kept = distillation_report(
            places["distillation"],
            config.student,
            config.need("teacher"),
            config.need("pipeline"),
            Dataset.open(config.dataset),
            config.seed,
        )
        text = kept.model_dump_json(indent=1) + "\n"
        (config.out / "distillation.json").write_text(text, encoding="utf-8")
        console.print(kept.sentence, highlight=False, soft_wrap=True)
    learned = config.student if config.task == "distillation" else config.task
    if learned in ("reranker", "decoder"):
        install(model, config.need("pipeline") / "reranker")
    if "rating" in places:
        dataset = Dataset.open(config.dataset)
        report = rating_report(
            places["rating"], dataset, split(dataset, config.protocol), max_cases=_RATED_CASES
        )
        text = json.dumps(report, indent=1)
        (config.out / "rating-errors.json").write_text(text, encoding="utf-8")
        for part, predictors in report.items():
            for name, errors in predictors.items():
                told = f"MAE {errors['mae']:.4f}, RMSE {errors['rmse']:.4f}"
                sys.stdout.write(f"{part}, {name}: {told}\n")


def leave_page(
    config: FinetuneConfig, estimate: Estimate, result: TrainingResult | None, stopped: str = ""
) -> Path | None:
    """Write ``report.html`` into the run's directory; nothing where no step was ever begun."""
    told = Told(
        task=config.task,
        dataset=Dataset.open(config.dataset).info,
        settings=_settings(config),
        estimate=estimate,
        result=result,
        stopped=stopped,
    )
    return write(config.out, told)


def _settings(config: FinetuneConfig) -> dict[str, Any]:
    """Those that the task reads, as they were resolved, and the job's own."""
    of_task, of_engine = config.resolved()
    whole = config.model_dump(mode="json")
    own = {name: whole[name] for name in type(config).__annotations__ if name in whole}
    resolved = own | of_task.model_dump(mode="json") | of_engine.model_dump(mode="json")
    return {name: value for name, value in sorted(resolved.items()) if value is not None}
