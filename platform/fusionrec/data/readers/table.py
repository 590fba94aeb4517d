"""Generic tables: CSV, TSV, Parquet or JSONL, with the user's mapping of columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fusionrec.data.readers import delimited, records
from fusionrec.data.readers.mapping import rename, resolve
from fusionrec.data.readers.protocol import Options, Rows
from fusionrec.errors import DataError

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".jsonl", ".jsonl.gz")
INTERACTIONS = ("interactions", "events", "ratings")
ITEMS = ("items", "products", "catalogue", "catalog")


@dataclass(frozen=True)
class TableReader:
    """One file of interactions and perhaps one of items."""

    format: ClassVar[str] = "table"
    path: Path
    item_path: Path | None
    options: Options
    columns: dict[str, str]
    item_columns: dict[str, str]
    has_timestamps: bool
    timestamp_unit: str
    values_may_miss: bool

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether there is any table."""
        return bool(_tables(folder))

    @classmethod
    def open(cls, folder: Path, options: Options) -> Self:
        """Find the files and their columns."""
        path, item_path = _choose(folder, options)
        columns = resolve(path, _names(path, options), options.columns)
        item_columns: dict[str, str] = {}
        if item_path is not None:
            names = _names(item_path, options)
            item_columns = resolve(item_path, names, options.item_columns)
        return cls(
            path=path,
            item_path=item_path,
            options=options,
            columns=columns,
            item_columns=item_columns,
            has_timestamps="timestamp" in columns,
            timestamp_unit=options.timestamp_unit,
            values_may_miss="event" in columns,
        )

    def items(self) -> Iterator[Rows] | None:
        """All columns of the item file."""
        return None if self.item_path is None else self._items(self.item_path)

    def _items(self, path: Path) -> Iterator[Rows]:
        for rows in _read(path, None, self.options):
            table = rename(rows.table, self.item_columns, extra=True)
            if "categories" in table.column_names:
                index = table.column_names.index("categories")
                categories = split_categories(
                    table.column("categories"), self.options.category_separator
                )
                table = table.set_column(index, "categories", categories)
            yield rows.with_table(table)

    def interactions(self) -> Iterator[Rows]:
        """The mapped columns of the interaction file."""
        for rows in _read(self.path, list(dict.fromkeys(self.columns.values())), self.options):
            yield rows.with_table(rename(rows.table, self.columns))


def split_categories(column: pa.ChunkedArray, separator: str) -> pa.ChunkedArray:
    """Lists of trimmed, non-empty categories from lists or from texts with a separator."""
    if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
        column = pc.split_pattern(column.cast(pa.string()), separator)
    lists = column.to_pylist()
    clean = [[c.strip() for c in map(str, row or ()) if c.strip()] for row in lists]
    return pa.chunked_array([pa.array(clean, pa.list_(pa.string()))])


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), "")


def _stem(path: Path) -> str:
    return path.name[: -len(_suffix(path))].lower()


def _tables(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and _suffix(path))


def _choose(folder: Path, options: Options) -> tuple[Path, Path | None]:
    """The interaction file and the item file."""
    tables = _tables(folder)
    there = ", ".join(path.name for path in tables) or "none"
    for setting, name in options.files.model_dump().items():
        if name and not (folder / name).is_file():
            raise DataError(
                f"{folder} has no file {name!r}; its tables are {there}: correct --files.{setting}"
            )
        if name and not _suffix(Path(name)):
            raise DataError(
                f"file {name} of --files.{setting} is not a known table: "
                f"its name must end in one of {', '.join(SUFFIXES)}"
            )
    items = [path for path in tables if _stem(path) in ITEMS]
    item_path = folder / options.files.items if options.files.items else next(iter(items), None)
    if options.files.interactions:
        return folder / options.files.interactions, item_path
    others = [path for path in tables if path != item_path]
    named = [path for path in others if _stem(path) in INTERACTIONS]
    if len(named or others) != 1:
        raise DataError(
            f"{folder} does not say which file holds the interactions (tables: {there}): "
            "name it with --files.interactions FILE"
        )
    return (named or others)[0], item_path


def _delimiter(path: Path, options: Options) -> str:
    delimiter = options.delimiter or ("\t" if _suffix(path).startswith(".tsv") else ",")
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise DataError(f"setting delimiter = {delimiter!r} is not one character: correct it")
    return delimiter


def _names(path: Path, options: Options) -> list[str]:
    """The columns that ``path`` has."""
    if _suffix(path) == ".parquet":
        return list(_open_parquet(path).schema_arrow.names)
    if _suffix(path).startswith(".jsonl"):
        for batch in records.read(path, batch_bytes=1 << 16):
            if batch.objects:
                return list(dict.fromkeys(key for record in batch.objects for key in record))
        raise DataError(f"{path} has no line that is a JSON object: check that it is JSON lines")
    return delimited.header(path, _delimiter(path, options))


def _read(path: Path, columns: list[str] | None, options: Options) -> Iterator[Rows]:
    if _suffix(path) == ".parquet":
        yield from _read_parquet(path, columns)
    elif _suffix(path).startswith(".jsonl"):
        # Items come as one batch: a column has one type throughout the file.
        for batch in records.read(path, options.batch_bytes if columns else None):
            keys = columns or dict.fromkeys(key for record in batch.objects for key in record)
            column = records.text_column if columns else records.column
            yield batch.rows(path.name, pa.table({key: column(batch.objects, key) for key in keys}))
    else:
        yield from delimited.read(
            path,
            columns=columns,
            delimiter=_delimiter(path, options),
            batch_bytes=options.batch_bytes,
        )


def _open_parquet(path: Path) -> pq.ParquetFile:
    if not path.stat().st_size:
        raise DataError(f"{path} is empty: check that it was downloaded whole")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from error


def _read_parquet(path: Path, columns: list[str] | None) -> Iterator[Rows]:
    file, row = _open_parquet(path), 0
    total = max(file.metadata.num_rows, 1)
    try:
        for batch in file.iter_batches(1 << 16, columns=columns):
            lines = np.arange(row + 1, row + len(batch) + 1)
            row += len(batch)
            table = pa.table({f.name: _plain(batch.column(f.name)) for f in batch.schema})
            yield Rows(path.name, lines, table, progress=row / total)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: after row {row}: cannot be read: {reason}") from error


def _plain(array: pa.Array) -> pa.Array:
    """Dictionaries decoded; texts valid, with marks where Parquet held other bytes."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        array = array.cast(pa.string())
    if pa.types.is_string(array.type):
        try:
            array.validate(full=True)
        except pa.ArrowInvalid:
            array = array.cast(pa.binary())
    if pa.types.is_binary(array.type):
        texts = [
            None if v is None else v.decode(errors="fusionrec-mark") for v in array.to_pylist()
        ]
        array = pa.array(texts, pa.string())
    return array
