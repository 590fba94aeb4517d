"""The Ray Train loop around the engine: who starts the processes, not what they do.

Workers that die are started again by Ray and go on from the newest committed checkpoint, which the
engine finds by itself; nothing depends on what Ray remembers of the run. Where fewer are allowed,
Ray starts as many as there is room for, and each takes more batches. When Ray tells that a node
will be taken away, a checkpoint is left at the next report. The run's directory must be on storage
that all nodes see. A run takes 30–60 s to start: the workers import torch, DeepSpeed
and transformers.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

import ray
import ray.train
import ray.train.torch

from fusionrec import errors
from fusionrec.progress import bar
from fusionrec.training import engine
from fusionrec.training.config import RESULT, TrainingConfig
from fusionrec.training.devices import hide_gpus
from fusionrec.training.engine import TrainingResult, finished
from fusionrec.training.preflight import check_shares
from fusionrec.training.task import Task
from fusionrec.training.tracking import Report

_PASSED_ON = (
    "DS_ACCELERATOR",
    "TORCH_EXTENSIONS_DIR",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "WANDB_MODE",
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
    "WANDB_ENTITY",
)
"""Environment variables of the driver that decide what a worker finds."""
_NETWORK = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""The same, read when the group is formed, which Ray does before it runs our loop."""

Train: TypeAlias = Callable[..., TrainingResult]
"""With the arguments of :func:`fusionrec.training.engine.train`."""


