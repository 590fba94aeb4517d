"""Which column of a raw file is which column of the data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from fusionrec.data.readers.protocol import Columns, ItemColumns
from fusionrec.errors import DataError

_DEFAULTS = {
    "value": ("value", "rating"),
    "text": ("text", "description"),
}


def resolve(
    path: Path,
    have: Sequence[str],
    columns: Columns | ItemColumns,
    defaults: dict[str, tuple[str, ...]] | None = None,
) -> dict[str, str]:
    """Column of the data set → column of ``path``.

    Args:
        path: the file, for messages.
        have: its columns.
        columns: the names that the user gave.
        defaults: for a column of the data set, the names to look for where the user gave none.

    Raises:
        DataError: a column that was named, or that every file needs, is not there.
    """
    setting = "columns" if isinstance(columns, Columns) else "item-columns"
    needed = {"user_id", "item_id"} & set(type(columns).model_fields)
    found: dict[str, str] = {}
    for name, given in columns.model_dump().items():
        flag = f"--{setting}.{name.replace('_', '-')}"
        look_for = (given,) if given else (defaults or _DEFAULTS).get(name, (name,))
        match = next((column for column in look_for if column in have), None)
        if match is not None:
            found[name] = match
        elif given or name in needed:
            raise DataError(
                f"{path} has no column {look_for[0]!r} for {name}; its columns are "
                f"{', '.join(have)}: name the right one with {flag}"
            )
    return found


def require(path: Path, have: Sequence[str], needed: Sequence[str]) -> None:
    """Check that a file of a fixed format has the columns of that format.

    Raises:
        DataError: it lacks one.
    """
    for name in needed:
        if name not in have:
            raise DataError(
                f"{path} has no column {name!r}; its columns are {', '.join(have)}: "
                "check that it is the publisher's file, or read it with --format table"
            )


def rename(table: pa.Table, found: dict[str, str], *, extra: bool = False) -> pa.Table:
    """The columns of ``found`` under the data set's names; with ``extra``, the others behind them.

    An extra column whose name is taken is called ``raw_<name>``.
    """
    columns = {name: table.column(raw) for name, raw in found.items()}
    if extra:
        for name in table.column_names:
            if name not in found.values():
                columns[f"raw_{name}" if name in ItemColumns.model_fields else name] = table.column(
                    name
                )
    return pa.table(columns)
