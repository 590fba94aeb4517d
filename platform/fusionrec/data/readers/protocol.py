"""What a reader of raw files is: it tells rows and fields apart; it judges neither."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol, Self

import pyarrow as pa

from fusionrec.config import Config, JobConfig
from fusionrec.data.histories import IntArray

BROKEN = "\ufdd0"
"""Stands in a decoded text for bytes that are not UTF-8: Unicode's own code point for such marks,
which no text that is meant for others contains."""

NOT_UTF8 = "not UTF-8"
NOT_JSON = "not a JSON object"
WRONG_FIELDS = "wrong number of fields"


class Refused(NamedTuple):
    """A line of which not even the fields could be told apart."""

    line: int
    reason: str
    row: str


@dataclass(frozen=True, slots=True)
class Rows:
    """N rows of one raw file with fields apart but unchecked.

    The table's columns have the names of the data set's schema (with extra ones, for items); text
    formats give strings throughout, typed formats their own types.
    """

    file: str
    """Name of the file, as places in the quarantine are given."""
    lines: IntArray
    """[N] line of the file that each row begins at, from 1 (of a Parquet file: the row)."""
    table: pa.Table
    refused: list[Refused] = field(default_factory=list)
    progress: float = 0.0
    """Share of the file that has been read, 0 to 1."""

    def with_table(self, table: pa.Table) -> Rows:
        """The same rows with other columns."""
        return Rows(self.file, self.lines, table, self.refused, self.progress)


class Columns(Config):
    """Names of the columns of an interaction file."""

    user_id: str | None = None
    """Column with the user's id; default: user_id."""
    item_id: str | None = None
    """Column with the item's id; default: item_id."""
    timestamp: str | None = None
    """Column with the time; default: timestamp where there is one."""
    value: str | None = None
    """Column with the rating; default: value or rating where there is one."""
    event: str | None = None
    """Column with the kind of event (view, purchase …); default: event where there is one."""
    text: str | None = None
    """Column with the review; default: text where there is one."""
    domain: str | None = None
    """Column with the domain (films, books …); default: domain where there is one."""


class ItemColumns(Config):
    """Names of the columns of an item file; all other columns are kept as they are."""

    item_id: str | None = None
    """Column with the item's id; default: item_id."""
    title: str | None = None
    """Column with the title; default: title where there is one."""
    text: str | None = None
    """Column with the description; default: text or description where there is one."""
    categories: str | None = None
    """Column with the categories, a list or a text; default: categories where there is one."""
    domain: str | None = None
    """Column with the domain; default: domain where there is one."""


class Files(Config):
    """Which files of the raw folder to read."""

    interactions: str | None = None
    """Name of the interaction file; default: the one called interactions, events or ratings."""
    items: str | None = None
    """Name of the item file; default: the one called items, products or catalogue, if any."""


class Options(JobConfig):
    """How to read the raw folder. All but ``batch_bytes`` matter to generic tables alone."""

    columns: Columns = Columns()
    """Names of the interaction file's columns, e.g. --columns.user-id visitor."""
    item_columns: ItemColumns = ItemColumns()
    """Names of the item file's columns, e.g. --item-columns.title name."""
    files: Files = Files()
    """Which files to read, where their names do not say it."""
    delimiter: str | None = None
    """One character between the fields of a text table; default: a comma, in .tsv a tab."""
    category_separator: str = "|"
    """What separates the categories of an item that come as one text."""
    timestamp_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of numeric timestamps; texts such as 2024-01-31 12:00:00 are read as UTC."""
    batch_bytes: int = 4 << 20
    """Bytes of a raw file read at once; a row must fit into it."""


class Reader(Protocol):
    """One format of raw data."""

    format: ClassVar[str]

    @property
    def has_timestamps(self) -> bool:
        """False where the files give an order of events only."""

    @property
    def timestamp_unit(self) -> str:
        """Unit of the numeric timestamps that ``interactions`` gives: s, ms, us or ns."""

    @property
    def values_may_miss(self) -> bool:
        """Whether an event may lack the rating that others have, as views do among purchases."""

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether ``folder`` looks like this format."""

    @classmethod
    def open(cls, folder: Path, options: Options) -> Self:
        """A reader of ``folder``.

        Raises:
            DataError: a file or column that the format needs is missing or cannot be read.
        """

    def items(self) -> Iterator[Rows] | None:
        """The item file in batches, or None where the format or the folder has none."""

    def interactions(self) -> Iterator[Rows]:
        """The interactions in batches, in file order."""
