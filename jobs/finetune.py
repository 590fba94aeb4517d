"""Fine-tune the encoder or the reranker on a data set's training histories.

::

    python -m jobs.finetune --task encoder --dataset DIR --out RUN
    python -m jobs.finetune --task reranker --dataset DIR --pipeline PIPELINE --out RUN
    python -m torch.distributed.run --nproc-per-node 2 -m jobs.finetune …      without Ray

The model is left in ``RUN/model``. ``jobs.embed --encoder RUN/model`` brings an encoder into a
pipeline; a reranker is copied into the pipeline whose fused candidates it was trained on. The same
command goes on with a run that was interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from pydantic import Field
from rich.console import Console

from fusionrec.bundles.gate import forget_measurements
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.splits import Protocol, split
from fusionrec.data.text import item_texts
from fusionrec.errors import ConfigError, DataError
from fusionrec.progress import bar
from fusionrec.training import preflight
from fusionrec.training.config import TrainingConfig
from fusionrec.training.engine import TrainingResult, prepare_process, train
from fusionrec.training.examples import Examples
from fusionrec.training.objectives.encoder import EncoderSettings
from fusionrec.training.objectives.reranker import RerankerSettings
from fusionrec.training.objectives.settings import TaskSettings
from fusionrec.training.tasks import OBJECTIVES, load_task, save_task
from fusionrec.training.tracking import Report
from jobs.entry import run

DEFAULTS: dict[str, dict[str, Any]] = {
    "encoder": {"batch_size": 64, "learning_rate": 1e-4, "max_tokens": 64},
    "reranker": {"batch_size": 8, "learning_rate": 2e-4, "max_tokens": 96},
}
"""Where a task's default is not the one of TrainingConfig and TaskSettings."""

_CHUNK = 128
"""Histories that the pipeline answers at a time."""


