"""What a report says of the machine and the versions that it was measured on."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from fusionrec.provenance import hardware, versions

PACKAGES = ("ray", "torch", "transformers", "faiss-cpu", "numpy", "fastapi", "uvicorn", "uvloop")


def today() -> str:
    """The date in UTC."""
    return datetime.now(UTC).date().isoformat()


def describe() -> str:
    """A line on the hardware and one on the versions."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"Hardware: {hardware()}; load averages at the start {load}.\n"
        f"Versions: {versions(PACKAGES)}."
    )
