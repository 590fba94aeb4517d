"""Search spaces: what a setting may become in a campaign, said in its annotation.

::

    regularisation: Annotated[float, Range(1, 5000, log=True)] = Field(default=50.0, gt=0)
    similarity: Annotated[Literal["cosine", "jaccard"], Choice()] = "cosine"
    text: Annotated[bool, Choice()] = True

A setting without either is not searched. What draws from a space is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar, get_args

from fusionrec.config import Config

T = TypeVar("T", bound=Config)


@dataclass(frozen=True, slots=True)
class Range:
    """From ``low`` to ``high``, both included."""

    low: float
    high: float
    log: bool = False
    """Whether the search looks at ratios instead of differences; ``low`` is positive then."""
    whole: bool = False
    """Whether only whole numbers are meant: found from the setting's type by :func:`searched`."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several names, or whether at all."""

    names: tuple[str | bool, ...] = ()
    """All that the setting's type, a ``Literal`` or a ``bool``, has: found from it by
    :func:`searched`."""


Space: TypeAlias = dict[str, Range | Choice]
"""Dotted name → what the setting may become."""


def searched(config: Config, prefix: str = "") -> Space:
    """What every setting of ``config``, and of the configs in it, that is searched may become.

    A range is widened to hold the setting's present value: where a search starts from lies in it.
    """
    found: Space = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Config):
            found |= searched(value, f"{prefix}{name}.")
        for each in field.metadata:
            if isinstance(each, Range) and not isinstance(value, str):  # else it is learned
                low, high = min(each.low, value), max(each.high, value)
                found[prefix + name] = replace(
                    each, low=low, high=high, whole=field.annotation is int
                )
            elif isinstance(each, Choice):
                found[prefix + name] = Choice(get_args(field.annotation) or (False, True))
    return found


def setting(config: Config, name: str) -> Any:
    """The value of the setting with this dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def replaced(config: T, values: dict[str, Any]) -> T:
    """``config`` with ``values`` (dotted name → value), validated again."""
    settings = config.model_dump()
    for name, value in values.items():
        *groups, last = name.split(".")
        place = settings
        for group in groups:
            place = place[group]
        place[last] = value
    return type(config).model_validate(settings)
