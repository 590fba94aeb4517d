"""Commands: the one that a report was made with, and those of jobs."""

from __future__ import annotations

import subprocess
import sys
from enum import Enum
from typing import Any

from fusionrec.config import JobConfig
from fusionrec.errors import FusionRecError


def command_of(module: str, config: JobConfig) -> str:
    """``python -m module`` with what differs from the defaults, but for where results go."""
    words = [f"python -m {module}"]
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name != "out" and value != field.default:
            words += _flag(name, value)
    return " ".join(words)


def run_job(module: str, **settings: object) -> None:
    """Run a job as a team would, in a process of its own; what it prints as its result is dropped.

    Raises:
        FusionRecError: it failed, and has said why.
    """
    words = [word for name, value in settings.items() for word in _flag(name, value)]
    command = [sys.executable, "-m", module, *words]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise FusionRecError(f"{module} failed: its reason stands above")


def _flag(name: str, value: object) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{flag}"]
    return [f"--{flag}", _shown(value)]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    return str(value.value if isinstance(value, Enum) else value)
