"""Raw files → data set: the writer of a data set's directory.

A data set is written into a temporary directory beside its place and renamed into it at the end, so
that the place holds a whole data set, the previous one, or nothing.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusionrec.data.catalogue import ITEM_SCHEMA
from fusionrec.data.dataset import INTERACTION_SCHEMA, DatasetInfo
from fusionrec.data.fingerprint import ColumnHash, fingerprint
from fusionrec.data.rowhash import HashSet, hash_column
from fusionrec.data.validation import QUARANTINE_SCHEMA
from fusionrec.errors import DataError

ROWS_PER_GROUP = 1 << 17
ROWS_PER_PART = 1 << 22


class DatasetWriter:
    """Writes one data set; a context manager.

    ``finish`` puts it into place, replacing a data set that is there. Leaving the context without
    ``finish``, by an error or not, leaves the place as it was.

    Raises:
        DataError: the place is taken by something that is not a data set, or cannot be written;
            an item id is missing or twice in the items, or interactions name an item not in them.
    """

    def __init__(
        self,
        directory: Path,
        *,
        name: str,
        format: str,
        has_timestamps: bool = True,  # noqa: A002
    ) -> None:
        self._directory = Path(directory)
        self._facts = {"name": name, "format": format, "has_timestamps": has_timestamps}
        self._users, self._items, self._used_items = HashSet(), HashSet(), HashSet()
        self._num_interactions = self._num_quarantined = 0
        self._buffer: list[pa.Table] = []
        self._buffered = 0
        self._part: pq.ParquetWriter | None = None
        self._quarantine: pq.ParquetWriter | None = None
        self._item_hashes: dict[str, ColumnHash] = {}
        self._content = {name: ColumnHash() for name in INTERACTION_SCHEMA.names}

    def __enter__(self) -> Self:
        place = self._directory
        if place.exists() and not (place / "dataset.json").is_file() and _occupied(place):
            raise DataError(
                f"{place} exists and is not a data set, so it is not replaced: "
                "give another directory or remove it"
            )
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            self._beside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        except OSError as error:
            raise DataError(f"data set {place} cannot be written: {error.strerror}") from error
        self._beside.chmod(0o755)
        (self._beside / "interactions").mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for writer in (self._part, self._quarantine):
            if writer is not None:
                writer.close()
        shutil.rmtree(self._beside, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise DataError(f"data set {self._directory} cannot be written: {reason}") from error

    def write_items(self, table: pa.Table) -> None:
        """Write the items, once: the columns of ``ITEM_SCHEMA`` and any others, kept as are."""
        assert not self._item_hashes, "items are written once"
        table = _conform(table, ITEM_SCHEMA)
        ids = table.column("item_id")
        hashes = hash_column(ids)
        new = self._items.add(hashes)
        if not new.all():
            twice = ids[int(np.flatnonzero(~new)[0])].as_py()
            raise DataError(f"item {twice!r} is twice in the items: give each item one row")
        self._item_hashes = {name: ColumnHash.of(table.column(name)) for name in table.column_names}
        pq.write_table(table, self._beside / "items.parquet", compression="zstd")

    def write_interactions(self, batch: pa.Table | pa.RecordBatch) -> None:
        """Append interactions: the columns of ``INTERACTION_SCHEMA``, in any order."""
        table = batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch])
        table = _conform(table, INTERACTION_SCHEMA).select(INTERACTION_SCHEMA.names)
        if not table.num_rows:
            return
        self._users.add(hash_column(table.column("user_id")))
        self._used_items.add(hash_column(table.column("item_id")))
        for name, content in self._content.items():
            content.update(table.column(name))
        self._buffer.append(table)
        self._buffered += table.num_rows
        while self._buffered >= ROWS_PER_GROUP:
            self._flush(ROWS_PER_GROUP)

    def write_refused(self, table: pa.Table) -> None:
        """Append refused rows: the columns of ``QUARANTINE_SCHEMA``."""
        if not table.num_rows:
            return
        if self._quarantine is None:
            self._quarantine = self._open("quarantine.parquet", QUARANTINE_SCHEMA)
        self._quarantine.write_table(table.cast(QUARANTINE_SCHEMA))
        self._num_quarantined += table.num_rows

    def finish(self) -> DatasetInfo:
        """Complete the data set and put it into place.

        Raises:
            DataError: there are no interactions, or they name items that the items lack.
        """
        assert self._item_hashes, "a data set has items"
        self._flush(self._buffered)
        if not self._num_interactions:
            raise DataError(f"data set {self._facts['name']} has no interactions: check its files")
        unknown = ~self._items.contains(self._used_items.members())
        assert not unknown.any(), "interactions name items that the item table lacks"
        if self._quarantine is None:
            self._quarantine = self._open("quarantine.parquet", QUARANTINE_SCHEMA)
        for writer in (self._part, self._quarantine):
            if writer is not None:
                writer.close()
        info = DatasetInfo.model_validate(
            {
                **self._facts,
                "fingerprint": fingerprint(self._content, self._item_hashes),
                "num_interactions": self._num_interactions,
                "num_users": len(self._users),
                "num_items": len(self._items),
                "num_quarantined": self._num_quarantined,
            }
        )
        text = info.model_dump_json(indent=2) + "\n"
        (self._beside / "dataset.json").write_text(text, encoding="utf-8")
        self._move_into_place()
        return info

    def _flush(self, rows: int) -> None:
        """Write the first ``rows`` of the buffer as one row group."""
        if not rows:
            return
        table = pa.concat_tables(self._buffer).combine_chunks()
        number, at = divmod(self._num_interactions, ROWS_PER_PART)
        if at == 0:
            if self._part is not None:
                self._part.close()
            name = f"interactions/part-{number:05}.parquet"
            self._part = self._open(name, INTERACTION_SCHEMA)
        assert self._part is not None
        self._part.write_table(table.slice(0, rows))
        self._num_interactions += rows
        self._buffered -= rows
        self._buffer = [table.slice(rows)] if self._buffered else []

    def _open(self, name: str, schema: pa.Schema) -> pq.ParquetWriter:
        return pq.ParquetWriter(self._beside / name, schema, compression="zstd")

    def _move_into_place(self) -> None:
        place = self._directory
        old = self._beside.with_name(self._beside.name + ".old")
        if place.exists():
            place.rename(old)
        self._beside.rename(place)
        shutil.rmtree(old, ignore_errors=True)


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """``table`` with the columns of ``schema`` first, cast to its types; a missing one is null."""
    columns: dict[str, pa.ChunkedArray] = {}
    for field in schema:
        if field.name in table.column_names:
            columns[field.name] = table.column(field.name).cast(field.type)
        else:
            columns[field.name] = pa.chunked_array([pa.nulls(table.num_rows, field.type)])
        assert field.nullable or not columns[field.name].null_count, f"{field.name} has nulls"
    extra = [pa.field(f.name, f.type) for f in table.schema if f.name not in columns]
    columns |= {field.name: table.column(field.name) for field in extra}
    return pa.table(columns, schema=pa.schema([*schema, *extra]))


def _occupied(place: Path) -> bool:
    return not place.is_dir() or any(place.iterdir())
