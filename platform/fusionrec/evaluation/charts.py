"""The charts of an evaluation's report."""

from __future__ import annotations

import math

from fusionrec.evaluation.report import CURVE_AT, PRIMARY, Report, SystemReport
from fusionrec.pages.svg import grid, svg, text, ticks

LABEL = 210
ROW = 30


def metric_chart(report: Report, metric: str = PRIMARY) -> str:
    """One bar a system with its interval; beside a source, its part of the fused score."""
    systems = ordered(report)
    has_shares = any(system.share is not None for system in systems)
    right = 640 if has_shares else 850
    top = max((system.metrics[metric].high for system in systems), default=0) or 1
    marks = ticks(top)
    scale = (right - LABEL) / marks[-1]
    height = 34 + ROW * len(systems) + 26
    parts = [grid(LABEL + tick * scale, 30, height - 24, f"{tick:g}") for tick in marks]
    if has_shares:
        parts.append(text(right + 90, 16, "part of the fused score", "axis", "start"))
    for index, system in enumerate(systems):
        y = 34 + ROW * index
        found = system.metrics[metric]
        low, high = LABEL + found.low * scale, LABEL + found.high * scale
        middle = y + ROW / 2
        parts += [
            text(LABEL - 12, middle + 4, system.name, f"label {_role(report, system)}", "end"),
            f'<rect class="bar {_role(report, system)}" x="{LABEL}" y="{y + 6}" rx="3" '
            f'width="{max(found.mean * scale, 1):.1f}" height="{ROW - 12}"/>',
            f'<path class="whisker" d="M{low:.1f} {middle}H{high:.1f}'
            f'M{low:.1f} {middle - 5}v10M{high:.1f} {middle - 5}v10"/>',
            text(high + 8, middle + 4, f"{found.mean:.4f}", "value", "start"),
        ]
        if system.share is not None:
            width = 150 * system.share
            parts += [
                f'<rect class="bar share" x="{right + 90}" y="{y + 10}" rx="3" '
                f'width="{max(width, 1):.1f}" height="{ROW - 20}"/>',
                text(right + 98 + width, middle + 4, f"{system.share:.0%}", "value", "start"),
            ]
    name = f"{metric.upper()}@{report.config.k} of every system with intervals"
    return svg(height, name, parts)


def curve_chart(report: Report) -> str:
    """Recall over the length of the list, one line a system; both axes named."""
    left, right, top, bottom = 60, 700, 20, 300
    systems = ordered(report)
    marks = ticks(max((max(system.curve) for system in systems), default=0) or 1)

    def x(at: int) -> float:
        return left + (right - left) * math.log(at) / math.log(CURVE_AT[-1])

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / marks[-1]

    parts = []
    for tick in marks:
        parts.append(f'<path class="grid" d="M{left} {y(tick):.1f}H{right}"/>')
        parts.append(text(left - 8, y(tick) + 4, f"{tick:g}", "axis", "end"))
    parts += [text(x(at), bottom + 20, str(at), "axis", "middle") for at in CURVE_AT]
    parts.append(text((left + right) / 2, bottom + 42, "length of the list", "axis", "middle"))
    for system in reversed(systems):  # the served list is drawn last, above the others
        points = " ".join(
            f"{x(at):.1f},{y(v):.1f}" for at, v in zip(CURVE_AT, system.curve, strict=True)
        )
        parts.append(f'<polyline class="line {_role(report, system)}" points="{points}"/>')
    last = top - 15.0
    for system in sorted(systems, key=lambda system: -system.curve[-1]):
        last = max(y(system.curve[-1]) + 4, last + 16)  # labels make room for each other
        label = f"{system.name}  {system.curve[-1]:.3f}"
        parts.append(text(right + 10, last, label, f"label {_role(report, system)}", "start"))
    return svg(max(bottom + 52, int(last) + 12), "Recall over the length of the list", parts)


def slice_chart(report: Report) -> str:
    """The served list and the best source on every slice, with intervals."""
    served, best = report.served, report.best_source
    shown = [best] if served is best else [best, served]
    right = 780
    marks = ticks(max(found.high for system in shown for found in system.slices) or 1)
    scale = (right - LABEL) / marks[-1]
    parts: list[str] = []
    y, group = 12, ""
    for index, part in enumerate(report.slices):
        if part.group != group:
            group = part.group
            y += 36
            parts.append(text(LABEL - 12, y, group, "label strong", "end"))
        y += 24
        parts.append(text(LABEL - 12, y + 4, part.name, "label", "end"))
        parts.append(text(right + 100, y + 4, f"{part.num_cases:,} cases", "axis", "end"))
        for system, shift in zip(shown, (3.5, -3.5), strict=False):
            found = system.slices[index]
            low, high = LABEL + found.low * scale, LABEL + found.high * scale
            role = _role(report, system)
            parts.append(f'<path class="interval {role}" d="M{low:.1f} {y + shift}H{high:.1f}"/>')
            parts.append(
                f'<circle class="dot {role}" cx="{LABEL + found.mean * scale:.1f}" '
                f'cy="{y + shift}" r="4.5"/>'
            )
    height = y + 46
    lines = [grid(LABEL + tick * scale, 30, height - 24, f"{tick:g}") for tick in marks]
    legend, place = [], float(LABEL)
    for system in reversed(shown):
        legend.append(
            f'<circle class="dot {_role(report, system)}" cx="{place + 5}" cy="12" r="5"/>'
        )
        legend.append(text(place + 16, 16, system.name, "label", "start"))
        place += 40 + 8 * len(system.name)
    return svg(height, "The served list and the best source on every slice", lines + legend + parts)


def ordered(report: Report) -> list[SystemReport]:
    """The served list first, then by the primary metric, best first."""
    served = report.served
    rest = [system for system in report.systems if system is not served]
    return [served, *sorted(rest, key=lambda system: -system.metrics[PRIMARY].mean)]


def _role(report: Report, system: SystemReport) -> str:
    if system is report.served:
        return "served"
    return "best" if system is report.best_source else "other"
