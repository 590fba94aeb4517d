"""What was fitted takes its place in a pipeline directory, and what it is fitted on.

What a campaign found was found for the scores of the sources that were there: it goes when one of
them changes. A source, or an encoder, goes only once its successor is whole.
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fusionrec.bundles.gate import forget_measurements
from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import FloatArray
from fusionrec.data.splits import Split
from fusionrec.data.text import history_texts
from fusionrec.fusion.diversity import DIVERSITY
from fusionrec.fusion.model import LAMBDARANK
from fusionrec.sources.protocol import TrainingData


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
    replace(pipeline / "sources" / name, save, lambda: forget(pipeline))


def replace(
    place: Path, save: Callable[[Path], object], forget: Callable[[], object] = lambda: None
) -> None:
    """Put the directory that ``save`` writes at ``place``; ``forget`` before it, if it differs."""
    new, old = _beside(place)
    _remove(new, old)
    save(new)
    if place.is_dir() and _same(place, new):
        _remove(new)
        return
    forget()
    if place.is_dir():
        place.rename(old)
    new.rename(place)
    _remove(old)


def settle(place: Path) -> None:
    """End what :func:`replace` left half done of what was at ``place``."""
    if not place.is_dir():
        whole(place).rename(place)
    _remove(*_beside(place))


def whole(place: Path) -> Path:
    """Where what was at ``place`` is, whatever a process that died left."""
    return place if place.is_dir() else _beside(place)[0]


def training_data(pipeline: Path, dataset: Dataset, parts: Split, seed: int) -> TrainingData:
    """What the sources of ``pipeline`` learn from: the training part, and what jobs.embed left.

    Args:
        pipeline: with ``vectors.npy`` and ``encoder/``, where there are any.
        dataset: whose catalogue and timestamps count.
        parts: of it.
        seed: of the sample of histories whose text vectors tune an approximate index.
    """
    vectors = pipeline / "vectors.npy"
    return TrainingData(
        catalogue=dataset.catalogue,
        histories=parts.train,
        has_timestamps=dataset.info.has_timestamps,
        item_vectors=np.load(vectors, mmap_mode="r") if vectors.is_file() else None,
        history_vectors=lambda count: _history_vectors(pipeline, dataset, parts, seed, count),
    )


def _history_vectors(
    pipeline: Path, dataset: Dataset, parts: Split, seed: int, count: int
) -> FloatArray | None:
    """Text vectors of some training histories; None where jobs.embed left no encoder."""
    folder = pipeline / "encoder"
    if not folder.is_dir():
        return None
    from fusionrec.language.encoder import Encoder  # torch, which fitting needs for nothing else

    chosen = np.sort(np.random.default_rng(seed).permutation(len(parts.train))[:count])
    encoder = Encoder.load(folder, device="cpu")
    histories = parts.train.take(chosen)
    return encoder.encode(history_texts(dataset.catalogue, histories, encoder.config.history_items))


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
