"""Whether the disks have room for what a run will still write."""

from __future__ import annotations

import shutil
from pathlib import Path

from fusionrec.errors import TrainingError
from fusionrec.training.config import TrainingConfig
from fusionrec.training.memory import Estimate


def check(need: Estimate, config: TrainingConfig, directory: Path, *, share_here: float) -> None:
    """See that there is room for the checkpoints, one that is being written, and the result twice.

    What an earlier attempt left counts as room, but for the kept ones that stay until a new
    checkpoint is whole. The result is copied where a pipeline takes it.

    Args:
        need: Of the run.
        config: Of the engine.
        directory: Of the run.
        share_here: Of the workers, those that stage their shards on this machine.

    Raises:
        TrainingError: a disk is too small.
    """
    one, saved = need.checkpoint, directory / "checkpoints"
    kept = sum(_size(path) for path in saved.glob("step-*"))
    gone = sum(_size(path) for path in saved.glob(".step-*")) + _size(directory / "model")
    needed = max(one, (config.keep_checkpoints + 1) * one - kept) + 2 * 4 * need.parameters - gone
    places = {directory: needed}
    staging = config.checkpoint_staging
    staged = round(one * share_here)
    if staging is not None:
        same = _existing(staging).stat().st_dev == _existing(directory).stat().st_dev
        places = {directory: needed + staged} if same else {directory: needed, staging: staged}
    for folder, size in places.items():
        free = shutil.disk_usage(_existing(folder)).free
        if free < size:
            setting = "--checkpoint-staging" if folder == staging else "--out"
            raise TrainingError(
                f"{folder} needs about {size / 1e9:.2f} GB more for checkpoints and "
                f"{_existing(folder)} has {free / 1e9:.2f} GB free: free some, set another "
                f"{setting} or --keep-checkpoints 1"
            )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.resolve()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _size(folder: Path) -> int:
    """Bytes of the files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
