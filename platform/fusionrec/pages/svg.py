"""What charts are drawn of: inline SVG without a script, a font or an outside host.

Colours are CSS variables of the page, so that one drawing serves light and dark. Every chart has a
title for screen readers, and its numbers stand in a table next to it.
"""

from __future__ import annotations

import math
from html import escape

WIDTH = 920
"""Of a chart that has the page to itself, in the units of its coordinates."""


def ticks(top: float, bottom: float = 0.0) -> list[float]:
    """Four to eight round numbers from just below ``bottom`` to just above ``top``."""
    span = top - bottom
    power = 10.0 ** math.floor(math.log10(span))
    step = next(s * power for s in (0.1, 0.2, 0.25, 0.5, 1, 2) if span / (s * power) <= 6)
    first = math.floor(bottom / step + 1e-9)
    return [i * step for i in range(first, math.ceil(top / step - 1e-9) + 1)]


def grid(x: float, top: float, bottom: float, label: str) -> str:
    """An upright line with its label below."""
    return f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>' + text(
        x, bottom + 16, label, "axis", "middle"
    )


def text(x: float, y: float, content: str, css: str, anchor: str) -> str:
    """One line of text, escaped."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{css}" {place}>{escape(content)}</text>'


def svg(height: float, title: str, parts: list[str], *, width: int = WIDTH) -> str:
    """The whole drawing."""
    return (
        f'<svg viewBox="0 0 {width} {height:.0f}" role="img"><title>{escape(title)}</title>'
        + "".join(parts)
        + "</svg>"
    )
