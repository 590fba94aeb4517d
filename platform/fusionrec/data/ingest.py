"""Raw files → data set, in one pass and in batches: memory does not grow with texts or fields.

What grows: 8 bytes an event (to find duplicates), 8 a user, and the catalogue, which is held whole.

A data set is written into a temporary directory beside its place and renamed into it at the end, so
that the place holds a whole data set, the previous one, or nothing.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from fusionrec.data.catalogue import ITEM_SCHEMA
from fusionrec.data.dataset import INTERACTION_SCHEMA, DatasetInfo
from fusionrec.data.fingerprint import ColumnHash, fingerprint
from fusionrec.data.readers import open_reader
from fusionrec.data.readers.protocol import Options, Reader
from fusionrec.data.rowhash import HashSet, hash_column
from fusionrec.data.validation import (
    QUARANTINE_SCHEMA,
    Checked,
    InteractionChecker,
    ItemChecker,
)
from fusionrec.errors import DataError
from fusionrec.progress import bar

ROWS_PER_GROUP = 1 << 17
ROWS_PER_PART = 1 << 22


class IngestConfig(Options):
    """Make a typed, validated data set out of raw files."""

    raw: Path
    """Folder of the raw files, as their publisher ships them."""
    out: Path
    """Directory of the data set; one that is there already is replaced."""
    format: Literal["movielens", "s3rec", "recbole", "amazon-reviews", "table"] | None = None
    """Format of the raw files; default: recognised by looking at the folder."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Share of the rows that may be broken and go into quarantine; above it the job fails."""


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
        format: str,  # noqa: A002 - the word of the field
        has_timestamps: bool = True,
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
                with suppress(OSError):  # on a full disk, closing fails as well
                    writer.close()
        shutil.rmtree(self._beside, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise DataError(f"data set {self._directory} cannot be written: {reason}") from error

    def write_items(self, table: pa.Table) -> None:
        """Write the items, once: the columns of ``ITEM_SCHEMA`` and any others, kept as are.

        A missing title or text becomes an empty one.
        """
        assert not self._item_hashes, "items are written once"
        table = _conform(table, ITEM_SCHEMA)
        for name in ("title", "text"):
            index = table.column_names.index(name)
            filled = pc.fill_null(table.column(name), "")
            table = table.set_column(index, ITEM_SCHEMA.field(name), filled)
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


def ingest(config: IngestConfig) -> DatasetInfo:
    """Read ``config.raw``, check every row and write the data set ``config.out``.

    Raises:
        DataError: the raw files cannot be used, or too many of their rows; nothing is written.
    """
    reader = open_reader(config.raw, config.format, config)
    _warn_of_ignored(config, reader.format)
    tally = _Tally()
    with DatasetWriter(
        config.out,
        name=config.raw.resolve().name,
        format=reader.format,
        has_timestamps=reader.has_timestamps,
    ) as writer:
        known = _ingest_items(reader, writer, tally)
        checker = InteractionChecker(
            reader.has_timestamps, reader.timestamp_unit, reader.values_may_miss, known
        )
        mentioned = _Mentioned()
        num_rows = tally.num_rows
        with bar("reading events", total=100) as advance:
            done = 0
            for rows in reader.interactions():
                checked = checker.check(rows)
                writer.write_interactions(checked.valid)
                tally.add(checked, writer)
                if known is None:
                    mentioned.add(checked.valid)
                step = int(100 * rows.progress) - done
                advance(step, f"{tally.num_rows - num_rows:,} rows")
                done += step
        if tally.num_rows == num_rows:
            raise DataError(f"{config.raw} has no interactions: its file has a header but no rows")
        tally.judge(config.max_bad_fraction)
        if known is None:
            writer.write_items(mentioned.table())
        return writer.finish()


def _warn_of_ignored(config: IngestConfig, name: str) -> None:
    if name not in {"table", "recbole"}:
        ignored = config.model_fields_set & set(Options.model_fields) - {"batch_bytes"}
        for setting in sorted(ignored):
            warnings.warn(
                f"setting {setting} is ignored: files of format {name} need none; "
                "give --format table to read them as tables",
                stacklevel=3,
            )


def _ingest_items(reader: Reader, writer: DatasetWriter, tally: _Tally) -> HashSet | None:
    """Write the items; gives the hashes of their ids, or None where there is no item file."""
    batches = reader.items()
    if batches is None:
        return None
    checker = ItemChecker()
    tables = []
    for rows in batches:
        checked = checker.check(rows)
        tally.add(checked, writer)
        if checked.valid.num_rows:
            tables.append(checked.valid)
    if not tables:
        raise DataError("the item file has no usable row: correct it, or leave it out")
    writer.write_items(pa.concat_tables(tables, promote_options="permissive"))
    return checker.known


class _Tally:
    """Counts of rows and of what was wrong with them."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._reasons: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, checked: Checked, writer: DatasetWriter) -> None:
        """Count a batch, and put what was refused into quarantine."""
        self.num_rows += checked.valid.num_rows + checked.refused.num_rows
        places, reasons, _ = (column.to_pylist() for column in checked.refused.columns)
        self._reasons.update(reasons)
        for place, reason in zip(places, reasons, strict=True):
            self._first.setdefault(reason, place)
        writer.write_refused(checked.refused)

    def judge(self, max_bad_fraction: float) -> None:
        """Raise if too many rows were refused."""
        bad = self._reasons.total()
        if bad <= max_bad_fraction * self.num_rows:
            return
        worst = "; ".join(
            f"{count:,} {reason} (first at {self._first[reason]})"
            for reason, count in self._reasons.most_common(3)
        )
        raise DataError(
            f"{bad:,} of {self.num_rows:,} rows are broken, more than --max-bad-fraction "
            f"{max_bad_fraction:g} allows: {worst}"
        )


class _Mentioned:
    """The items of interactions, where there is no item file, in order of first appearance."""

    def __init__(self) -> None:
        self._known = HashSet()
        self._tables: list[pa.Table] = []

    def add(self, interactions: pa.Table) -> None:
        """Note the items of a batch that are new."""
        new = self._known.add(hash_column(interactions.column("item_id")))
        self._tables.append(interactions.select(["item_id", "domain"]).filter(pa.array(new)))

    def table(self) -> pa.Table:
        """Ids, and the domain in which each was met first."""
        return pa.concat_tables(self._tables)


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
