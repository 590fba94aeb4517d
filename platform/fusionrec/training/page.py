"""The page of a run, ``report.html``: curves, memory, settings, data, and where it came from.

It is drawn of ``curves.jsonl`` and of what the caller knows; the run may have ended, or stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fusionrec.data.dataset import DatasetInfo
from fusionrec.pages import page
from fusionrec.pages.lines import HALF, Line, line_chart, smoothed
from fusionrec.provenance import hardware, versions
from fusionrec.training.curves import History, read
from fusionrec.training.engine import TrainingResult
from fusionrec.training.memory import Estimate
from fusionrec.training.tracking import MEMORY

PACKAGES = ("torch", "transformers", "deepspeed", "peft", "ray", "numpy")
_TITLES = {
    "learning_rate": "learning rate",
    "grad_norm": "norm of the gradient, before clipping",
    "examples_per_s": "examples/s, all workers",
    "tokens_per_s": "tokens/s, all workers, padding not counted",
    "skipped": "steps left out so far",
    "spikes": "spikes so far",
}
"""How curves are called; others keep their names."""
_ROLES = ("served", "best", "share", "good")
"""Colours of workers, as far as they can be told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What is on the page besides the curves."""

    task: str
    dataset: DatasetInfo
    settings: Mapping[str, Any]
    """By name, as they were resolved."""
    estimate: Estimate
    """Of the preflight."""
    result: TrainingResult | None
    """Nothing where the run stopped before its end."""
    stopped: str = ""
    """Why it did."""


def write(directory: Path, told: Told) -> Path | None:
    """Leave ``report.html`` in the directory of a run; nothing where no step was ever begun."""
    history = read(directory)
    if not history.attempts:
        return None
    path = directory / "report.html"
    path.write_text(html(history, told, checkpoints=_kept(directory)), encoding="utf-8")
    return path


def html(history: History, told: Told, *, checkpoints: Sequence[tuple[str, int]]) -> str:
    """One self-contained page.

    Args:
        history: What was logged.
        told: The rest.
        checkpoints: Name and bytes of those that are kept.
    """
    template = files("fusionrec.training").joinpath("run.html.j2").read_text(encoding="utf-8")
    curves = history.curves
    memory = {name: points for name, points in curves.items() if name.startswith(MEMORY)}
    others = [name for name in curves if name != "loss" and name not in memory]
    resumed = [attempt.start for attempt in history.attempts[1:]]
    # What was always 0, such as steps left out, is told by the table.
    drawn = [name for name in others if any(value != 0 for _, value in curves[name])]
    charts = [line_chart(_title(n), [Line(n, curves[n])], at=resumed, width=HALF) for n in drawn]
    return page(
        template,
        told=told,
        attempts=history.attempts,
        resumed=resumed,
        steps=max((points[-1][0] for points in curves.values()), default=0),
        loss_chart=_drawn(_loss_chart(curves.get("loss", []), resumed)),
        charts=[_drawn(chart) for chart in charts],
        memory_chart=_drawn(_memory_chart(memory, told.estimate, resumed)) if memory else None,
        peaks={
            name.removeprefix(MEMORY): max(value for _, value in points)
            for name, points in memory.items()
        },
        summary=[(_title(name), *_summary(curves[name])) for name in ("loss", *others)]
        if curves
        else [],
        checkpoints=checkpoints,
        versions=versions(PACKAGES),
        hardware=hardware(),
        when=lambda seconds: f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC",
    )


def _loss_chart(points: Sequence[tuple[int, float]], resumed: Sequence[int]) -> str:
    window = max(1, len(points) // 20)
    lines = [Line("loss", points, "other" if window > 1 else "served")]
    if window > 1:
        lines.append(Line(f"mean of {window}", smoothed(points, window)))
    return line_chart("loss, all workers", lines, at=resumed)


def _memory_chart(
    memory: Mapping[str, Sequence[tuple[int, float]]], need: Estimate, resumed: Sequence[int]
) -> str:
    lines = [
        Line(
            f"worker {name.removeprefix(MEMORY)}",
            [(step, size / 1e9) for step, size in points],
            _ROLES[place] if len(memory) < len(_ROLES) else "other",
        )
        for place, (name, points) in enumerate(memory.items())
    ]
    steps = [step for line in lines for step, _ in line.points]
    ends = [(min(steps), need.peak / 1e9), (max(steps), need.peak / 1e9)]
    lines.append(Line("estimate", ends, "estimate"))
    if len(memory) >= len(_ROLES):  # names of so many would hide the lines
        lines = [line._replace(name="" if line.role == "other" else line.name) for line in lines]
    return line_chart("most memory of each worker since the last report, GB", lines, at=resumed)


def _summary(points: Sequence[tuple[int, float]]) -> tuple[str, ...]:
    """First, last, least, largest."""
    values = [value for _, value in points]
    finite = [value for value in values if math.isfinite(value)] or values
    return tuple(f"{v:.5g}" for v in (values[0], values[-1], min(finite), max(finite)))


def _title(name: str) -> str:
    return _TITLES.get(name, name)


def _kept(directory: Path) -> list[tuple[str, int]]:
    found = sorted((directory / "checkpoints").glob("step-*"))
    return [(p.name, sum(f.stat().st_size for f in p.rglob("*") if f.is_file())) for p in found]


def _drawn(chart: str) -> Markup:
    return Markup(chart)  # noqa: S704 - charts escape their text
