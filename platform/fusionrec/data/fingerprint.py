"""The fingerprint of a data set: SHA-256 of its content, streamed, the same for any batches."""

from __future__ import annotations

import hashlib
import json
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class ColumnHash:
    """SHA-256 over the values of a column in order, whatever the batches that they come in."""

    def __init__(self) -> None:
        self._type = ""
        self._shape = hashlib.sha256()
        """Lengths of strings and lists; which numbers are null."""
        self._values = hashlib.sha256()
        self._child: ColumnHash | None = None

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Self:
        """The hash of a whole column."""
        content = cls()
        content.update(column)
        return content

    def update(self, column: pa.ChunkedArray) -> None:
        """Append values."""
        self._type = str(column.type)
        for chunk in column.chunks:
            self._update(chunk)

    def _update(self, array: pa.Array) -> None:
        kind = array.type
        if pa.types.is_string(kind) or pa.types.is_binary(kind):
            filled = pc.fill_null(array, "" if pa.types.is_string(kind) else b"")
            lengths = pc.if_else(pc.is_valid(array), pc.binary_length(filled), -1)
            self._shape.update(lengths.to_numpy(zero_copy_only=False).astype("<i4").tobytes())
            data = filled.buffers()[2]
            if data is not None:
                edges = np.frombuffer(filled.buffers()[1], np.int32)
                start, stop = edges[filled.offset], edges[filled.offset + len(filled)]
                self._values.update(memoryview(data)[start:stop])
        elif pa.types.is_list(kind):
            lengths = pc.fill_null(pc.list_value_length(array), -1)
            self._shape.update(lengths.to_numpy(zero_copy_only=False).astype("<i4").tobytes())
            self._child = self._child or ColumnHash()
            self._child.update(pa.chunked_array([array.flatten()]))
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
            valid = pc.is_valid(array).to_numpy(zero_copy_only=False)
            self._shape.update(valid.astype(np.uint8).tobytes())
            self._values.update(pc.fill_null(array, 0).to_numpy(zero_copy_only=False).tobytes())
        else:  # rare types of extra item columns: one JSON value a line
            for value in array.to_pylist():
                self._values.update(json.dumps(value, default=str).encode() + b"\n")

    def digest(self) -> list[str]:
        """Type and hashes; comparable between runs and machines."""
        child = self._child.digest() if self._child is not None else []
        return [self._type, self._shape.hexdigest(), self._values.hexdigest(), *child]


def fingerprint(interactions: dict[str, ColumnHash], items: dict[str, ColumnHash]) -> str:
    """The fingerprint of a data set from the hashes of its columns, in hex."""
    parts = {
        "interactions": {name: content.digest() for name, content in interactions.items()},
        "items": {name: content.digest() for name, content in items.items()},
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
