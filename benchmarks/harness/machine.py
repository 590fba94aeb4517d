"""What a report says of the machine and the versions that it was measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("ray", "torch", "transformers", "faiss-cpu", "numpy", "fastapi", "uvicorn", "uvloop")


def today() -> str:
    """The date in UTC."""
    return datetime.now(UTC).date().isoformat()


def describe(extra: Sequence[str] = ()) -> str:
    """A line on the hardware and one on the versions, those of the ``extra`` packages included."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    memory = re.search(r"(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))
    gib = int(memory[1]) / 2**20 if memory else 0
    cores = len(os.sched_getaffinity(0))
    packages = ", ".join(f"{name} {version(name)}" for name in (*PACKAGES, *extra))
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"Hardware: {model[1] if model else platform.machine()}, {cores} cores, {gib:.0f} GiB; "
        f"load averages at the start {load}.\n"
        f"Versions: {_commit()}, Python {platform.python_version()}, {packages}."
    )


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=9"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"FusionRec {found.stdout.strip() or version('fusionrec')}"
