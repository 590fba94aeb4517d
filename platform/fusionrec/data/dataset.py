"""A data set on disk, as ``jobs.ingest`` leaves it and every later stage reads it.

::

    DIR/interactions/part-00000.parquet …   INTERACTION_SCHEMA, in the order of the raw files
    DIR/items.parquet                       ITEM_SCHEMA and any extra columns
    DIR/quarantine.parquet                  the rows refused, with reason and place
    DIR/dataset.json                        DatasetInfo

``dataset.json`` is written last: a directory without it is not a data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from fusionrec.config import Config
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import CodeArray, FloatArray, IntArray
from fusionrec.errors import DataError

INTERACTION_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("timestamp", pa.int64(), nullable=False),
        pa.field("event", pa.string(), nullable=False),
        pa.field("value", pa.float32()),
        pa.field("text", pa.string()),
        pa.field("domain", pa.string()),
    ]
)


class DatasetInfo(Config):
    """What ``dataset.json`` says."""

    name: str
    """Name of the raw folder, or of the generator."""
    format: str
    """The reader that made it: movielens, s3rec, recbole, amazon-reviews, table, synthetic."""
    fingerprint: str
    """SHA-256 over the content of interactions and items, in order."""
    num_interactions: int
    num_users: int
    num_items: int
    num_quarantined: int = 0
    has_timestamps: bool = True
    """False where the raw files give an order only; ``timestamp`` then counts a user's events."""


@dataclass(frozen=True, slots=True)
class Events:
    """N interactions as flat arrays, in file order."""

    users: CodeArray
    """[N] positions in ``user_ids``."""
    items: CodeArray
    """[N] item codes."""
    timestamps: IntArray
    """[N] seconds since the epoch."""
    values: FloatArray
    """[N] ratings; NaN for implicit feedback."""
    user_ids: tuple[str, ...]
    """Users in order of first appearance."""


@dataclass(frozen=True)
class Dataset:
    """Handle on a data set's directory; reads lazily."""

    directory: Path
    info: DatasetInfo

    @classmethod
    def open(cls, directory: Path | str) -> Self:
        """Open what ``jobs.ingest`` wrote.

        Raises:
            DataError: the directory is not a data set.
        """
        directory = Path(directory)
        path = directory / "dataset.json"
        if not path.is_file():
            raise DataError(
                f"{directory} is not a data set: it has no dataset.json; "
                "make one with `python -m jobs.ingest --raw FOLDER --out DIR`"
            )
        try:
            info = DatasetInfo.model_validate_json(path.read_bytes())
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise DataError(f"{path} cannot be read ({reason}); ingest again") from error
        return cls(directory, info)

    @cached_property
    def items(self) -> pa.Table:
        """The item table with all its columns."""
        return pq.read_table(self.directory / "items.parquet")

    @cached_property
    def catalogue(self) -> Catalogue:
        """The items, in the order of the item table: their codes are positions in it."""
        return Catalogue.from_table(self.items)

    def interactions(self, columns: list[str] | None = None) -> pa.Table:
        """The interactions in file order."""
        parts = sorted((self.directory / "interactions").glob("part-*.parquet"))
        return pa.concat_tables(pq.read_table(part, columns=columns) for part in parts)

    @cached_property
    def events(self) -> Events:
        """The interactions as flat arrays."""
        table = self.interactions(["user_id", "item_id", "timestamp", "value"])
        users = table.column("user_id").combine_chunks().dictionary_encode()
        items = pc.index_in(
            table.column("item_id").combine_chunks(), self.items.column("item_id").combine_chunks()
        )
        return Events(
            users=users.indices.to_numpy(zero_copy_only=False).astype(np.int32),
            items=items.to_numpy(zero_copy_only=False).astype(np.int32),
            timestamps=table.column("timestamp").to_numpy().astype(np.int64),
            values=table.column("value").to_numpy(zero_copy_only=False).astype(np.float32),
            user_ids=tuple(users.dictionary.to_pylist()),
        )
