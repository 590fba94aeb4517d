"""Fine-tune a language model on a data set's training histories, or on its texts.

::

    python -m jobs.finetune --task encoder --dataset DIR --out RUN
    python -m jobs.finetune --task reranker --dataset DIR --pipeline PIPELINE --out RUN
    python -m jobs.finetune --task decoder --encoder DECODER --dataset DIR --pipeline PIPELINE …
    python -m jobs.finetune --task pretraining --dataset DIR --out RUN
    python -m jobs.finetune --task rating --dataset DIR --out RUN
    python -m jobs.finetune --task distillation --teacher RUN/model --dataset DIR --pipeline …
    python -m jobs.finetune --task multi-task --objectives encoder,pretraining --dataset DIR …
    python -m torch.distributed.run --nproc-per-node 2 -m jobs.finetune …      without Ray

The model is left in ``RUN/model``; ``--encoder RUN/model`` starts another task from it. The curves,
memory and settings of the run are on the page ``RUN/report.html``.
``jobs.embed --encoder RUN/model`` brings an encoder into a pipeline; a reranker is copied into the
pipeline whose fused candidates it was trained on. The same command goes on with a run that was
interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from pydantic import Field
from rich.console import Console

from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.splits import Protocol
from fusionrec.errors import (
    CheckpointNotWritten,
    ConfigError,
    DataError,
    NonFiniteLoss,
    Preempted,
)
from fusionrec.language.models import resolve
from fusionrec.progress import Advance, bar, console
from fusionrec.training import devices, preflight
from fusionrec.training.checkpoints import sha256_of
from fusionrec.training.config import TrainingConfig
from fusionrec.training.engine import TrainingResult, train
from fusionrec.training.launch import first_alone, join
from fusionrec.training.loads import load_of
from fusionrec.training.objectives.multitask import MultiTaskSettings
from fusionrec.training.objectives.settings import HistorySettings, Need, TaskSettings
from fusionrec.training.process import prepare_process
from fusionrec.training.tasks import OBJECTIVES, load_task, save_task
from fusionrec.training.tracking import Report, where
from jobs.entry import run
from jobs.examples import make_examples, make_reviews, stored_settings
from jobs.finished import leave_page, use

DEFAULTS: dict[str, dict[str, Any]] = {
    "encoder": {"batch_size": 64, "learning_rate": 1e-4, "max_tokens": 64},
    "reranker": {"batch_size": 8, "learning_rate": 2e-4, "max_tokens": 96},
    "decoder": {"batch_size": 4, "learning_rate": 2e-4, "max_tokens": 512, "num_negatives": 19},
    "pretraining": {"batch_size": 32, "learning_rate": 1e-4, "max_tokens": 128},
    "rating": {"batch_size": 32, "learning_rate": 1e-4, "max_tokens": 96},
    "distillation": {"batch_size": 8, "learning_rate": 2e-4, "max_tokens": 96},
    "multi-task": {"batch_size": 16, "learning_rate": 1e-4, "max_tokens": 96},
}
"""Where a task's default is not the one of TrainingConfig and TaskSettings."""


