"""The charts of a campaign's report: what was tried, what mattered, what the front looks like."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fusionrec.pages.svg import grid, svg, text, ticks
from tuning.front import Front
from tuning.history import SearchHistory

LEFT, RIGHT, TOP, BOTTOM = 70, 880, 24, 250


def progress_chart(history: SearchHistory) -> str:
    """Value of every trial, and the best so far, over the time that trials have taken."""
    low, high = _span([trial.value for trial in history.trials])
    marks = ticks(max((trial.at_s for trial in history.trials), default=0) or 1)

    def place(at_s: float, value: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * at_s / marks[-1]
        return x, BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    parts = [grid(place(mark, low)[0], TOP, BOTTOM, f"{mark:g} s") for mark in marks]
    parts += [
        text(LEFT - 8, place(0, value)[1] + 4, f"{value:.4f}", "axis", "end")
        for value in (low, high)
    ]
    best = -math.inf
    steps: list[tuple[float, float]] = []
    for trial in history.trials:
        x, y = place(trial.at_s, trial.value)
        role = "best" if trial.number == history.best else "other"
        parts.append(f'<circle class="dot {role}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        if trial.whole and trial.value > best:
            steps += [(x, place(0, best)[1])] if steps else []
            best = trial.value
            steps.append((x, y))
    if steps:
        steps.append(place(history.trials[-1].at_s, best))
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in steps)
        parts.append(f'<polyline class="line served" points="{points}"/>')
    label = "time of the trials, one after another"
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 36, label, "axis", "middle"))
    return svg(BOTTOM + 46, f"{history.metric} of {history.name} over time", parts)


def parallel_chart(history: SearchHistory) -> str:
    """Parallel coordinates: a line a trial, an axis a parameter, the last one the value."""
    axes = [*history.ranges, history.metric]
    step = (RIGHT - LEFT) / max(len(axes) - 1, 1)
    low, high = _span([trial.value for trial in history.trials])
    parts: list[str] = []
    for index, name in enumerate(axes):
        x = LEFT + index * step
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{BOTTOM}"/>')
        ends = (low, high) if name == history.metric else history.ranges[name][:2]
        parts.append(text(x, BOTTOM + 16, f"{ends[0]:.4g}", "axis", "middle"))
        parts.append(text(x, TOP - 8, f"{ends[1]:.4g}", "axis", "middle"))
        # On two lines in turn: names of neighbours would run into each other.
        parts.append(text(x, BOTTOM + 36 + 16 * (index % 2), name, "label", "middle"))
    # The better, the darker; the best is drawn last, above the others.
    for trial in sorted(history.trials, key=lambda trial: trial.value):
        heights = [_share(trial.params[name], *history.ranges[name]) for name in history.ranges]
        heights.append((trial.value - low) / (high - low))
        points = " ".join(
            f"{LEFT + index * step:.1f},{BOTTOM - (BOTTOM - TOP) * height:.1f}"
            for index, height in enumerate(heights)
        )
        role = "best" if trial.number == history.best else "other"
        opacity = 1.0 if role == "best" else 0.15 + 0.7 * heights[-1] ** 3
        parts.append(f'<polyline class="line {role}" opacity="{opacity:.2f}" points="{points}"/>')
    return svg(BOTTOM + 64, f"Parallel coordinates of {history.name}", parts)


def importance_chart(history: SearchHistory) -> str:
    """A bar a parameter: its share in what makes a good trial."""
    parts: list[str] = []
    for index, (name, share) in enumerate(history.importance.items()):
        y = 8 + 26 * index
        width = max(500 * share, 1)
        parts += [
            text(238, y + 15, name, "label", "end"),
            f'<rect class="bar served" x="250" y="{y + 4}" rx="3" '
            f'width="{width:.1f}" height="15"/>',
            text(260 + width, y + 16, f"{share:.0%}", "value", "start"),
        ]
    return svg(16 + 26 * len(history.importance), f"Importance in {history.name}", parts)


def front_chart(front: Front) -> str:
    """Every other metric over NDCG, a small chart each; the chosen point and the start marked."""
    others = [name for name in front.start.values if name != "ndcg"]
    width = (RIGHT + 30 - LEFT) / len(others)
    shown = [*front.points, front.start]
    low, high = _span([point.values["ndcg"] for point in shown])
    parts: list[str] = []
    for index, name in enumerate(others):
        left = LEFT + index * width
        right = left + width - 80
        bottom_value, top_value = _span([point.values[name] for point in shown])
        parts.append(text((left + right) / 2, TOP - 8, name, "label strong", "middle"))
        parts.append(f'<path class="grid" d="M{left:.1f} {TOP}V{BOTTOM}H{right:.1f}"/>')
        parts.append(text(left - 6, BOTTOM + 4, f"{bottom_value:.3g}", "axis", "end"))
        parts.append(text(left - 6, TOP + 8, f"{top_value:.3g}", "axis", "end"))
        parts.append(text(left, BOTTOM + 16, f"{low:.4f}", "axis", "start"))
        parts.append(text(right, BOTTOM + 16, f"{high:.4f}", "axis", "end"))
        parts.append(text((left + right) / 2, BOTTOM + 34, "NDCG", "axis", "middle"))
        for point in sorted(shown, key=lambda point: point.number == front.chosen):
            x = left + (right - left) * (point.values["ndcg"] - low) / (high - low)
            height = (point.values[name] - bottom_value) / (top_value - bottom_value)
            y = BOTTOM - (BOTTOM - TOP) * height
            role = "best" if point is front.start else "other"
            role = "served" if point.number == front.chosen else role
            size = 4 if role == "other" else 7
            parts.append(f'<circle class="dot {role}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>')
    return svg(BOTTOM + 44, "The front", parts)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The least and the largest value, apart."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _share(value: float, low: float, high: float, log: bool) -> float:
    """Where ``value`` stands between ``low`` and ``high``: 0 to 1."""
    if high == low:
        return 0.5
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)
