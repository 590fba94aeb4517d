"""The command that a report was made with."""

from __future__ import annotations

from enum import Enum
from typing import Any

from fusionrec.config import JobConfig


def command_of(module: str, config: JobConfig) -> str:
    """``python -m module`` with what differs from the defaults, but for where results go."""
    words = [f"python -m {module}"]
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name == "out" or value == field.default:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        else:
            words.append(f"--{flag} {_shown(value)}")
    return " ".join(words)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    return str(value.value if isinstance(value, Enum) else value)
