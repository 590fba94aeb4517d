"""A fitted source takes its place in a pipeline directory.

What a campaign found was found for the scores of the sources that were there: it goes when one of
them changes. A source goes only once its successor is whole.
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable
from pathlib import Path

from fusionrec.bundles.gate import forget_measurements
from fusionrec.fusion.diversity import DIVERSITY
from fusionrec.fusion.model import LAMBDARANK


def forget_weights(pipeline: Path) -> None:
    """Remove the fusion, and what was measured of it: it means nothing over other scores."""
    shutil.rmtree(pipeline / LAMBDARANK, ignore_errors=True)
    (pipeline / "fusion.json").unlink(missing_ok=True)
    forget_measurements(pipeline)


def forget_lists(pipeline: Path) -> None:
    """Remove all that was found for the lists of a pipeline: its weights, and their diversity."""
    forget_weights(pipeline)
    shutil.rmtree(pipeline / DIVERSITY, ignore_errors=True)


def install(
    pipeline: Path,
    name: str,
    save: Callable[[Path], object],
    forget: Callable[[Path], object] = forget_weights,
) -> None:
    """Put what ``save`` writes in place of the source ``name``.

    Where that changes anything, ``forget`` takes away what was found for the former one first.
    """
    place = pipeline / "sources" / name
    new, old = _beside(place)
    _remove(new, old)
    save(new)
    if place.is_dir() and _same(place, new):
        _remove(new)
        return
    forget(pipeline)
    if place.is_dir():
        place.rename(old)
    new.rename(place)
    _remove(old)


def settle(place: Path) -> None:
    """End what :func:`install` left half done of the source that was at ``place``."""
    if not place.is_dir():
        whole(place).rename(place)
    _remove(*_beside(place))


def whole(place: Path) -> Path:
    """Where the source of ``place`` is, whatever a process that died left."""
    return place if place.is_dir() else _beside(place)[0]


def _beside(place: Path) -> tuple[Path, Path]:
    return place.with_name(f".{place.name}.new"), place.with_name(f".{place.name}.old")


def _same(one: Path, other: Path) -> bool:
    """Whether two directories hold the same files, byte for byte."""
    names = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    if {path.relative_to(other) for path in other.rglob("*") if path.is_file()} != set(names):
        return False
    equal, _, _ = filecmp.cmpfiles(one, other, list(map(str, names)), shallow=False)
    return len(equal) == len(names)


def _remove(*directories: Path) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
