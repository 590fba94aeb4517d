"""The training engine: DeepSpeed around one task, on every rank of a torch.distributed group.

It knows neither Ray nor torchrun: whoever starts the processes initialises the group (gloo on CPUs,
nccl on GPUs; RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set) and calls
:func:`train` on all of them. A run that was killed goes on from its newest committed checkpoint
when called again with the same arguments, and on CPUs ends bit for bit as if nothing had happened.

The directory of a run, seen by all workers::

    DIR/checkpoints/…      see fusionrec.training.checkpoints
    DIR/tensorboard/…      loss, learning rate, gradient norm, examples/s
    DIR/refreshed/…        what tasks chose by the current model, such as mined negatives
    DIR/model/…            what Task.save writes, adapters merged
    DIR/result.json        written last; a finished run is not run again

Costs: the first DeepSpeed import on a machine compiles an operator (35–100 s, needs g++ and ninja).
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fusionrec.config import Config
from fusionrec.errors import NonFiniteLoss, TrainingError
from fusionrec.training import weights
from fusionrec.training.checkpoints import (
    Checkpoint,
    Checkpoints,
    random_states,
    restore_random_states,
    sha256_of,
)
from fusionrec.training.config import TrainingConfig
from fusionrec.training.task import Batch, Refreshed, Task
from fusionrec.training.tracking import Report, Tracker, save_batch


class TrainingResult(Config):
    """What a finished run was; also ``result.json``."""

    task: str
    steps: int
    """Optimizer steps done."""
    examples: int
    """Examples seen, over all workers and steps."""
    loss: float
    """Mean loss of the last step's batches."""
    seconds: float
    """Wall-clock time of the steps, over all attempts up to the checkpoints that they left."""
    weights_sha256: str
    """Of the first file of weights in ``model/``."""
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
) -> TrainingResult:
    """Train ``task`` and leave its model in ``directory``; called by all ranks together.

    Args:
        task: The same on every rank.
        config: The same on every rank.
        directory: Of the run; on storage that all ranks see.
        on_report: Called on every rank equally often: each ``report_every`` steps and at the end.

    Raises:
        NonFiniteLoss: names the step and the batch, which is saved as JSON. Raised on all ranks.
        CheckpointNotWritten: raised on the rank that met it, while the others wait for it: whoever
            started the processes ends them.
        TrainingError: the directory holds a run with other settings, or there are too few examples.
        ModelError: the model cannot be loaded.
    """
    done = finished(task, config, directory)
    return done or _Run(task, config, directory).train(on_report)


def finished(task: Task, config: TrainingConfig, directory: Path) -> TrainingResult | None:
    """The result of this very run, where ``directory`` holds it.

    Raises:
        TrainingError: it holds the result of another one.
    """
    path = directory / "result.json"
    if not path.exists():
        return None
    result = TrainingResult.model_validate_json(path.read_bytes())
    _refuse_difference(directory, result.identity, _identity(task, config))
    return result


