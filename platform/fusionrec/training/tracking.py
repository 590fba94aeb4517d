"""What a run tells while it goes: reports, TensorBoard, and the batch that broke it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True, slots=True)
class Report:
    """Progress after a step."""

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
    """Global L2 norm before clipping."""
    examples_per_s: float
    """Of all workers together, since the last report."""


class Tracker:
    """Counts steps, writes TensorBoard on rank 0, and says when a report is due."""

    def __init__(self, directory: Path, *, start: int, total: int, every: int) -> None:
        self._step, self._total, self._every = start, total, every
        self._examples, self._since = 0, time.perf_counter()
        self._writer = None
        if dist.get_rank() == 0:
            # A resumed run writes its steps again: TensorBoard drops the first copy.
            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def step(
        self, *, epoch: int, loss: float, learning_rate: float, grad_norm: float, examples: int
    ) -> Report | None:
        """Count one optimizer step; a report when it is the last or ``every`` have passed."""
        self._step += 1
        self._examples += examples
        curves = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        due = self._step % self._every == 0 or self._step == self._total
        if due:
            now = time.perf_counter()
            curves["examples_per_s"] = self._examples / (now - self._since)
            self._examples, self._since = 0, now
        if self._writer is not None:
            for name, value in curves.items():
                self._writer.add_scalar(name, value, self._step)
        return Report(self._step, self._total, epoch, **curves) if due else None


def save_batch(path: Path, step: int, batch: int, examples: list[dict[str, Any]]) -> None:
    """Write the examples of one batch as JSON for a person to read."""
    content = {"step": step, "batch": batch, "examples": examples}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
