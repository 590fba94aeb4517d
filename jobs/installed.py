"""A model on its way into a pipeline directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from fusionrec.bundles.gate import forget_measurements


def install(model: Path, place: Path) -> None:
    """Copy ``model`` to ``place``, which is whole at any moment but the one of the two renames."""
    partial_copy = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial_copy, ignore_errors=True)
    shutil.copytree(model, partial_copy)
    forget_measurements(place.parent)  # before: they must never stand beside another model
    shutil.rmtree(place, ignore_errors=True)
    partial_copy.rename(place)
