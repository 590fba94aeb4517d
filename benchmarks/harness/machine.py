"""What a figure was measured on and when: the head of every report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime

from fusionrec.provenance import hardware, versions

PACKAGES = ("ray", "torch", "transformers", "faiss-cpu", "numpy", "fastapi", "uvicorn", "uvloop")


def today() -> str:
    """In UTC, as in the names of reports."""
    return datetime.now(UTC).date().isoformat()


def describe(extra: Sequence[str] = ()) -> str:
    """A line on the hardware and one on the versions, those of the ``extra`` packages included."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"Hardware: {hardware()}; load averages at the start {load}.\n"
        f"Versions: {versions((*PACKAGES, *extra))}."
    )
