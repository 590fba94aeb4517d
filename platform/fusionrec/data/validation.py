"""Which raw rows are events, and what is wrong with the others."""

from __future__ import annotations

import pyarrow as pa

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("place", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("row", pa.string()),
    ]
)
"""The rows refused: ``file:line``, why, and the row as far as it could be read."""
