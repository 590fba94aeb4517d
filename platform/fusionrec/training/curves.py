"""``curves.jsonl``: every number of a run by step, kept whatever trackers there are.

A line a step, on the disk when the step is done, and a line where an attempt begins. An attempt
goes on from a checkpoint and so writes some steps again: the last writing counts. A crash may leave
half a line, which is passed over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

CURVES = "curves.jsonl"


class Attempt(NamedTuple):
    """One start of a run."""

    start: int
    """Steps done before it."""
    workers: int
    began: int
    """Seconds since the epoch."""


class History(NamedTuple):
    """What a run has told so far."""

    attempts: list[Attempt]
    curves: dict[str, list[tuple[int, float]]]
    """By name: (step, value), by step."""


class Curves:
    """A :class:`~fusionrec.training.tracking.Tracker` that writes the file."""

    def __init__(self, directory: Path, start: int, _: Mapping[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / CURVES).open("a", buffering=1, encoding="utf-8")
        attempt = Attempt(start, dist.get_world_size(), int(time.time()))
        # On a line of its own, also where the one before is half.
        self._file.write(f"\n{json.dumps(attempt._asdict())}\n")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`~fusionrec.training.tracking.Tracker`."""
        self._file.write(f"{json.dumps({'step': step} | dict(values))}\n")

    def close(self, _: BaseException | None) -> None:
        """See :class:`~fusionrec.training.tracking.Tracker`."""
        self._file.close()


def read(directory: Path) -> History:
    """What the run in ``directory`` has told; nothing where it never began."""
    attempts: list[Attempt] = []
    steps: dict[int, dict[str, float]] = {}
    path = directory / CURVES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if "start" in found:
            attempts.append(Attempt(**found))
            steps = {step: row for step, row in steps.items() if step <= attempts[-1].start}
        else:
            steps[found.pop("step")] = found
    curves: dict[str, list[tuple[int, float]]] = {}
    for step in sorted(steps):
        for name, value in steps[step].items():
            curves.setdefault(name, []).append((step, value))
    return History(attempts, curves)
