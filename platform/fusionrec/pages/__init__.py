"""What all pages share: a Jinja template, one style, charts of inline SVG; a page is one file.

It knows nothing of what a page tells. No script, no font and no picture comes from elsewhere.
"""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup


def page(template: str, **values: object) -> str:
    """A Jinja template in the style of all reports: ``style`` is its CSS."""
    style = files("fusionrec.pages").joinpath("style.css").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": number, "p": p_value, "percent": percent, "gb": gigabytes}
    return environment.from_string(template).render(style=Markup(style), **values)  # noqa: S704


def number(value: float | None, digits: int = 4) -> str:
    """With so many digits behind the point; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share; a dash where there is none."""
    return "–" if value is None else f"{value:.1%}"


def p_value(value: float) -> str:
    """As it stands behind a p."""
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def gigabytes(size: float) -> str:
    """Of bytes; 1 GB is 10^9 of them."""
    return f"{size / 1e9:.2f} GB"
