"""What a run tells while it goes: reports of progress, and curves for one tracker or several.

A tracker takes numbers by step, on rank 0 only. One of them is always there: the file that a run's
page is drawn of (:mod:`fusionrec.training.curves`). TensorBoard's files lie in the run's directory,
and so do those of MLflow and Weights & Biases unless their own environment variables name a server
(``MLFLOW_TRACKING_URI``; ``WANDB_MODE=online`` with ``WANDB_API_KEY``). A tracker that fails is
dropped with a message: no run ends because a server is down.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import torch.distributed as dist
from pydantic import ConfigDict

from fusionrec.config import Config
from fusionrec.errors import Preempted
from fusionrec.progress import console
from fusionrec.training.config import TrackerName, TrainingConfig
from fusionrec.training.curves import CURVES, Curves
from fusionrec.training.peak import PeakMemory
from fusionrec.training.task import Batch

T = TypeVar("T")


class Report(Config):
    """Progress after a step."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    step: int
    """Optimizer steps done."""
    total: int
    """Optimizer steps of the whole run."""
    epoch: int
    """From 0."""
    loss: float
    """Mean over the batches of all workers in this step."""
    learning_rate: float
    grad_norm: float
    """Global L2 norm before clipping; NaN for a step that was left out."""
    examples_per_s: float
    """Of all workers together, since the last report."""
    tokens_per_s: float
    """Of all workers together, since the last report, padding not counted."""
    skipped: int
    """Steps left out so far because a loss or a gradient was not finite."""
    spikes: int
    """Losses so far that were far above the ones before them."""
    memory_bytes: tuple[int, ...]
    """The most that each worker took since the last report: of its device, or what its process grew
    by."""

    @property
    def note(self) -> str:
        """What stands behind a progress bar."""
        rates = f"{self.examples_per_s:.1f} examples/s · {self.tokens_per_s:,.0f} tokens/s"
        faults = f" · {self.skipped} left out" if self.skipped else ""
        faults += f" · {self.spikes} spikes" if self.spikes else ""
        return f"loss {self.loss:.4f} · {rates}{faults}"


class Tracker(Protocol):
    """Where curves go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep the numbers of one step."""
        ...

    def close(self, error: BaseException | None) -> None:
        """Write what is not written yet, and how the run ended: ``error`` is what ended it."""
        ...


class TensorBoard:
    """Event files in ``tensorboard/``."""

    def __init__(self, directory: Path, start: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run writes its steps again: TensorBoard drops the first copy.
        self._writer: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        text = "\n".join(f"    {name}: {value}" for name, value in settings.items())
        self._writer.add_text("settings", text, start)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, _: BaseException | None) -> None:
        """See :class:`Tracker`."""
        self._writer.close()