class FinetuneConfig(JobConfig, EncoderSettings, RerankerSettings, TrainingConfig):  # type: ignore[misc]
    """Fine-tune a language model: Ray Train and DeepSpeed, on CPUs or GPUs.

    Defaults by task: encoder --batch-size 64 --learning-rate 1e-4 --max-tokens 64; reranker
    --batch-size 8 --learning-rate 2e-4 --max-tokens 96.
    """

    task: Literal["encoder", "reranker"]
    """encoder: text of a history → text of the next item; reranker: history and candidate → score,
    against hard negatives from the pipeline's fused candidates."""
    dataset: Path
    """Data set that jobs.ingest wrote."""
    out: Path
    """Directory of the run: checkpoints, TensorBoard, model."""
    pipeline: Path | None = None
    """Pipeline directory: whence the reranker's negatives come, and whither the reranker goes."""
    protocol: Protocol = Protocol.LEAVE_ONE_OUT
    """Split whose training histories are used: leave-one-out or global-time."""
    num_workers: int = Field(1, ge=1)
    """Worker processes, each with a GPU where there are any; under torchrun its own number."""
    use_gpu: bool | None = None
    """Default: whether the cluster has GPUs now; say yes on one that scales up from none."""
    max_failures: int = Field(2, ge=-1)
    """How often failed workers are started again; −1 without end."""
    examples_per_user: int = Field(10, ge=1)
    """Newest training events of each user that become examples."""
    max_examples: int = Field(200_000, ge=1)
    """Examples in all; beyond it a random choice."""
    num_negatives: int = Field(7, ge=1)
    """Hard negatives of an example (reranker)."""
    negatives_from: int = Field(50, ge=1)
    """Negatives are drawn from the best so many fused candidates (reranker)."""

    def resolved(self) -> tuple[TaskSettings, TrainingConfig]:
        """Settings of task and engine, with the task's own defaults where nothing was said."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        values = DEFAULTS[self.task] | given
        kind = OBJECTIVES[self.task].settings
        others = {n for each in OBJECTIVES.values() for n in each.settings.model_fields}
        for name in sorted(given.keys() & others - kind.model_fields.keys()):
            flag = "--" + name.replace("_", "-")
            warnings.warn(f"{flag} is ignored by --task {self.task}: leave it out", stacklevel=2)
        return (
            kind(**{n: v for n, v in values.items() if n in kind.model_fields}),
            TrainingConfig(**{n: v for n, v in values.items() if n in TrainingConfig.model_fields}),
        )

    def need_pipeline(self) -> Path:
        """The pipeline directory.

        Raises:
            ConfigError: there is none.
        """
        if self.pipeline is None:
            raise ConfigError(
                "setting pipeline is missing: --task reranker takes its negatives from the fused "
                "candidates of a pipeline; give --pipeline DIR, which jobs.fit writes"
            )
        return self.pipeline


def finetune(config: FinetuneConfig) -> TrainingResult:
    """Make the examples, train, install.

    Raises:
        FusionRecError: see preflight, the engine and the worker.
    """
    settings, training = config.resolved()
    if config.task == "reranker":
        config.need_pipeline()  # said before anything is loaded
    launched = dist.is_torchelastic_launched()
    num_workers = int(os.environ["WORLD_SIZE"]) if launched else config.num_workers
    preflight.check(settings, training, config.out, num_workers=num_workers)
    if launched:
        result = _under_torchrun(config, settings, training)
    else:
        # Ray only where it is used: under torchrun it is not.
        from fusionrec.training import worker
        from jobs import cluster

        prepare(config, settings)
        with cluster.start():
            result = worker.fit(
                partial(load_task, config.out.resolve() / "examples"),
                training,
                config.out,
                num_workers=config.num_workers,
                use_gpu=config.use_gpu,
                max_failures=config.max_failures,
            )
    if config.task == "reranker" and int(os.environ.get("RANK", "0")) == 0:
        _install(Path(result.model), config.need_pipeline() / "reranker")
    return result


def prepare(config: FinetuneConfig, settings: TaskSettings) -> None:
    """Leave the examples in ``out/examples``, unless they are there from an interrupted run.

    Raises:
        ConfigError: the pipeline belongs to another data set.
        DataError: the catalogue has no text.
        TrainingError: there are no examples.
    """
    directory = config.out / "examples"
    dataset = Dataset.open(config.dataset)
    fields = ["protocol", "examples_per_user", "max_examples", "seed"]
    if config.task == "reranker":
        fields += ["num_negatives", "negatives_from"]
    request: dict[str, Any] = {"task": config.task, "dataset": dataset.info.fingerprint}
    request |= {"settings": settings.model_dump(mode="json")}
    request |= {name: getattr(config, name) for name in fields}
    if config.task == "reranker":
        # The negatives come from these; other weights rank other items at the top.
        parts = (config.need_pipeline() / name for name in ("pipeline.json", "fusion.json"))
        request["pipeline"] = [json.loads(p.read_text()) if p.is_file() else None for p in parts]
    known = directory / "request.json"
    if known.exists() and json.loads(known.read_text(encoding="utf-8")) == request:
        return
    known.unlink(missing_ok=True)
    if not dataset.catalogue.has_text:
        raise DataError(
            f"data set {dataset.info.name} has no text to train a language model on: leave this "
            "job out"
        )
    examples = Examples.of(
        split(dataset, config.protocol).train,
        per_user=config.examples_per_user,
        limit=config.max_examples,
        generator=np.random.default_rng([config.seed, 0]),
        with_text=np.array([bool(text) for text in item_texts(dataset.catalogue)]),
    )
    if config.task == "reranker":
        examples = _with_negatives(config, dataset, examples)
    examples = examples.newest(settings.history_items)
    save_task(config.task, settings, dataset.catalogue, examples, directory)
    known.write_text(json.dumps(request), encoding="utf-8")


def _with_negatives(config: FinetuneConfig, dataset: Dataset, examples: Examples) -> Examples:
    """Hard negatives: drawn from the top of the fused list of each example's history."""
    # Here, because it brings FAISS and every source along: the encoder needs none of them.
    from fusionrec.serving.pipeline import Pipeline, Stage

    stages = frozenset({Stage.EMBEDDER, Stage.RETRIEVER})
    pipeline = Pipeline.load(config.need_pipeline(), stages=stages)
    fitted = pipeline.config
    if fitted.dataset.fingerprint != dataset.info.fingerprint or fitted.protocol != config.protocol:
        raise ConfigError(
            f"setting pipeline = {config.pipeline} is wrong: it was fitted on "
            f"{fitted.dataset.name} under {fitted.protocol} and {config.dataset} is "
            f"{dataset.info.name} under {config.protocol}; give one that was fitted on the same"
        )
    candidates = np.full((len(examples), config.negatives_from), -1, dtype=np.int32)
    with bar("Collect hard negatives", len(examples)) as advance:
        for start in range(0, len(examples), _CHUNK):
            chunk = examples.histories.slice(start, min(start + _CHUNK, len(examples)))
            items = pipeline.recommend(chunk, rerank=False).items[:, : config.negatives_from]
            candidates[start : start + len(chunk), : items.shape[1]] = items
            advance(len(chunk))
    generator = np.random.default_rng([config.seed, 1])
    return examples.with_negatives(generator.permuted(candidates, axis=1), config.num_negatives)


def _under_torchrun(
    config: FinetuneConfig, settings: TaskSettings, training: TrainingConfig
) -> TrainingResult:
    """This process is one of several that torchrun started."""
    prepare_process(training)
    dist.init_process_group("nccl" if config.use_gpu else None)
    first = dist.get_rank() == 0
    try:
        if first:
            prepare(config, settings)
        dist.barrier()
        task = load_task(config.out / "examples")
        with bar(f"Fine-tune the {config.task}", None) as advance:
            shown = 0

            def on_report(report: Report) -> None:
                nonlocal shown
                note = f"loss {report.loss:.4f} · {report.examples_per_s:.1f} examples/s"
                if first:
                    advance(report.step - shown, note)
                shown = report.step

            return train(task, training, config.out, on_report=on_report)
    finally:
        dist.destroy_process_group()


def _install(model: Path, place: Path) -> None:
    """Copy ``model`` to ``place``, which is whole at any moment but the one of the two renames."""
    partial_copy = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial_copy, ignore_errors=True)
    shutil.copytree(model, partial_copy)
    shutil.rmtree(place, ignore_errors=True)
    partial_copy.rename(place)
    forget_measurements(place.parent)


def main() -> None:
    """Parse, train, report."""
    config = parse(FinetuneConfig)
    result = finetune(config)
    if int(os.environ.get("RANK", "0")) == 0:
        console = Console()
        rate = result.examples / result.seconds if result.seconds else 0.0
        console.print(
            f"{config.task}: {result.steps} steps, {result.examples:,} examples, last loss "
            f"{result.loss:.4f}, {rate:.1f} examples/s",
            soft_wrap=True,
        )
        console.print(f"model: {result.model}", soft_wrap=True)
        console.print(f"curves: tensorboard --logdir {config.out / 'tensorboard'}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