class FinetuneConfig(  # type: ignore[misc]
    JobConfig,
    MultiTaskSettings,
    TrainingConfig,
):
    """Fine-tune a language model: Ray Train and DeepSpeed, on CPUs or GPUs.

    Defaults by task: encoder --batch-size 64 --learning-rate 1e-4 --max-tokens 64; reranker
    --batch-size 8 --learning-rate 2e-4 --max-tokens 96; decoder --batch-size 4 --learning-rate 2e-4
    --max-tokens 512 --num-negatives 19; pretraining --batch-size 32 --learning-rate 1e-4
    --max-tokens 128; rating --batch-size 32 --learning-rate 1e-4 --max-tokens
    96; distillation --batch-size 8 --learning-rate 2e-4 --max-tokens 96; multi-task --batch-size 16
    --learning-rate 1e-4 --max-tokens 96.
    """

    task: Literal[
        "encoder", "reranker", "decoder", "pretraining", "rating", "distillation", "multi-task"
    ]
    """encoder: text of a history → text of the next item; reranker: history and candidate → score,
    against hard negatives from the pipeline's fused candidates; decoder: the same by a causal
    language model's answer; pretraining: the texts of catalogue and reviews, masked for an
    encoder, causal for a decoder; rating: history and item → rating; distillation: a reranker's
    scores → a smaller model; multi-task: several of these at once."""
    dataset: Path
    """Data set that jobs.ingest wrote."""
    out: Path
    """Directory of the run: checkpoints, TensorBoard, model."""
    pipeline: Path | None = None
    """Pipeline directory: whence the reranker's negatives come, and whither the reranker goes."""
    teacher: Path | None = None
    """Folder of the reranker, of either kind, that is learned from (distillation)."""
    protocol: Protocol = Protocol.LEAVE_ONE_OUT
    """Split whose training histories are used: leave-one-out or global-time."""
    num_workers: int = Field(1, ge=1)
    """Worker processes, each with a GPU where there are any; under torchrun its own number."""
    min_workers: int | None = Field(None, ge=1)
    """Start, and go on, with so few workers while the cluster has no room for more (Ray only). A
    step keeps its batches: every number from here to --num-workers must divide --num-workers ×
    --accumulation."""
    use_gpu: bool | None = None
    """Default: whether the cluster, or under torchrun this machine, has GPUs now; say yes on a
    cluster that scales up from none."""
    dry_run: bool = False
    """Check the settings, say what memory and disk the run will take, and end."""
    max_failures: int = Field(2, ge=-1)
    """How often failed workers are started again; −1 without end."""
    examples_per_user: int = Field(10, ge=1)
    """Newest training events of each user that become examples."""
    max_examples: int = Field(200_000, ge=1)
    """Examples in all, or reviews (pretraining); beyond it a random choice."""
    num_negatives: int = Field(7, ge=1)
    """Hard negatives of an example (reranker, decoder, distillation)."""
    negatives_from: int = Field(50, ge=1)
    """Negatives are drawn from the best so many fused candidates (reranker, decoder,
    distillation)."""

    def resolved(self) -> tuple[TaskSettings, TrainingConfig]:
        """Settings of task and engine, with the task's own defaults where nothing was said."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        values = DEFAULTS[self.task] | given
        kind = OBJECTIVES[self.task].settings
        settings = kind(**{n: v for n, v in values.items() if n in kind.model_fields})
        others = {n for each in OBJECTIVES.values() for n in each.settings.model_fields}
        whose = f"--task {self.task}"
        if isinstance(settings, MultiTaskSettings):
            whose = f"--objectives {','.join(settings.objectives)}"
        for name in sorted(given.keys() & others - settings.read):
            flag = "--" + name.replace("_", "-")
            warnings.warn(f"{flag} is ignored by {whose}: leave it out", stacklevel=2)
        return (
            settings,
            TrainingConfig(**{n: v for n, v in values.items() if n in TrainingConfig.model_fields}),
        )

    @property
    def trained(self) -> dict[str, Path]:
        """Every objective that is trained, and where its model is in that of the run."""
        if self.task == "multi-task":
            return {part.value: Path(part.value) for part in self.objectives}
        return {self.task: Path()}

    @property
    def num_negatives_of_task(self) -> int:
        """As given, or else the task's own default."""
        given = "num_negatives" in self.model_fields_set
        default: int = DEFAULTS[self.task].get("num_negatives", self.num_negatives)
        return self.num_negatives if given else default

    def need(self, name: Literal["pipeline", "teacher"]) -> Path:
        """A directory that the task cannot do without.

        Raises:
            ConfigError: it was not given.
        """
        place: Path | None = getattr(self, name)
        if place is None:
            reasons = {
                "pipeline": "takes its negatives from the fused candidates of a pipeline; give "
                "--pipeline DIR, which jobs.fit writes",
                "teacher": "learns from a trained reranker; give --teacher DIR, the model folder "
                "of its run",
            }
            raise ConfigError(f"setting {name} is missing: --task {self.task} {reasons[name]}")
        return place

    def check(self, settings: TaskSettings) -> None:
        """Say what is missing, or does not fit together, before anything is loaded.

        Raises:
            ConfigError: names it.
        """
        if isinstance(settings, MultiTaskSettings):
            settings.refuse_misfits()
        if Need.NEGATIVES in settings.needs:
            self.need("pipeline")
        if Need.TEACHER in settings.needs:
            self.need("teacher")
        if "decoder" in self.trained and "encoder" not in self.model_fields_set:
            raise ConfigError(
                "setting encoder is missing: a decoder needs a causal language model to start "
                "from; give --encoder FOLDER"
            )


def finetune(config: FinetuneConfig) -> TrainingResult:
    """Make the examples, train, install, and leave the run's page.

    Raises:
        FusionRecError: see preflight, the engine and the worker.
    """
    settings, training = config.resolved()
    with ExitStack() as stack:
        if dist.is_torchelastic_launched():
            if config.use_gpu is False:
                devices.hide_gpus()
            prepare_process(training)  # before the plan looks at this process's GPU
            train_it = _under_torchrun
        else:
            # Ray only where it is used: under torchrun it is not.
            from jobs import cluster

            if cluster.is_given():
                stack.enter_context(cluster.start())  # the plan is about its nodes
            train_it = _under_ray
        planned = plan(config)
        if _first():
            console.print(planned.sentence, highlight=False, soft_wrap=True)
        try:
            result = train_it(config, settings, training)
        except (NonFiniteLoss, CheckpointNotWritten, Preempted) as error:
            if _first():
                leave_page(config, planned.estimate, None, str(error))
            raise
    if _first():
        use(config, Path(result.model))
        leave_page(config, planned.estimate, result)
    return result


