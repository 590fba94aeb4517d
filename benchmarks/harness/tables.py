"""Tables and spreads as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (columns, ("---",) * len(columns), *rows)]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], digits: int) -> str:
    """``median [lowest, highest]``; one value as it is."""
    middle = f"{median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} [{min(values):.{digits}f}, {max(values):.{digits}f}]"
