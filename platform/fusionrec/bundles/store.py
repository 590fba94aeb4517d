"""A folder of bundles: publishing, the ``current`` link, rollback.

::

    BUNDLES/<id>/            a bundle; never changed after its rename
    BUNDLES/current          link to the bundle in service, swapped atomically
    BUNDLES/history.json     what was put in service, oldest first; rollback reads it
    BUNDLES/.new-*           a publish that did not finish; removed by the next one

Files are copied, not linked: a job that writes the pipeline directory again would otherwise change
what is in service. One publisher at a time (a file lock); readers need no lock, because ``current``
names a complete bundle at every moment, whatever dies or fills up in between.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from fusionrec.bundles.manifest import MANIFEST, FileEntry, Manifest, list_files, verify
from fusionrec.config import Config
from fusionrec.errors import BundleCorrupt, BundleError

_CHUNK_BYTES = 1 << 20


class Promotion(Config):
    """One line of the store's history."""

    bundle: str
    parent: str | None
    """The bundle that was in service before."""
    promoted_at: float
    """Seconds since the epoch."""
    reason: str
    """Why it was let in."""


_HISTORY = TypeAdapter(tuple[Promotion, ...])


@dataclass(frozen=True)
class BundleStore:
    """Handle on a folder of bundles; the folder is made by the first publish."""

    directory: Path

    def current_id(self) -> str | None:
        """Id of the bundle in service; None where nothing was promoted yet."""
        try:
            return (self.directory / "current").readlink().name
        except FileNotFoundError:
            return None

    def path(self, bundle_id: str) -> Path:
        """Where the bundle ``bundle_id`` lies."""
        return self.directory / bundle_id

    def current(self) -> Path:
        """Where the bundle in service lies.

        Raises:
            BundleError: nothing was promoted yet.
        """
        bundle_id = self.current_id()
        if bundle_id is None:
            raise BundleError(
                f"{self.directory} has no current bundle; publish one with "
                f"`python -m jobs.publish --pipeline DIR --bundles {self.directory}`"
            )
        return self.path(bundle_id)

    def verify(self, bundle_id: str) -> Manifest:
        """Check every file of a bundle.

        Raises:
            BundleCorrupt: names the file.
        """
        return verify(self.path(bundle_id))

    def add(self, pipeline: Path) -> Manifest:
        """Copy a pipeline directory in as a bundle, without putting it in service.

        A bundle that is there already is verified and kept; if it was damaged, it is replaced.

        Raises:
            BundleError: the directory is not a pipeline, or the disk is full.
        """
        document = read_json(pipeline / "pipeline.json", required=True)
        metrics = read_json(pipeline / "metrics.json", required=False)
        if indexes := _indexes(pipeline, document):
            metrics["indexes"] = indexes
        files = _publishable(pipeline)
        with self._lock(), _disk_errors(self.directory):
            self._clean()
            size = sum((pipeline / name).stat().st_size for name in files)
            free = shutil.disk_usage(self.directory).free
            if size > free:
                raise OSError(errno.ENOSPC, f"{size:,} bytes are needed, {free:,} are free")
            temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=self.directory))
            try:
                manifest = Manifest(
                    dataset=dict(document.get("dataset") or {}),
                    pipeline=document,
                    metrics=metrics,
                    files=tuple(_copy(pipeline, name, temporary) for name in files),
                )
                _write(temporary / MANIFEST, manifest.canonical())
                _settle(temporary, self.path(manifest.id))
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        return manifest

    def promote(self, bundle_id: str, reason: str) -> None:
        """Put a bundle in service, after verifying it.

        Raises:
            BundleCorrupt: the bundle is damaged; what was in service stays.
            BundleError: the disk is full; likewise.
        """
        self.verify(bundle_id)
        with self._lock(), _disk_errors(self.directory):
            history = self._history()
            parent = self.current_id()
            if parent == bundle_id:
                return
            self._swap(bundle_id)
            self._write_history(
                (
                    *history,
                    Promotion(
                        bundle=bundle_id, parent=parent, promoted_at=time.time(), reason=reason
                    ),
                )
            )

    def rollback(self) -> str:
        """Put the bundle in service that was there before the current one; returns its id.

        Raises:
            BundleError: there is none, or it is damaged; what is in service stays.
        """
        with self._lock(), _disk_errors(self.directory):
            history = self._history()
            if len(history) < 2:
                raise BundleError(
                    f"{self.directory} has no bundle before {self.current_id()} to go back to"
                )
            previous = history[-2].bundle
            self.verify(previous)
            self._swap(previous)
            self._write_history(history[:-1])
        return previous

    def history(self) -> tuple[Promotion, ...]:
        """What was put in service and is not rolled back, oldest first."""
        return self._history()

    def _history(self) -> tuple[Promotion, ...]:
        """The history as the link tells it.

        The link is swapped before the history is written. After a crash in between, the link is
        right: a current bundle that the history has not at its end is looked up, or added.
        """
        current = self.current_id()
        path = self.directory / "history.json"
        try:
            history = _HISTORY.validate_json(path.read_bytes())
        except FileNotFoundError:
            history = ()
        except ValidationError as error:
            raise BundleError(
                f"{path} is damaged; remove it (rollback then knows no earlier bundle)"
            ) from error
        if current is None:
            return ()
        for end in range(len(history), 0, -1):
            if history[end - 1].bundle == current:
                return history[:end]
        parent = history[-1].bundle if history else None
        lost = Promotion(bundle=current, parent=parent, promoted_at=0, reason="not recorded")
        return (*history, lost)

    def _write_history(self, history: tuple[Promotion, ...]) -> None:
        temporary = self.directory / ".new-history"
        _write(temporary, _HISTORY.dump_json(history, indent=1))
        temporary.replace(self.directory / "history.json")
        _sync(self.directory)

    def _swap(self, bundle_id: str) -> None:
        temporary = self.directory / ".new-current"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(bundle_id)
        temporary.replace(self.directory / "current")
        _sync(self.directory)

    def _clean(self) -> None:
        """Remove what an unfinished publish left; only the holder of the lock may."""
        for path in self.directory.glob(".new-*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def read_json(path: Path, *, required: bool) -> dict[str, Any]:
    """A JSON object; an empty one for a missing file that is not required.

    Raises:
        BundleError: the file is missing or is not a JSON object.
    """
    if not required and not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(
            f"{path.parent} is not a pipeline directory: {path.name} cannot be read "
            f"({error.strerror}); make one with `python -m jobs.fit`"
        ) from error
    except ValueError as error:
        raise BundleError(f"{path} is not JSON ({error}); fit the pipeline again") from error
    if not isinstance(document, dict):
        raise BundleError(f"{path} must hold a JSON object; fit the pipeline again")
    return document


def _indexes(pipeline: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Source → what was measured of its vector index, where it has one."""
    places = {name: pipeline / "sources" / name for name in document.get("sources", ())}
    found = {n: read_json(place / "index.json", required=False) for n, place in places.items()}
    return {name: index for name, index in found.items() if index}


def _publishable(pipeline: Path) -> list[str]:
    try:
        names = list_files(pipeline)
    except BundleCorrupt as error:
        raise BundleError(f"{error}; replace it by the file that it stands for") from error
    # A dot begins the name of what a job that was killed left, such as .encoder.partial/.
    return [
        name
        for name in names
        if name != MANIFEST and not any(part.startswith(".") for part in name.split("/"))
    ]


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """A full disk becomes one sentence; what is in service is untouched by then."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}:
            raise
        raise BundleError(
            f"{directory} cannot take the bundle ({error.strerror}): free some space or choose "
            "another folder with --bundles; the current bundle stays in service"
        ) from error


def _copy(pipeline: Path, name: str, bundle: Path) -> FileEntry:
    """Copy one file, hash what was written, and wait until the disk has it."""
    target = bundle / name
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with (pipeline / name).open("rb") as source, target.open("xb") as copy:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            copy.write(chunk)
        _flush(copy)
    target.chmod(0o444)
    return FileEntry(path=name, size=size, sha256=digest.hexdigest())


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        _flush(file)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(temporary: Path, final: Path) -> None:
    """Give a finished bundle its name."""
    for directory in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
        _sync(directory)
    temporary.chmod(0o755)  # mkdtemp makes it private to its user
    if final.exists():
        try:
            verify(final)
        except BundleCorrupt:
            final.rename(final.with_name(f".new-damaged-{final.name}"))
        else:
            shutil.rmtree(temporary)
            return
    temporary.rename(final)
    _sync(final.parent)
