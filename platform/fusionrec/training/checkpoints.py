"""Checkpoints that count only when every shard of every worker is on disk and hashed.

::

    DIR/step-00000050/manifest.json        written last, then the directory gets its name
    DIR/step-00000050/deepspeed/…          DeepSpeed's own shards: pickles, so they are read only
                                           after their hashes were checked
    DIR/step-00000050/rank-00000.safetensors  random states of each worker, loss and time so far
    DIR/.step-00000100                     being written, or left by a crash: never read

The newest committed checkpoint is found by looking, not by a pointer that a crash could leave
behind. One with a truncated, flipped, missing or surplus file is passed over for the one before.
A worker that cannot write, because its disk is full, makes all of them give the checkpoint up.
The directory must be seen by all workers. Hashing costs about a second per GiB and worker.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors import SafetensorError

from fusionrec.config import Config
from fusionrec.errors import CheckpointNotWritten
from fusionrec.progress import console

MANIFEST = "manifest.json"


class FileRecord(Config):
    """What a file must be like."""

    sha256: str
    size: int
    """Bytes."""


class Manifest(Config):
    """Contents of ``manifest.json``."""

    step: int
    """Optimizer steps done."""
    world_size: int
    """Workers that wrote shards."""
    identity: dict[str, Any]
    """Task and settings of the run."""
    files: dict[str, FileRecord]
    """By path relative to the checkpoint."""

    @property
    def digest(self) -> str:
        """SHA-256 over the manifest itself, stored beside it: a flipped bit here counts too."""
        body = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(body.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint whose files are intact."""

    directory: Path
    manifest: Manifest


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, after it reached the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoints:
    """The checkpoints of one run; every method is called by all workers together."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self.directory = directory
        self._keep = keep
        self._rank, self._world = dist.get_rank(), dist.get_world_size()

    def save(self, step: int, identity: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Commit a checkpoint; ``write(directory)`` writes a worker's shards.

        Args:
            step: Optimizer steps done.
            identity: Task and settings of the run.
            write: Takes all workers through the same collectives, also the one that fails.

        Raises:
            CheckpointNotWritten: on all ranks; the checkpoints before it stay, and what was
                written of this one is removed.
        """
        final = self.directory / f"step-{step:08d}"
        partial = self.directory / f".{final.name}"

        def prepare() -> None:
            self._clear(partial)
            partial.mkdir(parents=True)

        def add_hashes() -> None:
            hashes = partial / f".hashes-{self._rank:05d}.json"
            hashes.write_text(json.dumps(self._hash_share(partial)), encoding="utf-8")

        first = self._rank == 0
        stages: list[Callable[[], None] | None] = [
            prepare if first else None,
            lambda: write(partial),
            add_hashes,
            (lambda: self._commit(partial, final, step, identity)) if first else None,
        ]
        for stage in stages:
            fault = self._together(stage)
            if fault is not None:
                if first:
                    shutil.rmtree(partial, ignore_errors=True)
                raise CheckpointNotWritten(
                    f"checkpoint {final} could not be written ({fault}); free space there and run "
                    "the same command again: it goes on from the checkpoint before"
                )

    def _together(self, stage: Callable[[], None] | None) -> str | None:
        """Run a stage, wait for all workers, and say what went wrong on any of them."""
        fault = None
        try:
            if stage is not None:
                stage()
        except (OSError, RuntimeError, SafetensorError) as error:  # so is a full disk told, by whom
            fault = f"worker {self._rank}: {' '.join(str(error).split())[:200]}"
        faults: list[str | None] = [None] * self._world
        dist.all_gather_object(faults, fault)
        return next((reason for reason in faults if reason), None)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose every file is as its manifest says."""
        found: list[Any] = [[]]
        if self._rank == 0:
            for stale in self.directory.glob(".step-*"):
                self._clear(stale)
            found[0] = sorted((p.name for p in self.directory.glob("step-*")), reverse=True)
        dist.broadcast_object_list(found, src=0)
        for name in found[0]:
            fault, manifest = self._inspect(self.directory / name)
            faults: list[str | None] = [None] * self._world
            dist.all_gather_object(faults, fault)
            reasons = [reason for reason in faults if reason]
            if manifest is not None and not reasons:
                return Checkpoint(self.directory / name, manifest)
            if self._rank == 0:
                console.print(f"checkpoint {name} is passed over: {reasons[0]}", highlight=False)
        return None

    def _share(self, paths: Iterable[str]) -> list[str]:
        """Workers share the hashing evenly, whoever wrote the file."""
        return sorted(paths)[self._rank :: self._world]

    def _hash_share(self, directory: Path) -> dict[str, Any]:
        return {
            name: {"sha256": sha256_of(directory / name), "size": (directory / name).stat().st_size}
            for name in self._share(_files(directory))
        }

    def _commit(self, partial: Path, final: Path, step: int, identity: dict[str, Any]) -> None:
        files: dict[str, Any] = {}
        for part in sorted(partial.glob(".hashes-*.json")):
            files |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        manifest = Manifest(step=step, world_size=self._world, identity=identity, files=files)
        stored = {"digest": manifest.digest, "manifest": manifest.model_dump(mode="json")}
        with (partial / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(stored, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        self._clear(final)  # a corrupt one of the same step, passed over when the run resumed
        partial.rename(final)
        _sync_directory(self.directory)
        for old in sorted(self.directory.glob("step-*"))[: -self._keep]:
            self._clear(old)

    def _inspect(self, directory: Path) -> tuple[str | None, Manifest | None]:
        """(what is wrong with this worker's share, the manifest)."""
        try:
            stored = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            manifest = Manifest.model_validate(stored["manifest"])
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return f"{MANIFEST} is missing or malformed", None
        if stored.get("digest") != manifest.digest or directory.name != f"step-{manifest.step:08d}":
            return f"{MANIFEST} was changed", None
        if set(_files(directory)) != set(manifest.files):
            return "a file is missing or surplus", manifest
        for name in self._share(manifest.files):
            path, record = directory / name, manifest.files[name]
            if path.stat().st_size != record.size or sha256_of(path) != record.sha256:
                return f"{name} is not what was written", manifest
        return None, manifest

    @staticmethod
    def _clear(directory: Path) -> None:
        if not directory.exists():
            return
        # Renamed first: a crash half-way through must not leave something that looks committed.
        doomed = directory.with_name(f".{directory.name.lstrip('.')}.doomed")
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        shutil.rmtree(doomed)


def _files(directory: Path) -> list[str]:
    """Relative paths of everything but the manifest and the workers' hash lists."""
    return [
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".hashes-")
    ]


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def random_states() -> dict[str, torch.Tensor]:
    """States of torch's generators, from which dropout draws; the order of examples needs none."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, torch.Tensor]) -> None:
    """The inverse of :func:`random_states`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
