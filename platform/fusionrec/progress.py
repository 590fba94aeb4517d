"""Progress bars with remaining time, on standard error, for stages longer than a few seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """By ``steps``; ``note`` replaces the text behind the bar."""


@contextmanager
def bar(description: str, total: int | None) -> Iterator[Advance]:
    """A bar of ``total`` steps; yields the function that advances it.

    On a terminal it moves in place; elsewhere (a log, CI) it prints one line when it is done.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            progress.update(task, advance=steps, note=note)

        yield advance
        elapsed = progress.tasks[0].elapsed or 0.0
    if not console.is_terminal:
        sys.stderr.write(f"{description}: done in {elapsed:.1f} s\n")