def _under_ray(
    config: FinetuneConfig, settings: TaskSettings, training: TrainingConfig
) -> TrainingResult:
    from fusionrec.training import worker
    from jobs import cluster

    prepare(config, settings)
    with cluster.start():
        return worker.fit(
            partial(load_task, config.out.resolve() / "examples"),
            training,
            config.out,
            num_workers=config.num_workers,
            min_workers=config.min_workers,
            use_gpu=config.use_gpu,
            max_failures=config.max_failures,
        )


def plan(config: FinetuneConfig) -> preflight.Plan:
    """What the run will take; reads neither weights nor data.

    Raises:
        FusionRecError: see preflight.
    """
    settings, training = config.resolved()
    config.check(settings)
    workers_here = config.num_workers
    if dist.is_torchelastic_launched():
        num_workers = fewest = int(os.environ["WORLD_SIZE"])
        workers_here = int(os.environ["LOCAL_WORLD_SIZE"])
        if config.min_workers is not None:
            warnings.warn("--min-workers is ignored under torchrun: leave it out", stacklevel=2)
        device = devices.of_this_machine(workers_here, use_gpu=config.use_gpu)
    else:
        num_workers, fewest = config.num_workers, config.min_workers or config.num_workers
        preflight.check_shares(fewest, num_workers, training.accumulation)
        from jobs import cluster

        device = cluster.worker_device(config.num_workers, use_gpu=config.use_gpu)
    return preflight.check(
        settings,
        training,
        config.out,
        lambda task, size: load_of(config.task, task, size, config.num_negatives_of_task),
        num_workers=num_workers,
        fewest=fewest,
        workers_here=workers_here,
        device=device,
    )


def _first() -> bool:
    """Whether this process is the one that talks."""
    return int(os.environ.get("RANK", "0")) == 0


def prepare(config: FinetuneConfig, settings: TaskSettings) -> None:
    """Leave the examples in ``out/examples``, unless they are there from an interrupted run.

    Raises:
        ConfigError: the pipeline belongs to another data set.
        DataError: the catalogue has no text.
        TrainingError: there are no examples.
    """
    directory = config.out / "examples"
    dataset = Dataset.open(config.dataset)
    needs = settings.needs
    request: dict[str, Any] = {"task": config.task, "dataset": dataset.info.fingerprint}
    request |= {"settings": settings.model_dump(mode="json")}
    if needs:
        fields = ["protocol", "max_examples", "seed"]
        fields += ["examples_per_user"] if Need.HISTORIES in needs else []
        request |= {name: getattr(config, name) for name in fields}
    if Need.NEGATIVES in needs:
        request |= {
            "num_negatives": config.num_negatives_of_task,
            "negatives_from": config.negatives_from,
        }
        # The negatives come from these; other weights rank other items at the top.
        request["pipeline"] = stored_settings(config.need("pipeline"))
    if Need.TEACHER in needs:
        weights = sorted(resolve(config.need("teacher")).glob("*.safetensors"))
        request["teacher"] = [sha256_of(path) for path in weights]
    known = directory / "request.json"
    if known.exists() and json.loads(known.read_text(encoding="utf-8")) == request:
        return
    known.unlink(missing_ok=True)
    if not dataset.catalogue.has_text:
        raise DataError(
            f"data set {dataset.info.name} has no text to train a language model on: leave this "
            "job out"
        )
    examples = None  # of what reads texts alone
    if isinstance(settings, HistorySettings):
        examples = make_examples(config, settings, dataset)
    reviews = make_reviews(config, dataset) if Need.REVIEWS in needs else []
    save_task(config.task, settings, dataset.catalogue, examples, directory, reviews)
    known.write_text(json.dumps(request), encoding="utf-8")


def _under_torchrun(
    config: FinetuneConfig, settings: TaskSettings, training: TrainingConfig
) -> TrainingResult:
    """This process is one of several that torchrun started."""
    join()
    first = dist.get_rank() == 0
    try:
        first_alone(lambda: prepare(config, settings))
        task = load_task(config.out / "examples")
        with ExitStack() as stack:
            advance: Advance | None = None
            shown = 0

            def on_report(report: Report) -> None:
                nonlocal advance, shown
                if first:
                    # Only now is it known how many steps there are.
                    advance = advance or stack.enter_context(
                        bar(f"Fine-tune ({config.task})", report.total)
                    )
                    advance(report.step - shown, report.note)
                shown = report.step

            return train(task, training, config.out, on_report=on_report)
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Parse, train, report."""
    config = parse(FinetuneConfig)
    if config.dry_run:
        sys.stdout.write(f"{plan(config).sentence}\n")
        return
    result = finetune(config)
    if _first():
        console = Console()
        rate = result.examples / result.seconds if result.seconds else 0.0
        console.print(
            f"{config.task}: {result.steps} steps, {result.examples:,} examples, last loss "
            f"{result.loss:.4f}, {rate:.1f} examples/s",
            soft_wrap=True,
        )
        console.print(f"model: {result.model}", soft_wrap=True)
        console.print(f"page: {config.out / 'report.html'}", soft_wrap=True)
        for tracker in config.trackers:
            console.print(f"curves: {where(tracker, config.out)}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
