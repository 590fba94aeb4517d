"""S³-Rec's sequence files: a line a user, ``user item item …``, oldest first, without times.

The attributes of the items lie in ``<name>_item2attributes.json``, as ids: attribute 12 becomes the
category "attribute 12". The position of an item in its line stands for the time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa

from fusionrec.data.readers import text
from fusionrec.data.readers.protocol import (
    BROKEN,
    NOT_UTF8,
    WRONG_FIELDS,
    Options,
    Refused,
    Rows,
)
from fusionrec.errors import DataError

TWO_LINES = "user has another line"
_ATTRIBUTES = "_item2attributes.json"
_BATCH_EVENTS = 1 << 16


@dataclass(frozen=True)
class S3RecReader:
    """One sequence file, and its attributes where they are there."""

    format: ClassVar[str] = "s3rec"
    path: Path
    attributes: Path | None
    has_timestamps: bool = False
    timestamp_unit: str = "s"
    values_may_miss: bool = False

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether attributes lie beside a sequence file of the same name."""
        return any(_sequences(path).is_file() for path in folder.glob(f"*{_ATTRIBUTES}"))

    @classmethod
    def open(cls, folder: Path, options: Options) -> Self:  # noqa: ARG003 - the protocol's
        """Find the one pair of files, or the one text file."""
        pairs = [path for path in folder.glob(f"*{_ATTRIBUTES}") if _sequences(path).is_file()]
        if len(pairs) == 1:
            return cls(_sequences(pairs[0]), pairs[0])
        texts = sorted(folder.glob("*.txt"))
        if pairs or len(texts) != 1:
            there = ", ".join(path.name for path in texts) or "none"
            raise DataError(
                f"{folder} must hold one S³-Rec sequence file NAME.txt (there: {there}): "
                "put each data set into a folder of its own"
            )
        return cls(texts[0], None)

    def interactions(self) -> Iterator[Rows]:
        """The events of all users, line by line."""
        users: list[str] = []
        items: list[str] = []
        places: list[int] = []
        lengths: list[int] = []
        refused: list[Refused] = []
        seen: set[str] = set()
        progress = 0.0

        def batch() -> Rows:
            counts = np.array(lengths, dtype=np.int64)
            starts = np.repeat(np.cumsum(counts) - counts, counts)
            positions = np.arange(len(items)) - starts
            owners = pa.array(users, pa.string()).take(
                pa.array(np.repeat(range(len(users)), counts))
            )
            table = pa.table(
                {
                    "user_id": owners,
                    "item_id": pa.array(items, pa.string()),
                    "timestamp": pa.array(positions, pa.int64()),
                    "domain": pa.repeat(pa.scalar(self._domain), len(items)),
                }
            )
            lines = np.repeat(np.array(places, dtype=np.int64), counts)
            return Rows(self.path.name, lines, table, refused, progress)

        for number, line, share in text.lines(self.path):
            progress = share
            user, *row = line.split()
            if BROKEN in line or not row or user in seen:
                reason = NOT_UTF8 if BROKEN in line else TWO_LINES if row else WRONG_FIELDS
                refused.append(Refused(number, reason, line))
                continue
            seen.add(user)
            users.append(user)
            items.extend(row)
            places.append(number)
            lengths.append(len(row))
            if len(items) >= _BATCH_EVENTS:
                yield batch()
                users, items, places, lengths, refused = [], [], [], [], []
        yield batch()

    def items(self) -> Iterator[Rows] | None:
        """The items of the attribute file, in its order."""
        return None if self.attributes is None else self._items(self.attributes)

    def _items(self, path: Path) -> Iterator[Rows]:
        with text.TextStream(path) as stream:
            content = stream.readall()
        try:
            attributes = json.loads(content)
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        if not isinstance(attributes, dict):
            raise DataError(f"{path} must be a JSON object of item ids to lists of attributes")
        for item_id, ids in attributes.items():
            if not isinstance(ids, list):
                raise DataError(f"{path}: item {item_id!r} must have a list of attributes")
        table = pa.table(
            {
                "item_id": pa.array(attributes, pa.string()),
                "categories": pa.array(
                    [[f"attribute {i}" for i in ids] for ids in attributes.values()],
                    pa.list_(pa.string()),
                ),
                "domain": pa.repeat(pa.scalar(self._domain), len(attributes)),
            }
        )
        # The file is one JSON object: an item's place is its position in it.
        yield Rows(path.name, np.arange(1, len(attributes) + 1), table, progress=1.0)

    @property
    def _domain(self) -> str:
        return self.path.stem.lower()


def _sequences(attributes: Path) -> Path:
    return attributes.with_name(attributes.name.removesuffix(_ATTRIBUTES) + ".txt")
