"""What may befall a step: numbers that are not finite, a loss that jumps, the order to stop.

All workers see the same numbers, so that all of them stop, skip or go on together. A step is left
out by making its gradient NaN, which every stage of ZeRO takes for an overflow: weights, optimizer
states and its step counter stay as they were.
"""

from __future__ import annotations

import json
import signal
import statistics
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist

from fusionrec.data.histories import IntArray
from fusionrec.errors import NonFiniteLoss
from fusionrec.progress import console
from fusionrec.training.config import TrainingConfig
from fusionrec.training.task import Task

_WINDOW = 50
"""Losses that a new one is compared with."""
_ENOUGH = 10
"""Losses before any is called a spike: the first ones fall too fast to say what is usual."""


class Spikes:
    """Flags a loss that is far above the ones before it."""

    def __init__(self, sigmas: float) -> None:
        self._sigmas = sigmas
        self.recent: deque[float] = deque(maxlen=_WINDOW)

    def add(self, loss: float) -> bool:
        """Whether ``loss`` > median + sigmas · 1.4826 · MAD of the up to 50 before it.

        MAD is the median of the absolute deviations from the median; 1.4826 of it are a standard
        deviation where losses are normal (Rousseeuw & Croux, 1993). Neither moves much when spikes
        are among what it is taken of.
        """
        spike = False
        if len(self.recent) >= _ENOUGH:
            usual = statistics.median(self.recent)
            deviation = 1.4826 * statistics.median(abs(each - usual) for each in self.recent)
            # Losses that do not move at all deviate by rounding only.
            spike = loss > usual + self._sigmas * max(deviation, 1e-3 * abs(usual))
        self.recent.append(loss)
        return spike


@dataclass(frozen=True, slots=True)
class StepLosses:
    """Losses of all workers' batches of one step."""

    mean: float
    """NaN or infinite where one of them is."""
    tokens: int
    """Read by all workers."""
    stop: bool
    """Whether any worker was told to stop."""


class Watch:
    """Looks at every step of a run; every method is called by all ranks together."""

    def __init__(self, task: Task, config: TrainingConfig, directory: Path) -> None:
        self._task, self._config, self._directory = task, config, directory
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._spikes = Spikes(config.spike_sigmas)
        self.skipped = 0
        """Steps left out so far."""
        self.spikes = 0
        """Spikes so far."""

    def state(self) -> torch.Tensor:
        """What :meth:`restore` needs."""
        counts = [float(self.skipped), float(self.spikes)]
        return torch.tensor([*counts, *self._spikes.recent], dtype=torch.float64)

    def restore(self, state: torch.Tensor) -> None:
        """Go on where the run that left ``state`` was."""
        skipped, spikes, *recent = state.tolist()
        self.skipped, self.spikes = int(skipped), int(spikes)
        self._spikes.recent.extend(recent)

    def losses(
        self, losses: torch.Tensor, step: int, batches: list[IntArray], *, tokens: int, stop: bool
    ) -> StepLosses:
        """Gather a step's losses [accumulation], before its last backward pass.

        Raises:
            NonFiniteLoss: on all ranks, when no more steps may be left out.
        """
        own = torch.cat([losses.double(), losses.new_tensor([tokens, stop], dtype=torch.float64)])
        everyone = [torch.empty_like(own) for _ in range(self._world)]
        dist.all_gather(everyone, own)
        gathered = torch.stack(everyone).cpu()
        table, extra = gathered[:, :-2], gathered[:, -2:]
        mean = float(table.mean())
        bad = torch.nonzero(~torch.isfinite(table)).tolist()
        if bad:
            rank, micro = bad[0]
            path = self._save("non-finite", step, rank, [micro], batches)
            self._skip(
                f"the loss became {table[rank, micro].item()} at step {step + 1}, batch {micro} of "
                f"worker {rank}: read its examples in {path}"
            )
        elif self._spikes.add(mean):
            self.spikes += 1
            rank, micro = divmod(int(table.argmax()), table.shape[1])
            path = self._save("spike", step, rank, [micro], batches)
            self._say(
                f"the loss jumped to {mean:.4f} at step {step + 1}: read its worst batch in {path}"
            )
        return StepLosses(mean, int(extra[:, 0].sum()), bool(extra[:, 1].any()))

    def gradient(self, engine: Any, step: int, batches: list[IntArray], *, skipped: bool) -> float:
        """Global L2 norm of the gradient before clipping; NaN for a step that was left out.

        Args:
            engine: Which has stepped.
            step: From 0.
            batches: Of this rank.
            skipped: Whether the step was to be left out for its loss.

        Raises:
            NonFiniteLoss: on all ranks, when no more steps may be left out.
        """
        norm = float(engine.get_global_grad_norm())
        fine = np.isfinite(norm) and norm >= 0 and not engine.optimizer.overflow
        if fine or skipped:
            return norm if fine else float("nan")
        # Summed over the workers already: it may be any batch of the step.
        for rank in range(self._world):
            path = self._save("non-finite", step, rank, range(len(batches)), batches)
        self._skip(
            f"the gradient became NaN or infinite at step {step + 1} though the loss was finite: "
            f"read the examples in {path} and the files beside it"
        )
        return float("nan")

    def _skip(self, reason: str) -> None:
        self.skipped += 1
        allowed = self._config.max_skipped_steps
        if self.skipped > allowed:
            again = f" after {allowed} steps that were left out" if allowed else ""
            raise NonFiniteLoss(
                f"{reason}, then lower --learning-rate (now {self._config.learning_rate:g}), mend "
                f"the data, or leave such steps out with --max-skipped-steps{again}"
            )
        self._say(f"{reason}; the step is left out ({self.skipped} of {allowed})")

    def _save(self, kind: str, step: int, rank: int, micros: Any, batches: list[IntArray]) -> Path:
        """Where ``rank`` writes its batches, once it has."""
        path = self._directory / f"{kind}-step-{step + 1:08d}-rank-{rank:05d}.json"
        if rank == self._rank:
            described = [{"batch": m, "examples": self._task.describe(batches[m])} for m in micros]
            content = {"step": step + 1, "worker": rank, "batches": described}
            # Of a run that tracks nothing, it may be the first file.
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        dist.barrier()
        return path

    def _say(self, message: str) -> None:
        if self._rank == 0:
            console.print(message, highlight=False, soft_wrap=True)


class StopSignal:
    """Whether SIGTERM came while the block runs: what a scheduler sends before it takes a machine.

    Only the main thread can listen; elsewhere, as under Ray Train, nothing changes.
    """

    def __init__(self) -> None:
        self.seen = False
        self._listens = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self.seen = True
