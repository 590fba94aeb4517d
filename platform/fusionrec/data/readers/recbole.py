"""RecBole's atomic files: ``<name>.inter`` and ``<name>.item``, with headers like ``rating:float``.

A ``float`` column of the items stays a number, ``token`` and ``token_seq`` stay texts. The users'
file is not read: nothing behind the data set knows users.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import pyarrow as pa

from fusionrec.data.numbers import parse
from fusionrec.data.readers import delimited
from fusionrec.data.readers.mapping import rename, resolve
from fusionrec.data.readers.protocol import Options, Rows
from fusionrec.data.readers.table import split_categories
from fusionrec.errors import DataError

_DEFAULTS = {"value": ("rating",), "text": ("review", "text")}
_ITEM_DEFAULTS = {
    "title": ("title", "movie_title", "name", "item_name"),
    "text": ("description", "text"),
    "categories": ("categories", "category", "genres", "genre", "class"),
}


@dataclass(frozen=True)
class RecBoleReader:
    """One ``.inter`` file, and the ``.item`` file where there is one."""

    format: ClassVar[str] = "recbole"
    path: Path
    columns: dict[str, str]
    options: Options
    has_timestamps: bool
    timestamp_unit: str
    values_may_miss: bool

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether there is an ``.inter`` file."""
        return any(folder.glob("*.inter"))

    @classmethod
    def open(cls, folder: Path, options: Options) -> Self:
        """Read the headers."""
        files = sorted(folder.glob("*.inter"))
        if len(files) != 1:
            there = ", ".join(path.name for path in files) or "none"
            raise DataError(
                f"{folder} must hold one RecBole file NAME.inter (there: {there}): "
                "put each data set into a folder of its own"
            )
        names = [name for name, _ in _header(files[0])]
        columns = resolve(files[0], names, options.columns, _DEFAULTS)
        return cls(
            path=files[0],
            columns=columns,
            options=options,
            has_timestamps="timestamp" in columns,
            timestamp_unit=options.timestamp_unit,
            values_may_miss="event" in columns,
        )

    def interactions(self) -> Iterator[Rows]:
        """The mapped columns of the ``.inter`` file."""
        for rows in self._read(self.path):
            table = rename(rows.table, self.columns)
            if "event" not in self.columns:
                event = "rating" if "value" in self.columns else "interaction"
                table = table.append_column("event", pa.repeat(pa.scalar(event), len(table)))
            if "domain" not in self.columns:
                domain = pa.repeat(pa.scalar(self.path.stem), len(table))
                table = table.append_column("domain", domain)
            yield rows.with_table(table)

    def items(self) -> Iterator[Rows] | None:
        """All columns of the ``.item`` file."""
        path = self.path.with_suffix(".item")
        return self._items(path) if path.is_file() else None

    def _items(self, path: Path) -> Iterator[Rows]:
        header = _header(path)
        names = [name for name, _ in header]
        found = resolve(path, names, self.options.item_columns, _ITEM_DEFAULTS)
        for rows in self._read(path):
            table = rows.table
            for index, (name, kind) in enumerate(header):
                if kind == "float" and name not in found.values():
                    numbers = parse(table.column(name))
                    values = pa.array(numbers.values, mask=numbers.missing | numbers.malformed)
                    table = table.set_column(index, name, values)
            table = rename(table, found, extra=True)
            if "categories" in found:
                index = table.column_names.index("categories")
                categories = split_categories(table.column("categories"), " ")
                table = table.set_column(index, "categories", categories)
            if "domain" not in found:
                domain = pa.repeat(pa.scalar(self.path.stem), len(table))
                table = table.append_column("domain", domain)
            yield rows.with_table(table)

    def _read(self, path: Path) -> Iterator[Rows]:
        names = [name for name, _ in _header(path)]
        batch_bytes = self.options.batch_bytes
        for rows in delimited.read(path, delimiter="\t", quoted=False, batch_bytes=batch_bytes):
            yield rows.with_table(rows.table.rename_columns(names))


def _header(path: Path) -> list[tuple[str, str]]:
    """Names and types of the columns.

    Raises:
        DataError: a column has no type that RecBole knows.
    """
    columns = []
    for field in delimited.header(path, "\t", quoted=False):
        name, _, kind = field.rpartition(":")
        if not name or kind not in {"token", "token_seq", "float", "float_seq"}:
            raise DataError(
                f"{path}: column {field!r} has no type: write it as {name or field}:token, "
                ":token_seq, :float or :float_seq"
            )
        columns.append((name, kind))
    return columns
