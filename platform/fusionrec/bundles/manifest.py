"""What a bundle says of itself: every file with its hash, and what the files were made from.

The manifest holds no time and no path outside the bundle, so the same data set, configuration and
machine give the same manifest, and so the same id. Who was in service before whom is not part of a
bundle: the store's history keeps that.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError

from fusionrec.config import Config
from fusionrec.errors import BundleCorrupt

MANIFEST = "manifest.json"
_ID_DIGITS = 32
"""Hex digits of a bundle id: 128 bits of the manifest's SHA-256."""


class FileEntry(Config):
    """One file of a bundle."""

    path: str
    """Relative to the bundle, with forward slashes."""
    size: int = Field(ge=0)
    """Bytes."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Config):
    """The content of ``manifest.json``."""

    format_version: Literal[1] = 1
    dataset: dict[str, Any]
    """Name, fingerprint and size of the data set that the pipeline was made from."""
    pipeline: dict[str, Any]
    """The configuration of the pipeline, as in its ``pipeline.json``."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """What was measured on validation and test, as in the pipeline's ``metrics.json``; under
    ``indexes``, of each source that searches vectors, how and with which recall; under
    ``inference``, what its quality is in each precision that was measured."""
    files: tuple[FileEntry, ...]
    """All files but the manifest itself, ordered by path."""

    @property
    def id(self) -> str:
        """The name of the bundle: a hash of the canonical form."""
        return hashlib.sha256(self.canonical()).hexdigest()[:_ID_DIGITS]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def canonical(self) -> bytes:
        """The one spelling of this manifest in JSON: sorted keys, no spaces, UTF-8."""
        document = self.model_dump(mode="json")
        return json.dumps(
            document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()

    @classmethod
    def load(cls, bundle: Path) -> Self:
        """The manifest of the bundle in ``bundle``.

        Raises:
            BundleCorrupt: it is missing, is not a manifest, or is not the one the directory is
                named after.
        """
        path = bundle / MANIFEST
        try:
            manifest = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise BundleCorrupt(
                f"{path} cannot be read ({error.strerror}): the bundle must not be used; publish "
                "again or roll back"
            ) from error
        except ValidationError as error:
            raise BundleCorrupt(
                f"{path} is not a manifest ({error.errors()[0]['msg']}): the bundle must not be "
                "used; publish again or roll back"
            ) from error
        if manifest.id != bundle.name:
            raise BundleCorrupt(
                f"{path} was changed: its hash is {manifest.id}, not the {bundle.name} that the "
                "bundle is named after; publish again or roll back"
            )
        return manifest


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(directory: Path) -> list[str]:
    """Relative paths of all files under ``directory``, sorted; anything else in it is refused.

    Raises:
        BundleCorrupt: there is a link, a socket or another thing that is not a plain file.
    """
    found = []
    for path in directory.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise BundleCorrupt(f"{path} is not a plain file: a bundle holds only plain files")
        if path.is_file():
            found.append(path.relative_to(directory).as_posix())
    return sorted(found)


def verify(bundle: Path) -> Manifest:
    """Check every file of a bundle against its manifest. Reads all of it (about 1 GB/s).

    Raises:
        BundleCorrupt: names the first file that is missing, additional or changed.
    """
    manifest = Manifest.load(bundle)
    listed = {file.path: file for file in manifest.files}
    present = set(list_files(bundle)) - {MANIFEST}
    remedy = "the bundle must not be used; publish again or roll back"
    for name in sorted(set(listed) - present):
        raise BundleCorrupt(f"{bundle / name} is missing: {remedy}")
    for name in sorted(present - set(listed)):
        raise BundleCorrupt(f"{bundle / name} is not listed in the manifest: {remedy}")
    for name, file in listed.items():
        path = bundle / name
        if path.stat().st_size != file.size:
            raise BundleCorrupt(
                f"{path} has {path.stat().st_size} bytes, the manifest says {file.size}: {remedy}"
            )
        if hash_file(path) != file.sha256:
            raise BundleCorrupt(f"{path} was changed: its hash is not the manifest's; {remedy}")
    return manifest
