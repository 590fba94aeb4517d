"""JSON lines in batches of objects, and objects as columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from fusionrec.data.readers import text
from fusionrec.data.readers.protocol import BROKEN, NOT_JSON, NOT_UTF8, Refused, Rows

Record: TypeAlias = dict[str, Any]


@dataclass
class Records:
    """Some objects of a JSONL file, with the line of each."""

    lines: list[int] = field(default_factory=list)
    objects: list[Record] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    progress: float = 1.0

    def rows(self, file: str, table: pa.Table) -> Rows:
        """The objects as ``table`` has them."""
        lines = np.array(self.lines, dtype=np.int64)
        return Rows(file, lines, table, self.refused, self.progress)


def read(path: Path, batch_bytes: int | None = 4 << 20) -> Iterator[Records]:
    """The objects of ``path`` in batches; ``None`` gives the whole file as one.

    Raises:
        DataError: the file cannot be read or is empty.
    """
    batch, size = Records(), 0
    for number, line, progress in text.lines(path):
        size += len(line)
        batch.progress = progress
        try:
            value = json.loads(line)
            if "\\u" in line:
                json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
            reason = NOT_UTF8 if BROKEN in line else "" if isinstance(value, dict) else NOT_JSON
        except UnicodeEncodeError:
            reason = NOT_UTF8
        except (ValueError, RecursionError):
            reason = NOT_UTF8 if BROKEN in line else NOT_JSON
        if reason:
            batch.refused.append(Refused(number, reason, line))
        else:
            batch.lines.append(number)
            batch.objects.append(value)
        if batch_bytes is not None and size >= batch_bytes:
            yield batch
            batch, size = Records(), 0
    yield batch


def as_text(value: Any) -> str | None:
    """A JSON value as a field of a text table would hold it."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def text_column(objects: Sequence[Record], key: str) -> pa.Array:
    """[N] the values under ``key`` as strings; null where an object lacks it."""
    return pa.array([as_text(record.get(key)) for record in objects], pa.string())


def column(objects: Sequence[Record], key: str) -> pa.Array:
    """[N] the values under ``key`` in their own type, or as JSON texts if they have several."""
    values = [record.get(key) for record in objects]
    kinds = {type(value) for value in values if value is not None}
    try:
        if kinds <= {str} or kinds == {bool} or kinds == {int}:
            return pa.array(values, pa.string() if kinds <= {str} else None)
        if kinds <= {int, float}:
            return pa.array(values, pa.float64())
        if kinds == {list} and all(isinstance(v, str) for row in values for v in row or ()):
            return pa.array(values, pa.list_(pa.string()))
    except (pa.ArrowInvalid, OverflowError):  # integers beyond 64 bits
        pass
    return pa.array([as_text(value) for value in values], pa.string())
