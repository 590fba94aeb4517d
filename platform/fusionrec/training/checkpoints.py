"""Checkpoints that count only when every shard of every worker is on disk and hashed.

::

    DIR/step-00000050/manifest.json        written last, then the directory gets its name
    DIR/step-00000050/deepspeed/…          DeepSpeed's own shards: pickles, so they are read only
                                           after their hashes were checked
    DIR/step-00000050/rank-00000.safetensors  random states of each worker, loss and time so far
    DIR/step-00000050/chosen.safetensors   what the task chose by the model of then, such as mined
                                           negatives; only of tasks that do
    DIR/.step-00000100                     being written, or left by a crash: never read
    DIR/.step-00000100.passed-over         damaged; removed once a sound one is committed

The newest committed checkpoint is found by looking, not by a pointer that a crash could leave
behind. One with a truncated, flipped, missing or surplus file is passed over for the one before,
and loses its name, or it would be kept in place of a sound one.
A worker that cannot write, because its disk is full, makes all of them give the checkpoint up.

Training waits only until the shards are written. A thread then waits for the disk, hashes (about a
second per GiB and worker), uploads where the shards were staged on the worker's own disk, and
commits, one checkpoint at a time. The directory must be seen by all workers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial as bind
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
CHOSEN = "chosen.safetensors"
_PASSED_OVER = ".passed-over"


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

    def __init__(self, directory: Path, *, keep: int, staging: Path | None = None) -> None:
        """Prepare to write to ``directory``, and read from it.

        Args:
            directory: Seen by all workers.
            keep: Newest checkpoints that are kept.
            staging: On each worker's own disk; shards are written there first.
        """
        self.directory = directory
        self._keep = keep
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._staging = None
        if staging is not None:
            # Runs may share the folder, and workers of a machine do.
            run = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
            self._staging = staging / f"{run}-{self._rank:05d}"
        # A group of its own: the thread's collectives must not meet those of the steps.
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None

    def save(self, step: int, identity: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Begin a checkpoint, which is committed while training goes on.

        Waits for the one under way. ``write(directory)`` writes a worker's shards.

        Args:
            step: Optimizer steps done.
            identity: Task and settings of the run.
            write: Takes all workers through the same collectives, also the one that fails.

        Raises:
            CheckpointNotWritten: on all ranks, of this one or the one under way; those before stay,
                and what was written of it is removed.
        """
        self.wait()
        final = self.directory / f"step-{step:08d}"
        partial = self.directory / f".{final.name}"
        own = self._staging or partial

        def prepare() -> None:
            if self._rank == 0:
                self._clear(partial)
                partial.mkdir(parents=True)
            if self._staging is not None:
                shutil.rmtree(own, ignore_errors=True)  # of a run that was killed
                own.mkdir(parents=True)

        self._all(final, partial, prepare, lambda: write(own))
        commit = bind(self._commit, partial, final, step, identity)
        self._under_way = self._thread.submit(
            self._all, final, partial, bind(self._upload, own, partial), commit
        )

    @property
    def failed(self) -> bool:
        """Whether the checkpoint under way is known to have failed; :meth:`wait` says why.

        Workers come to know it one after another: what they do about it they must agree on.
        """
        pending = self._under_way
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Wait until the checkpoint under way is committed.

        Raises:
            CheckpointNotWritten: on all ranks.
        """
        pending, self._under_way = self._under_way, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let the checkpoint under way end, however it does; nothing is saved afterwards."""
        self._thread.shutdown()
        dist.destroy_process_group(self._group)

    def _all(self, final: Path, partial: Path, *stages: Callable[[], None]) -> None:
        """Run stages, each of which begins when all workers are done with the one before."""
        for stage in stages:
            fault = self._together(stage)
            if fault is not None:
                if self._rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                if self._staging is not None:
                    shutil.rmtree(self._staging, ignore_errors=True)
                place = "there"
                if self._staging is not None:
                    place += f" and in {self._staging.parent} on each worker's disk"
                raise CheckpointNotWritten(
                    f"checkpoint {final} could not be written ({fault}); free space {place} and "
                    "run the same command again: it goes on from the checkpoint before"
                )

    def _together(self, stage: Callable[[], None]) -> str | None:
        """Run a stage, wait for all workers, and say what went wrong on any of them."""
        fault = None
        try:
            stage()
        except (OSError, RuntimeError, SafetensorError) as error:  # so is a full disk told, by whom
            fault = f"worker {self._rank}: {' '.join(str(error).split())[:200]}"
        faults: list[str | None] = [None] * self._world
        dist.all_gather_object(faults, fault, group=self._group)
        return next((reason for reason in faults if reason), None)

    def _upload(self, own: Path, partial: Path) -> None:
        """Leave this worker's files and their hashes in ``partial``."""
        files = sorted(_files(own)) if self._staging else self._share(_files(partial))
        records: dict[str, Any] = {}
        for name in files:
            path = own / name
            # Of what was written, not of what arrived: the two are compared when it is read.
            records[name] = {"sha256": sha256_of(path), "size": path.stat().st_size}
            if self._staging:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, partial / name)
                _sync(partial / name)
        hashes = partial / f".hashes-{self._rank:05d}.json"
        hashes.write_text(json.dumps(records), encoding="utf-8")
        if self._staging:
            shutil.rmtree(own)

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
                (self.directory / name).rename(self.directory / f".{name}{_PASSED_OVER}")
        return None

    def _share(self, paths: Iterable[str]) -> list[str]:
        """Workers share the hashing evenly, whoever wrote the file."""
        return sorted(paths)[self._rank :: self._world]

    def _commit(self, partial: Path, final: Path, step: int, identity: dict[str, Any]) -> None:
        if self._rank != 0:
            return
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
        partial.rename(final)
        _sync(self.directory)
        passed_over = self.directory.glob(f".step-*{_PASSED_OVER}")
        for old in (*sorted(self.directory.glob("step-*"))[: -self._keep], *passed_over):
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


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
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