def prepare_process(config: TrainingConfig) -> None:
    """What must be so before DeepSpeed is imported: accelerator, build folder, threads."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if sys.prefix != sys.base_prefix:
        # DeepSpeed builds its operator against the environment's own torch. In the shared default
        # folder two environments would build it over each other, again and again.
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    # A Ray worker with a fraction of a CPU has OMP_NUM_THREADS=1, so the number is always set.
    torch.set_num_threads(config.num_threads or max(1, (os.cpu_count() or 1) // local))


class _LossModule(torch.nn.Module):
    """Model and loss as one module, so that one forward of the engine is one batch.

    ZeRO-3 follows the order of submodules between two forwards of the outermost module; a loss that
    calls the model twice, once for histories and once for items, must happen inside of one.
    """

    def __init__(self, model: torch.nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self._task = task

    def forward(
        self,
        batch: Batch,
        function: Callable[[torch.nn.Module, Batch], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        return (function or self._task.loss)(self.model, batch)


class _Run:
    def __init__(self, task: Task, config: TrainingConfig, directory: Path) -> None:
        prepare_process(config)
        self._task, self._config, self._directory = task, config, directory
        self._identity = _identity(task, config)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._plan_epoch, self._plan = -1, task.plan(config.batch_size, self._order(0))
        self._steps_per_epoch = len(self._plan) // (self._world * config.accumulation)
        if self._steps_per_epoch == 0:
            raise TrainingError(
                f"the examples make {len(self._plan)} batches of {config.batch_size}, but one step "
                f"of {self._world} workers with accumulation {config.accumulation} takes "
                f"{self._world * config.accumulation}: set a smaller --batch-size, or fewer workers"
            )
        self._total = config.total_steps(self._steps_per_epoch)
        self._checkpoints = Checkpoints(directory / "checkpoints", keep=config.keep_checkpoints)

    def train(self, on_report: Callable[[Report], None] | None) -> TrainingResult:
        config = self._config
        checkpoint = self._checkpoints.newest()
        if checkpoint is not None:
            self._refuse_other_run(checkpoint)
        engine = weights.build_engine(
            lambda model: _LossModule(model, self._task), self._task, config, self._world
        )
        # From here on dropout draws from a stream of its own on every rank.
        torch.manual_seed(np.random.SeedSequence([config.seed, self._rank]).generate_state(1)[0])
        start, loss, before = 0, float("nan"), 0.0
        if checkpoint is not None:
            start, loss, before = self._restore(engine, checkpoint)
        engine.train()
        with Tracker(
            self._directory, start=start, total=self._total, every=config.report_every
        ) as tracker:
            began = time.perf_counter() - before
            for step in range(start, self._total):
                self._refresh(engine, step, resumed=step == start)
                rate = config.learning_rate_at(step, self._total)
                loss = self._step(engine, step, rate)
                report = tracker.step(
                    epoch=step // self._steps_per_epoch,
                    loss=loss,
                    learning_rate=rate,
                    grad_norm=self._grad_norm(engine, step),
                    examples=config.batch_size * config.accumulation * self._world,
                )
                if report is not None and on_report is not None:
                    on_report(report)
                if (step + 1) % config.checkpoint_every == 0 or step + 1 == self._total:
                    self._save(engine, step + 1, loss, time.perf_counter() - began)
            seconds = time.perf_counter() - began
        return self._finish(engine, loss, seconds)

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

    def _refresh(self, engine: Any, step: int, *, resumed: bool) -> None:
        """Let a task that chooses its examples by the current model look at it, where it is due."""
        if not isinstance(self._task, Refreshed) or not (every := self._task.refresh_every):
            return
        path = self._directory / "refreshed" / f"step-{step - step % every:08d}.safetensors"
        if step % every == 0:
            engine.eval()
            with torch.no_grad():
                self._task.refresh(partial(self._forward, engine), path, step)
            engine.train()
        elif resumed:
            self._task.restore(path)

    @staticmethod
    def _forward(
        engine: Any, function: Callable[[torch.nn.Module, Batch], torch.Tensor], batch: Batch
    ) -> torch.Tensor:
        found: torch.Tensor = engine({k: v.to(engine.device) for k, v in batch.items()}, function)
        return found

    def _step(self, engine: Any, step: int, rate: float) -> float:
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        losses = []
        for micro in range(self._config.accumulation):
            batch = self._task.batch(self._examples(step, micro))
            loss = engine({k: v.to(engine.device, non_blocking=True) for k, v in batch.items()})
            losses.append(loss.detach().float())
            engine.backward(loss)
            if micro + 1 == self._config.accumulation:
                # Looked at before the weights move: a run stops with the last good ones.
                mean = self._agree(torch.stack(losses), step)
            engine.step()
        return mean

    def _agree(self, losses: torch.Tensor, step: int) -> float:
        """Mean of all ranks' losses [accumulation]; all ranks raise if any is not finite."""
        everyone = [torch.empty_like(losses) for _ in range(self._world)]
        dist.all_gather(everyone, losses)
        table = torch.stack(everyone).cpu()
        for rank, micro in torch.nonzero(~torch.isfinite(table)).tolist():
            path = self._directory / f"non-finite-step-{step + 1:08d}-rank-{rank:05d}.json"
            if rank == self._rank:
                examples = self._examples(step, micro)
                save_batch(path, step + 1, micro, self._task.describe(examples))
            dist.barrier()
            raise NonFiniteLoss(
                f"the loss became {table[rank, micro].item()} at step {step + 1}, batch {micro} of "
                f"worker {rank}: read its examples in {path}, then lower --learning-rate (now "
                f"{self._config.learning_rate:g}) or mend the data"
            )
        return float(table.double().mean())

    def _grad_norm(self, engine: Any, step: int) -> float:
        norm = float(engine.get_global_grad_norm())
        if not np.isfinite(norm) or norm < 0 or engine.skipped_steps:
            raise NonFiniteLoss(
                f"the gradient became {norm} at step {step + 1} though the loss was finite: lower "
                f"--learning-rate (now {self._config.learning_rate:g})"
            )
        return norm

    def _save(self, engine: Any, step: int, loss: float, seconds: float) -> None:
        progress = torch.tensor([loss, seconds], dtype=torch.float64)

        def write(directory: Path) -> None:
            weights.save_shards(engine, directory, only_trained=self._lora)
            states = random_states() | {"progress": progress}
            weights.save_tensors(states, directory / f"rank-{self._rank:05d}.safetensors")

        self._checkpoints.save(step, self._identity, write)

    def _restore(self, engine: Any, checkpoint: Checkpoint) -> tuple[int, float, float]:
        """Steps done, the loss of the last of them, seconds that they took."""
        weights.load_shards(engine, checkpoint.directory, only_trained=self._lora)
        states = weights.load_tensors(checkpoint.directory / f"rank-{self._rank:05d}.safetensors")
        loss, seconds = states.pop("progress").tolist()
        restore_random_states(states)
        return checkpoint.manifest.step, loss, seconds

    @property
    def _lora(self) -> bool:
        return weights.is_lora(self._config)

    def _refuse_other_run(self, checkpoint: Checkpoint) -> None:
        if checkpoint.manifest.world_size != self._world:
            raise TrainingError(
                f"{checkpoint.directory} was written by {checkpoint.manifest.world_size} workers "
                f"and this run has {self._world}: go on with --num-workers "
                f"{checkpoint.manifest.world_size}, or start anew with another --out"
            )
        _refuse_difference(self._directory, checkpoint.manifest.identity, self._identity)

    def _finish(self, engine: Any, loss: float, seconds: float) -> TrainingResult:
        full = weights.gather(engine)
        examples = self._config.batch_size * self._config.accumulation * self._world * self._total
        path = self._directory / "result.json"
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
                seconds=seconds,
                weights_sha256=sha256_of(min(final.rglob("*.safetensors"))),
                model=str(final),
                identity=self._identity,
            )
            beside = path.with_name(".result.json")
            beside.write_text(result.model_dump_json(indent=1), encoding="utf-8")
            beside.replace(path)
        dist.barrier()
        return TrainingResult.model_validate_json(path.read_bytes())


def _identity(task: Task, config: TrainingConfig) -> dict[str, Any]:
    return {"task": task.identity, "training": config.identity()}


def _refuse_difference(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for part in ("task", "training"):
        for key in sorted({*old[part], *new[part]}):
            before, now = old[part].get(key), new[part].get(key)
            if before != now:
                raise TrainingError(
                    f"{directory} holds a run with {key} = {before!r} and this one has {now!r}: "
                    "give another --out, or delete that directory"
                )