class MLflow:
    """A run of the experiment ``fusionrec``: in ``mlflow.db``, or on the environment's server."""

    def __init__(self, directory: Path, _: int, settings: Mapping[str, Any]) -> None:
        import mlflow
        import mlflow.entities

        library: Any = mlflow
        self._metric = library.entities.Metric
        directory = directory.resolve()
        local = f"sqlite:///{directory / 'mlflow.db'}"
        self._client = library.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local)
        # A resumed run goes on in the same one.
        known = directory / "mlflow-run"
        if not known.exists():
            found = self._client.get_experiment_by_name("fusionrec")
            experiment = (
                found.experiment_id
                if found
                else self._client.create_experiment("fusionrec", (directory / "mlflow").as_uri())
            )
            run = self._client.create_run(experiment, run_name=directory.name).info.run_id
            params = [library.entities.Param(k, str(v)[:500]) for k, v in settings.items()]
            self._client.log_batch(run, params=params)
            known.write_text(run, encoding="utf-8")
        self._run = known.read_text(encoding="utf-8")
        self._client.update_run(self._run, status="RUNNING")  # again, where it was resumed

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`."""
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, error: BaseException | None) -> None:
        """See :class:`Tracker`."""
        killed = isinstance(error, Preempted | KeyboardInterrupt)
        ended = "KILLED" if killed else "FAILED"
        self._client.set_terminated(self._run, "FINISHED" if error is None else ended)


class WeightsAndBiases:
    """A run of the project ``fusionrec``: offline in ``wandb/`` unless WANDB_MODE says more."""

    def __init__(self, directory: Path, _: int, settings: Mapping[str, Any]) -> None:
        import wandb

        library: Any = wandb
        self._run = library.init(
            project="fusionrec",
            name=directory.name,
            # The same for a resumed run.
            id=hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=directory,
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(settings),
            settings=library.Settings(silent=True, console="off"),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self, error: BaseException | None) -> None:
        """See :class:`Tracker`."""
        self._run.finish(exit_code=int(error is not None))


MEMORY = "memory_bytes/worker-"
"""What the curves of the workers' memory are called, before the rank."""
_KINDS: dict[TrackerName, Callable[[Path, int, Mapping[str, Any]], Tracker]] = {
    TrackerName.TENSORBOARD: TensorBoard,
    TrackerName.MLFLOW: MLflow,
    TrackerName.WANDB: WeightsAndBiases,
}


def _kinds(
    chosen: Sequence[TrackerName],
) -> dict[str, Callable[[Path, int, Mapping[str, Any]], Tracker]]:
    return {CURVES: Curves} | {name: _KINDS[name] for name in chosen}


def where(tracker: TrackerName, directory: Path) -> str:
    """How the curves of the run in ``directory`` are looked at."""
    if tracker is TrackerName.TENSORBOARD:
        return f"tensorboard --logdir {directory / 'tensorboard'}"
    if tracker is TrackerName.MLFLOW:
        local = f"sqlite:///{(directory / 'mlflow.db').resolve()}"
        server = os.environ.get("MLFLOW_TRACKING_URI")
        return server or f"mlflow ui --backend-store-uri {local}"
    if os.environ.get("WANDB_MODE", "offline") == "offline":
        return f"wandb sync {directory / 'wandb'}/offline-run-*"
    return "the project fusionrec of Weights & Biases"


class Meter:
    """Counts steps, feeds the trackers on rank 0, and says when a report is due, on all ranks."""

    def __init__(
        self,
        directory: Path,
        config: TrainingConfig,
        settings: Mapping[str, Any],
        memory: PeakMemory,
        *,
        start: int,
        total: int,
    ) -> None:
        self._memory = memory
        self._step, self._total, self._every = start, total, config.report_every
        self._examples = self._tokens = 0
        self._since = time.perf_counter()
        self._trackers: dict[str, Tracker] = {}
        if dist.get_rank() == 0:
            for name, kind in _kinds(config.trackers).items():
                self._try(
                    name, partial(self._open, name, partial(kind, directory, start, settings))
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(tracker.close, error))

    def step(
        self,
        *,
        epoch: int,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        examples: int,
        tokens: int,
        skipped: int,
        spikes: int,
    ) -> Report | None:
        """Count one optimizer step; a report when it is the last or ``every`` have passed."""
        self._step += 1
        self._examples += examples
        self._tokens += tokens
        curves = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        curves |= {"skipped": skipped, "spikes": spikes}
        due = self._step % self._every == 0 or self._step == self._total
        memory: tuple[int, ...] = ()
        if due:
            now = time.perf_counter()
            curves["examples_per_s"] = self._examples / (now - self._since)
            curves["tokens_per_s"] = self._tokens / (now - self._since)
            self._examples, self._tokens, self._since = 0, 0, now
            memory = of_all(self._memory.lap())
        each = {f"{MEMORY}{worker}": float(size) for worker, size in enumerate(memory)}
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(tracker.log, curves | each, self._step))
        if not due:
            return None
        place = {"step": self._step, "total": self._total, "epoch": epoch, "memory_bytes": memory}
        return Report.model_validate(place | curves)

    def _open(self, name: str, make: Callable[[], Tracker]) -> None:
        self._trackers[name] = make()

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker's library or server raises
            self._trackers.pop(name, None)
            console.print(f"tracker {name} is dropped: {error}", highlight=False, soft_wrap=True)


def of_all(value: T) -> tuple[T, ...]:
    """What each rank has; called by all of them together."""
    found = [value] * dist.get_world_size()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return tuple(found)


def count_tokens(batch: Batch) -> int:
    """Tokens that are not padding, of all texts of a batch."""
    texts = {n: t for n, t in batch.items() if n.rpartition(".")[2] == "input_ids"}
    masks = [batch.get(f"{n.removesuffix('input_ids')}attention_mask") for n in texts]
    read = zip(texts.values(), masks, strict=True)
    return sum(ids.numel() if mask is None else int(mask.sum()) for ids, mask in read)


def flat(identity: dict[str, Any]) -> dict[str, Any]:
    """``{"task": {"name": …}}`` as ``{"task.name": …}``."""
    return {f"{part}.{k}": v for part, values in identity.items() for k, v in values.items()}
