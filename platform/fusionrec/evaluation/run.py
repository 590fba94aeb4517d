"""Runs: ranked lists in a file, so that another program can score them or compare with them.

``user_id`` string, ``item_id`` string, ``rank`` int32 from 1, ``score`` float32: one row a
recommendation, a user's rows together and best first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import CodeArray, FloatArray
from fusionrec.errors import DataError
from fusionrec.sources.protocol import Ranked

DEPTH = 100
"""Recommendations a user in an exported run."""

SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)


def write_run(
    path: Path, user_ids: Sequence[str], items: CodeArray, scores: FloatArray, catalogue: Catalogue
) -> None:
    """Write the first ``DEPTH`` items of lists ``items`` [B, C], best first, −1 at their ends.

    The file is written beside and renamed.
    """
    items, scores = items[:, :DEPTH], scores[:, :DEPTH]
    rows, places = np.nonzero(items >= 0)
    table = pa.table(
        [
            pa.array(user_ids, pa.string()).take(pa.array(rows)),
            pa.array(catalogue.item_ids, pa.string()).take(pa.array(items[rows, places])),
            pa.array((np.cumsum(items >= 0, axis=1)[rows, places]).astype(np.int32)),
            pa.array(scores[rows, places].astype(np.float32)),
        ],
        schema=SCHEMA,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    pq.write_table(table, beside)
    beside.replace(path)


def read_run(path: Path, user_ids: Sequence[str], catalogue: Catalogue) -> Ranked:
    """The lists of ``user_ids`` in a run; a user whom it does not mention has an empty one.

    Lists are ordered by ``rank``; neighbours of equal ``score`` are tied, where the run has scores
    (without, it has broken its ties itself). The scores returned only carry that order.

    Raises:
        DataError: the file is no run, or a run of other users or items.
    """
    table = _read(path)
    users = pc.index_in(table["user_id"], pa.array(user_ids, pa.string()))
    table = table.filter(pc.is_valid(users))
    if not len(table):
        raise DataError(
            f"run {path} mentions none of the {len(user_ids)} users of this evaluation; "
            "give a run of the same data set, protocol and part"
        )
    row = users.drop_null().to_numpy().astype(np.int64)
    codes = pc.index_in(table["item_id"], pa.array(catalogue.item_ids, pa.string()))
    if codes.null_count:
        unknown = table["item_id"].filter(pc.is_null(codes))[0].as_py()
        raise DataError(f"run {path}: column item_id has {unknown!r}, which the data set has not")
    item, rank = codes.to_numpy().astype(np.int32), table["rank"].to_numpy()
    order = np.lexsort((rank, row))
    row, item, rank = row[order], item[order], rank[order]
    _require_distinct(path, "item", row, item.astype(np.int64), user_ids)
    _require_distinct(path, "rank", row, rank, user_ids)
    lengths = np.bincount(row, minlength=len(user_ids))
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(row)) - starts[row]
    tied = np.zeros(len(row), dtype=np.bool_)
    if "score" in table.column_names:
        score = table["score"].to_numpy()[order]
        tied[1:] = (score[1:] == score[:-1]) & (row[1:] == row[:-1])
    items = np.full((len(user_ids), int(lengths.max())), -1, dtype=np.int32)
    scores = np.zeros(items.shape, dtype=np.float32)
    items[row, place] = item
    level = np.cumsum(~tied)
    scores[row, place] = level[starts[row]] - level
    return Ranked(items, scores)


def _read(path: Path) -> pa.Table:
    """The columns of a run as one chunk each, of the types of ``SCHEMA`` (ranks as int64)."""
    try:
        names = pq.read_schema(path).names
        missing = [name for name in ("user_id", "item_id", "rank") if name not in names]
        if missing:
            raise DataError(f"run {path} has no column {missing[0]}; it has {', '.join(names)}")
        columns = [name for name in SCHEMA.names if name in names]
        table = pq.read_table(path, columns=columns)
    except OSError as error:
        raise DataError(f"run {path} cannot be read: {error}") from error
    except pa.ArrowInvalid as error:
        raise DataError(f"run {path} is not Parquet: {error}") from error
    types = {"user_id": pa.string(), "item_id": pa.string(), "rank": pa.int64()}
    cast = {}
    for name in columns:
        column = table[name].combine_chunks()
        if column.null_count and name != "score":
            raise DataError(f"run {path}: column {name} has an empty value; every row needs one")
        try:
            cast[name] = column.cast(types.get(name, pa.float64()))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"run {path}: column {name} is {column.type}: {error}") from error
    return pa.table(cast).combine_chunks()


def _require_distinct(
    path: Path, what: str, row: CodeArray, value: CodeArray, user_ids: Sequence[str]
) -> None:
    order = np.lexsort((value, row))
    twice = (np.diff(row[order]) == 0) & (np.diff(value[order]) == 0)
    if twice.any():
        user = user_ids[row[order][1:][twice][0]]
        raise DataError(f"run {path} gives user {user!r} the same {what} twice")
