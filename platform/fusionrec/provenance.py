"""What a result says of where it came from: the code's revision, packages and hardware."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fusionrec


def revision() -> str:
    """Of FusionRec: of its git repository, as far as it runs from one, or else its version."""
    folder = Path(fusionrec.__file__).parent
    # An installed copy may lie in the folder of somebody else's repository.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") and (
        found := _git(folder, "describe", "--always", "--dirty", "--abbrev=9")
    ):
        return f"FusionRec {found}"
    try:
        return f"FusionRec {version('fusionrec')}"
    except PackageNotFoundError:  # a copy without its metadata, as Ray sends it to a cluster
        return "FusionRec of an unknown version"


def versions(packages: Sequence[str]) -> str:
    """Revision, Python, and the packages that are installed."""
    found = [revision(), f"Python {platform.python_version()}"]
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def hardware() -> str:
    """Processor, cores that this process may use, memory and GPUs, as far as Linux tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        memory = re.search(r"(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))
        cores = len(os.sched_getaffinity(0))
    except (OSError, AttributeError):
        return f"{platform.machine()}, {os.cpu_count()} cores"
    model = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    gib = int(memory[1]) / 2**20 if memory else 0
    parts = [model[1] if model else platform.machine(), f"{cores} cores", f"{gib:.0f} GiB"]
    return ", ".join([*parts, *_gpus()])


def _gpus() -> list[str]:
    """NVIDIA's, as their driver calls them; torch need not be imported for it."""
    found = []
    for each in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        name = re.search(r"^Model:\s*(.+)$", each.read_text(encoding="utf-8"), re.MULTILINE)
        found.append(name[1].strip() if name else "a GPU")
    return found


def _git(folder: Path, *arguments: str) -> str:
    """What git answers, or nothing where it is not there or refuses."""
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return "" if found.returncode else found.stdout.strip()
