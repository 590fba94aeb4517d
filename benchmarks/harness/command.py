"""Commands: the one that a report was made with, and those of jobs."""

from __future__ import annotations

import subprocess
import sys
from enum import Enum
from typing import Any

from fusionrec.config import JobConfig
from fusionrec.errors import ServingError


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


def run_job(module: str, *arguments: object) -> None:
    """Run a job as a team would, in a process of its own.

    Raises:
        ServingError: it failed, and has said why.
    """
    words = [str(argument) for argument in arguments]
    if subprocess.run([sys.executable, "-m", module, *words], check=False).returncode:
        raise ServingError(f"{module} failed: its reason stands above")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    return str(value.value if isinstance(value, Enum) else value)
