"""A Serve configuration as people wrote it: values, the line of each, keys that stand twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from fusionrec.config import read_yaml

Place = tuple[str | int, ...]
"""Keys and positions from the root of the document to a value."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or that is seldom meant."""

    place: Place
    message: str
    """What follows the place in a sentence."""
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """The values of a configuration, and where they stand in its file."""

    values: dict[str, Any]
    name: str = "configuration"
    lines: Mapping[Place, int] = field(default_factory=dict)
    twice: tuple[Finding, ...] = ()
    """YAML takes the last of two equal keys and says nothing."""

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a YAML file.

        Raises:
            ConfigError: it is missing or is not a YAML mapping.
        """
        values = read_yaml(file)
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        lines: dict[Place, int] = {}
        twice: list[Finding] = []
        for place, line in _lines(root, ()) if root is not None else ():
            if place in lines:
                twice.append(Finding(place, "stands here twice, and the first is ignored"))
            lines[place] = line
        return cls(values, str(file), lines, tuple(twice))

    def show(self, finding: Finding) -> str:
        """One line: the file, the line in it, the place and what is wrong."""
        line = self.line(finding.place)
        where = f"{self.name}:{line}" if line else self.name
        kind = "warning" if finding.warning else "error"
        return f"{where}: {kind}: {self.path(finding.place)} {finding.message}"

    def line(self, place: Place) -> int:
        """The line of ``place``, or of what should hold it; 0 where the file has neither."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 0)

    def path(self, place: Place) -> str:
        """``applications[recommend].deployments[Gateway].num_replicas``: names for positions."""
        text, value = "", self.values
        for part in place:
            value = step(value, part)
            if isinstance(part, int):
                name = value.get("name") if isinstance(value, dict) else None
                text += f"[{part if name is None else name}]"
            else:
                text += f".{part}" if text else str(part)
        return text or "the configuration"


def _lines(node: yaml.Node, place: Place) -> Iterator[tuple[Place, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, key.value)
            yield inner, key.start_mark.line + 1
            yield from _lines(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            yield (*place, position), value.start_mark.line + 1
            yield from _lines(value, (*place, position))


def step(value: Any, part: str | int) -> Any:
    """The value at ``part`` of a mapping or list; None where there is none."""
    try:
        return value[part]
    except (KeyError, IndexError, TypeError):
        return None