def fit(
    make_task: Callable[[], Task],
    config: TrainingConfig,
    directory: Path,
    *,
    num_workers: int = 1,
    min_workers: int | None = None,
    use_gpu: bool | None = None,
    max_failures: int = 2,
    cpus: float | None = None,
    train: Train = engine.train,
) -> TrainingResult:
    """Train with Ray Train on the Ray that this process is connected to.

    Args:
        make_task: Called in every worker; picklable.
        config: Of the engine.
        directory: Of the run.
        num_workers: Processes; each gets a GPU, where GPUs are used.
        min_workers: As few are enough while the cluster has no room for more.
        use_gpu: By default, whether the cluster has any now.
        max_failures: How often the workers are started again after a failure.
        cpus: Reserved for each worker; by default see :func:`share_of_cpus`.
        train: What every worker calls in place of the engine, and which calls it; picklable.

    Raises:
        NonFiniteLoss, TrainingError, ModelError: as the engine does.
        TrainingError: workers failed more often than allowed, or there are too few GPUs.
        ConfigError: some number of workers could not share the batches of a step.
    """
    fewest = num_workers if min_workers is None else min_workers
    check_shares(fewest, num_workers, config.accumulation)
    if (directory / RESULT).exists():
        done = finished(make_task(), config, directory, num_workers)
        if done is not None:
            return done  # before workers start for nothing
    # Read when a run starts; the first start on a machine compiles an operator of DeepSpeed.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    cluster: Any = ray  # Ray's own annotations are partial
    resources = cluster.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    use_gpu = gpus > 0 if use_gpu is None else use_gpu
    if use_gpu and 0 < gpus < fewest:
        flag = "--num-workers" if min_workers is None else "--min-workers"
        raise errors.TrainingError(
            f"{flag} {fewest} needs as many GPUs and the cluster has {gpus}: set {flag} {gpus}, or "
            "--no-use-gpu"
        )
    if cpus is None:
        cpus = share_of_cpus(num_workers, elastic=fewest < num_workers)
    workers: Any = num_workers if fewest == num_workers else (fewest, num_workers)
    progress = directory / "progress.json"
    progress.unlink(missing_ok=True)
    environment = told(_PASSED_ON)

    def loop(settings: dict[str, Any]) -> dict[str, Any]:
        # Not one of the settings, which Ray shows on its dashboard: there are keys among it.
        os.environ.update(environment)
        if not use_gpu:
            hide_gpus()
        return _loop(settings)

    run_config: Any = ray.train.RunConfig  # a type checker takes it for that of Ray Train 1
    trainer: Any = ray.train.torch.TorchTrainer(
        cast("Callable[[dict[str, Any]], None]", loop),
        train_loop_config={
            "make_task": make_task,
            "train": train,
            "config": config.model_dump(mode="json"),
            "batches": num_workers * config.accumulation,
            "directory": str(directory),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=run_config(
            name="ray",
            storage_path=str(directory),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            worker_runtime_env={"env_vars": network} if (network := told(_NETWORK)) else None,
        ),
    )
    try:
        with _followed(progress, f"Fine-tune ({directory.name})"):
            answer = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise errors.TrainingError(
            f"the workers failed more than {max_failures} times, at last with: {reason}; the same "
            "command goes on from the newest checkpoint"
        ) from error
    assert answer is not None
    if "error" in answer:
        kind: type[errors.FusionRecError] = getattr(errors, answer["error"])
        raise kind(answer["message"])
    return TrainingResult.model_validate(answer["result"])


def told(names: Iterable[str]) -> dict[str, str]:
    """Those of the environment variables ``names`` that are set here."""
    return {name: os.environ[name] for name in names if name in os.environ}


def share_of_cpus(num_workers: int, *, elastic: bool = False) -> float:
    """CPUs that Ray reserves for each worker: one, or a fraction where cores are few.

    The driver's own actors need room too. Where Ray counts the workers that there is room for
    (``elastic``), it divides floats, which is exact for powers of two only.
    """
    cluster: Any = ray
    cpus: float = cluster.cluster_resources().get("CPU", 1.0)
    share = min(1.0, 0.8 * cpus / num_workers)
    return 2.0 ** math.floor(math.log2(share)) if elastic else round(share, 2)


def notices() -> Callable[[], bool]:
    """Whether Ray has told, since it was last asked, that a node will be taken away."""
    last: Any = None

    def noticed() -> bool:
        nonlocal last
        before, last = last, ray.train.get_preemption_info()  # the same on all ranks
        return last is not None and last != before

    return noticed


def _loop(settings: dict[str, Any]) -> dict[str, Any]:
    """What every worker runs; the return value of rank 0 reaches the driver."""
    progress = Path(settings["directory"]) / "progress.json"
    context = ray.train.get_context()
    first = context.get_world_rank() == 0
    config = TrainingConfig.model_validate(settings["config"])
    share = settings["batches"] // context.get_world_size()

    def on_report(report: Report) -> None:
        if first:
            _write(report, progress)
        ray.train.report(report.model_dump())  # waits for all ranks

    try:
        result = settings["train"](
            settings["make_task"](),
            config.model_copy(update={"accumulation": share}),
            Path(settings["directory"]),
            on_report=on_report,
            noticed=notices(),
        )
    except errors.FusionRecError as error:
        # Every rank is here together, and a second attempt would end here too: not a failure that
        # Ray should answer with one.
        return {"error": type(error).__name__, "message": str(error)}
    return {"result": result.model_dump(mode="json")}


def _write(report: Report, path: Path) -> None:
    """From rank 0 to the driver's bar, through the run's directory."""
    partial = path.with_suffix(".partial")
    partial.write_text(report.model_dump_json(), encoding="utf-8")
    partial.rename(path)


@contextmanager
def _followed(progress: Path, description: str) -> Iterator[None]:
    """Show a bar of what ``progress`` says for as long as the block runs."""
    done = threading.Event()

    def follow() -> None:
        # A minute, and two more where DeepSpeed's operator is compiled: nothing says how far it is.
        with bar("Start the workers, load the model", None):
            while not progress.exists():
                if done.wait(0.5):
                    return
        shown = 0
        total = Report.model_validate_json(progress.read_bytes()).total
        with bar(description, total) as advance:
            while True:
                last = done.wait(0.5)
                now = Report.model_validate_json(progress.read_bytes())
                advance(now.step - shown, now.note)
                shown = now.step
                if last:
                    return

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
