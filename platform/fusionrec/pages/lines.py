"""A chart of lines over steps, as a run's curves are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fusionrec.pages.svg import WIDTH, svg, text, ticks

HALF = 450
"""Width of a chart that stands beside another."""
_TOP, _BOTTOM = 30, 210
_MOST = 400
"""Points that a line is drawn of at most: more than a screen tells apart."""


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y); what is not finite is left out."""
    role: str = "served"
    """served, best or other: its colour."""


def line_chart(
    title: str, lines: Sequence[Line], *, at: Sequence[float] = (), width: int = WIDTH
) -> str:
    """Lines over a common scale, with upright ones ``at`` some x; names stand at the lines' ends.

    A single line has the chart's title for a name, and needs none. Of a long line, the lowest and
    the highest point of each stretch are drawn, so that no spike is lost.
    """
    finite = [line._replace(points=_finite(line.points)) for line in lines]
    shown = [line for line in finite if line.points]
    values = [y for line in shown for _, y in line.points] or [0.0, 1.0]
    low, high = min(values), max(values)
    if 0 <= low < high / 2 or low == high >= 0:
        low = 0.0
    marks = ticks(high if high > low else low + 1.0, low)
    ends = [x for line in shown for x, _ in line.points] or [0.0, 1.0]
    first, last = min(ends), max(max(ends), min(ends) + 1)
    left, right = 60, width - (130 if len(shown) > 1 else 20)

    def x(step: float) -> float:
        return left + (right - left) * (step - first) / (last - first)

    def y(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (value - marks[0]) / (marks[-1] - marks[0])

    parts = [text(left, 16, title, "label strong", "start")]
    for mark in marks:
        parts.append(f'<path class="grid" d="M{left} {y(mark):.1f}H{right}"/>')
        parts.append(text(left - 8, y(mark) + 4, f"{mark:.6g}", "axis", "end"))
    parts += [f'<path class="mark" d="M{x(step):.1f} {_TOP}V{_BOTTOM}"/>' for step in at]
    for step, anchor in ((first, "start"), (last, "end")):
        parts.append(text(x(step), _BOTTOM + 18, f"{step:g}", "axis", anchor))
    parts.append(text((left + right) / 2, _BOTTOM + 18, "step", "axis", "middle"))
    for line in shown:
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in thinned(line.points))
        parts.append(f'<polyline class="line {line.role}" points="{points}"/>')
        if len(line.points) == 1:
            ((s, v),) = line.points
            parts.append(f'<circle class="dot {line.role}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="4"/>')
    bottom = _TOP - 12.0
    for line in sorted(shown, key=lambda line: -line.points[-1][1]) if len(shown) > 1 else ():
        bottom = max(y(line.points[-1][1]) + 4, bottom + 16)  # names make room for each other
        parts.append(text(right + 8, bottom, line.name, f"label {line.role}", "start"))
    return svg(max(_BOTTOM + 28, bottom + 12), title, parts, width=width)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 400 of the points, in order: the first, the last, and each stretch's extremes."""
    if len(points) <= _MOST:
        return list(points)
    stretches = _MOST // 2 - 1
    kept = {0, len(points) - 1}
    for number in range(stretches):
        start, end = (len(points) * each // stretches for each in (number, number + 1))
        kept |= {f(range(start, end), key=lambda i: points[i][1]) for f in (min, max)}
    return [points[i] for i in sorted(kept)]


def smoothed(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """The mean of the last ``window`` finite values, from where there are so many."""
    finite = _finite(points)
    total, found = 0.0, []
    for place, (x, y) in enumerate(finite):
        total += y - (finite[place - window][1] if place >= window else 0.0)
        if place + 1 >= window:
            found.append((x, total / window))
    return found


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [point for point in points if math.isfinite(point[1])]
