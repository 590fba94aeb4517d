"""The training engine: DeepSpeed around one task, on every rank of a torch.distributed group.

It knows neither Ray nor torchrun: whoever starts the processes initialises the group (gloo on CPUs,
nccl on GPUs; RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set) and calls
:func:`train` on all of them. A run that was killed goes on from its newest committed checkpoint
when called again with the same arguments, and on CPUs ends bit for bit as if nothing had happened.

The directory of a run, seen by all workers::

    DIR/checkpoints/…      see fusionrec.training.checkpoints
    DIR/curves.jsonl, DIR/tensorboard/…    see fusionrec.training.curves and tracking
    DIR/non-finite-*.json, DIR/spike-*.json    batches to look at, see fusionrec.training.faults
    DIR/model/…            what Task.save writes, adapters merged
    DIR/adapter.safetensors    what adapters learned, before they were merged
    DIR/result.json        written last; a finished run is not run again

Costs: the first run on a machine compiles an operator (35–100 s, needs g++ and ninja).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from fusionrec.config import Config
from fusionrec.errors import Preempted, TrainingError
from fusionrec.training import weights
from fusionrec.training.checkpoints import (
    CHOSEN,
    Checkpoint,
    Checkpoints,
    random_states,
    restore_random_states,
    sha256_of,
)
from fusionrec.training.config import RESULT, TrainingConfig
from fusionrec.training.faults import StopSignal, Watch
from fusionrec.training.peak import PeakMemory
from fusionrec.training.process import prepare_process
from fusionrec.training.task import Batch, Refreshed, Task
from fusionrec.training.tracking import Meter, Report, count_tokens, flat, of_all


class TrainingResult(Config):
    """What a finished run was; also ``result.json``."""

    task: str
    steps: int
    """Optimizer steps done."""
    examples: int
    """Examples seen, over all workers and steps."""
    loss: float
    """Mean loss of the last step that was not left out."""
    skipped: int
    """Steps left out because a loss or a gradient was not finite."""
    spikes: int
    """Losses that were far above the ones before them."""
    seconds: float
    """Wall-clock time of the steps, over all attempts up to the checkpoints that they left."""
    peak_memory_bytes: int
    """Of the worker that took most in this attempt: of its device, or what its process grew by."""
    weights_sha256: str
    """Of the first file of weights in ``model/``."""
    adapter_sha256: str | None
    """Of ``adapter.safetensors``, where adapters were trained."""
    model: str
    """Directory of the trained model."""
    identity: dict[str, Any]
    """Task and settings that made it."""


def train(
    task: Task,
    config: TrainingConfig,
    directory: Path,
    *,
    on_report: Callable[[Report], None] | None = None,
    noticed: Callable[[], bool] | None = None,
) -> TrainingResult:
    """Train ``task`` and leave its model in ``directory``; called by all ranks together.

    Args:
        task: The same on every rank.
        config: The same on every rank.
        directory: Of the run; on storage that all ranks see.
        on_report: Called on every rank equally often: each ``report_every`` steps and at the end.
        noticed: Called after it: whether a machine will be taken away, the same on every rank. A
            checkpoint is left then, and the run goes on.

    Raises:
        NonFiniteLoss: names the step and the batch, which is saved as JSON. Raised on all ranks,
            as the others are.
        CheckpointNotWritten: a disk is full; the checkpoints before stay.
        Preempted: a worker got SIGTERM (where this runs in its main thread); a checkpoint was left.
        TrainingError: the directory holds a run with other settings, or there are too few examples.
        ModelError: the model cannot be loaded.
    """
    done = finished(task, config, directory, dist.get_world_size())
    if done is not None:
        return done
    run = _Run(task, config, directory)
    with weights.own_linear(), closing(run.checkpoints):
        return run.train(on_report, noticed)


def finished(
    task: Task, config: TrainingConfig, directory: Path, world_size: int
) -> TrainingResult | None:
    """The result of this very run, where ``directory`` holds it.

    Raises:
        TrainingError: it holds the result of another one.
    """
    path = directory / RESULT
    if not path.exists():
        return None
    result = TrainingResult.model_validate_json(path.read_bytes())
    _refuse_difference(directory, result.identity, _identity(task, config, world_size))
    return result


class _Done(NamedTuple):
    """What came of a step."""

    loss: float
    grad_norm: float
    tokens: int
    stop: bool


class _Run:
    def __init__(self, task: Task, config: TrainingConfig, directory: Path) -> None:
        prepare_process(config)
        self._task, self._config, self._directory = task, config, directory
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._identity = _identity(task, config, self._world)
        self._plan_epoch, self._plan = -1, task.plan(config.batch_size, self._order(0))
        self._steps_per_epoch = len(self._plan) // (self._world * config.accumulation)
        if self._steps_per_epoch == 0:
            raise TrainingError(
                f"the examples make {len(self._plan)} batches of {config.batch_size}, but one step "
                f"of {self._world} workers with accumulation {config.accumulation} takes "
                f"{self._world * config.accumulation}: set a smaller --batch-size, or fewer workers"
            )
        self._total = config.total_steps(self._steps_per_epoch)
        keep, staging = config.keep_checkpoints, config.checkpoint_staging
        self.checkpoints = Checkpoints(directory / "checkpoints", keep=keep, staging=staging)
        self._watch = Watch(task, config, directory)

    def train(
        self, on_report: Callable[[Report], None] | None, noticed: Callable[[], bool] | None
    ) -> TrainingResult:
        config = self._config
        if (checkpoint := self.checkpoints.newest()) is not None:
            self._refuse_other_run(checkpoint)
        # Before memory is measured: the libraries' is not the run's.
        import deepspeed  # noqa: F401
        import transformers.modeling_utils  # noqa: F401

        if config.method.adapts:
            import peft  # noqa: F401

        memory = PeakMemory()
        resharded = checkpoint is not None and checkpoint.manifest.world_size != self._world
        engine = weights.build_engine(self._task, config, self._world, universal=resharded)
        # From here on dropout draws from a stream of its own on every rank.
        torch.manual_seed(np.random.SeedSequence([config.seed, self._rank]).generate_state(1)[0])
        start, loss, before = 0, float("nan"), 0.0
        if checkpoint is not None:
            start, loss, before = self._restore(engine, checkpoint, resharded=resharded)
        engine.train()
        meter = Meter(
            self._directory, config, flat(self._identity), memory, start=start, total=self._total
        )
        with meter, StopSignal() as signalled:
            began = time.perf_counter() - before
            for step in range(start, self._total):
                self._refresh(engine, step)
                rate = config.learning_rate_at(step, self._total)
                # A checkpoint that failed ends the run: at the same step on all ranks.
                stop = signalled.seen or self.checkpoints.failed
                done = self._step(engine, step, rate, stop=stop)
                loss = done.loss if np.isfinite(done.loss) else loss
                report = meter.step(
                    epoch=step // self._steps_per_epoch,
                    loss=done.loss,
                    learning_rate=rate,
                    grad_norm=done.grad_norm,
                    examples=config.batch_size * config.accumulation * self._world,
                    tokens=done.tokens,
                    skipped=self._watch.skipped,
                    spikes=self._watch.spikes,
                )
                if report is not None and on_report is not None:
                    on_report(report)
                leave = report is not None and noticed is not None and noticed()
                last = step + 1 == self._total
                due = (step + 1) % config.checkpoint_every == 0
                if due or leave or last or done.stop:
                    self._save(engine, step + 1, loss, time.perf_counter() - began)
                if done.stop and not last:
                    self.checkpoints.wait()
                    raise Preempted(
                        f"the run was told to stop and left a checkpoint of step {step + 1}: the "
                        "same command goes on from there"
                    )
            self.checkpoints.wait()
            seconds = time.perf_counter() - began
            # Inside of the block: a tracker is told of what fails here, too.
            return self._finish(engine, loss, seconds, max(of_all(memory.bytes())))

    def _order(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self._config.seed, epoch])

    def _examples(self, step: int, micro: int) -> Any:
        """[B] the examples of this rank's ``micro``-th batch of ``step``."""
        epoch, position = divmod(step, self._steps_per_epoch)
        if epoch != self._plan_epoch:
            self._plan = self._task.plan(self._config.batch_size, self._order(epoch))
            self._plan_epoch = epoch
        first = (position * self._config.accumulation + micro) * self._world
        return self._plan[first + self._rank]

    @property
    def _refreshed(self) -> Refreshed | None:
        """The task, where it chooses its examples by the current model."""
        task = self._task
        return task if isinstance(task, Refreshed) and task.refresh_every else None

    def _refresh(self, engine: Any, step: int) -> None:
        """Let such a task look at the model, where it is due."""
        if (task := self._refreshed) is not None and step % task.refresh_every == 0:
            engine.eval()
            with torch.no_grad():
                task.refresh(partial(self._forward, engine), step)
            engine.train()

    @staticmethod
    def _forward(
        engine: Any, function: Callable[[torch.nn.Module, Batch], torch.Tensor], batch: Batch
    ) -> torch.Tensor:
        found: torch.Tensor = engine({k: v.to(engine.device) for k, v in batch.items()}, function)
        return found

    def _step(self, engine: Any, step: int, rate: float, *, stop: bool) -> _Done:
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        losses, tokens = [], 0
        micros = range(self._config.accumulation)
        batches = [self._examples(step, micro) for micro in micros]
        for micro in micros:
            batch = self._task.batch(batches[micro])
            tokens += count_tokens(batch)
            loss = engine({k: v.to(engine.device, non_blocking=True) for k, v in batch.items()})
            losses.append(loss.detach().float())
            if micro == micros[-1]:
                # Looked at before the weights move: a run stops with the last good ones.
                told = self._watch.losses(
                    torch.stack(losses), step, batches, tokens=tokens, stop=stop
                )
                if not np.isfinite(told.mean):
                    loss = loss * float("nan")  # leaves the step out, see faults
            engine.backward(loss)
            engine.step()
        skipped = not np.isfinite(told.mean)
        norm = self._watch.gradient(engine, step, batches, skipped=skipped)
        return _Done(told.mean, norm, told.tokens, told.stop)

    def _save(self, engine: Any, step: int, loss: float, seconds: float) -> None:
        progress = torch.tensor([loss, seconds], dtype=torch.float64)

        def write(directory: Path) -> None:
            weights.save_shards(engine, directory, only_trained=self._adapts)
            states = random_states() | {"progress": progress, "watch": self._watch.state()}
            weights.save_tensors(states, directory / f"rank-{self._rank:05d}.safetensors")
            if self._refreshed is not None and self._rank == 0:
                weights.save_tensors(self._refreshed.chosen(), directory / CHOSEN)

        self.checkpoints.save(step, self._identity, write)

    def _restore(
        self, engine: Any, checkpoint: Checkpoint, *, resharded: bool
    ) -> tuple[int, float, float]:
        """Steps done, the loss of the last of them, seconds that they took."""
        shards, rank = checkpoint.directory, self._rank
        universal = self._directory / "checkpoints" / ".universal"
        if resharded:
            if rank == 0:
                weights.make_universal(shards, universal)
            dist.barrier()
            shards, rank = universal, 0
        weights.load_shards(engine, shards, only_trained=self._adapts)
        states = weights.load_tensors(checkpoint.directory / f"rank-{rank:05d}.safetensors")
        loss, seconds = states.pop("progress").tolist()
        self._watch.restore(states.pop("watch"))
        if self._refreshed is not None:
            self._refreshed.restore(weights.load_tensors(checkpoint.directory / CHOSEN))
        step = checkpoint.manifest.step
        if resharded:
            # The old workers' streams fit no new one.
            stream = np.random.SeedSequence([self._config.seed, self._rank, step])
            torch.manual_seed(stream.generate_state(1)[0])
            dist.barrier()
            if self._rank == 0:
                shutil.rmtree(universal)
        else:
            restore_random_states(states)
        return step, loss, seconds

    @property
    def _adapts(self) -> bool:
        return self._config.method.adapts

    def _refuse_other_run(self, checkpoint: Checkpoint) -> None:
        """Another number of workers may go on where a step sees the same examples."""
        workers, known = checkpoint.manifest.world_size, checkpoint.manifest.identity
        batches, now = (each["training"].get("batches") for each in (known, self._identity))
        if workers != self._world and batches not in (None, now):
            remedy = f"go on with --num-workers {workers}"
            if batches % self._world == 0:
                remedy += f", or with --accumulation {batches // self._world}"
            raise TrainingError(
                f"{checkpoint.directory} was written by {workers} workers, {batches} batches a "
                f"step, and this run has {self._world} and {now}: {remedy}, or start anew with "
                "another --out"
            )
        _refuse_difference(self._directory, known, self._identity)
        if self._refreshed is not None and CHOSEN not in checkpoint.manifest.files:
            raise TrainingError(
                f"{self._directory} holds a run of an earlier version, whose checkpoints lack what "
                "was mined: give another --out, or delete that directory"
            )

    def _finish(self, engine: Any, loss: float, seconds: float, memory: int) -> TrainingResult:
        full = weights.gather(engine)
        adapter = self._directory / "adapter.safetensors"
        if self._adapts and self._rank == 0:
            weights.save_tensors(weights.trained(engine, full), adapter)
        examples = self._config.batch_size * self._config.accumulation * self._world * self._total
        path = self._directory / RESULT
        engine.destroy()
        if self._rank == 0:
            model = weights.merged(full, self._task, self._config)
            final, partial = self._directory / "model", self._directory / ".model"
            for folder in (partial, final):
                shutil.rmtree(folder, ignore_errors=True)
            partial.mkdir()
            self._task.save(model, partial)
            partial.rename(final)
            result = TrainingResult(
                task=self._task.name,
                steps=self._total,
                examples=examples,
                loss=loss,
                skipped=self._watch.skipped,
                spikes=self._watch.spikes,
                seconds=seconds,
                peak_memory_bytes=memory,
                weights_sha256=sha256_of(min(final.rglob("*.safetensors"))),
                adapter_sha256=sha256_of(adapter) if self._adapts else None,
                model=str(final),
                identity=self._identity,
            )
            beside = path.with_name(".result.json")
            beside.write_text(result.model_dump_json(indent=1), encoding="utf-8")
            beside.replace(path)
        dist.barrier()
        return TrainingResult.model_validate_json(path.read_bytes())


def _identity(task: Task, config: TrainingConfig, world_size: int) -> dict[str, Any]:
    # Batches of a step, whoever computes them.
    batches = config.accumulation * world_size
    return {"task": task.identity, "training": config.identity() | {"batches": batches}}


def _refuse_difference(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    holds, remedy = f"{directory} holds a run", "give another --out, or delete that directory"
    if "batches" not in old["training"]:
        raise TrainingError(f"{holds} of an earlier version: {remedy}")
    for part in ("task", "training"):
        for key in sorted({*old[part], *new[part]}):
            before, now = old[part].get(key), new[part].get(key)
            if before != now:
                name = "num_workers × accumulation" if key == "batches" else key
                raise TrainingError(
                    f"{holds} with {name} = {before!r} and this one has {now!r}: {remedy}"
                )
