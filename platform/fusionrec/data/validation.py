"""Which raw rows are events and items of a data set, and what is wrong with the others.

Everything is vectorised: a batch costs a few passes over its columns. Between batches, 8 bytes a
row are remembered, to find exact duplicates, and the ids of users where there are no times.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fusionrec.data.dataset import INTERACTION_SCHEMA
from fusionrec.data.histories import BoolArray, IntArray
from fusionrec.data.numbers import parse, parse_times
from fusionrec.data.readers.protocol import BROKEN, NOT_UTF8, Rows
from fusionrec.data.rowhash import HashArray, HashSet, hash_column, hash_rows

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("place", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("row", pa.string()),
    ]
)
"""The rows refused: ``file:line``, why, and the row as far as it could be read."""

LATEST = 4_102_444_800
"""2100-01-01. Times from here on are taken for milliseconds; times up to 0 for missing ones."""
DUPLICATE = "exact duplicate"
UNKNOWN_ITEM = "unknown item"
DUPLICATE_ITEM = "item is there already"
OUT_OF_RANGE = "timestamp out of range"


@dataclass(frozen=True, slots=True)
class Checked:
    """A batch parted in two."""

    valid: pa.Table
    refused: pa.Table
    """``QUARANTINE_SCHEMA``, by line."""


class Verdicts:
    """The first thing found wrong with each of N rows."""

    def __init__(self, num_rows: int) -> None:
        self._reasons = [""]
        self._codes = np.zeros(num_rows, dtype=np.uint8)

    @property
    def valid(self) -> BoolArray:
        """[N] rows with which nothing is wrong."""
        valid: BoolArray = self._codes == 0
        return valid

    def refuse(self, wrong: BoolArray, reason: str) -> None:
        """Refuse the rows of ``wrong`` that are still valid."""
        if wrong.any():
            self._codes[wrong & self.valid] = len(self._reasons)
            self._reasons.append(reason)

    def part(self, rows: Rows, valid: pa.Table) -> Checked:
        """Part ``valid``, made of all rows, and say what was wrong with the others."""
        keep = self.valid
        if keep.all() and not rows.refused:
            return Checked(valid, QUARANTINE_SCHEMA.empty_table())
        wrong = np.flatnonzero(~keep)
        lines = rows.lines[wrong].tolist() + [refused.line for refused in rows.refused]
        reasons = [self._reasons[code] for code in self._codes[wrong]]
        texts = _as_texts(rows.table.take(wrong))
        by_line = np.argsort(np.array(lines, dtype=np.int64), kind="stable")
        reasons += [refused.reason for refused in rows.refused]
        texts += [refused.row for refused in rows.refused]
        table = pa.table(
            {
                "place": [f"{rows.file}:{lines[i]}" for i in by_line],
                "reason": [reasons[i] for i in by_line],
                "row": [texts[i].replace(BROKEN, "\ufffd") for i in by_line],
            },
            schema=QUARANTINE_SCHEMA,
        )
        return Checked(valid.filter(pa.array(keep)), table)


@dataclass
class ItemChecker:
    """Checks item rows: texts are UTF-8, each id is there, and once."""

    known: HashSet = field(default_factory=HashSet)
    """Hashes of the ids accepted so far."""

    def check(self, rows: Rows) -> Checked:
        """Part the rows."""
        table = rows.table
        verdicts = Verdicts(table.num_rows)
        for name in table.column_names:
            verdicts.refuse(_broken(table.column(name)), NOT_UTF8)
        if table.num_rows:
            ids = _as_ids(table.column("item_id"))
            table = table.set_column(table.column_names.index("item_id"), "item_id", ids)
            verdicts.refuse(_blank(ids), "item_id missing")
            _refuse_known(verdicts, self.known, hash_column(ids), DUPLICATE_ITEM)
        return verdicts.part(rows, table)


@dataclass
class InteractionChecker:
    """Checks interaction rows and makes them ``INTERACTION_SCHEMA``.

    A column that is there must be filled, but for texts, domains and kinds of events.
    """

    has_timestamps: bool
    timestamp_unit: str
    values_may_miss: bool
    known_items: HashSet | None
    """Hashes of the ids that an interaction may name; None takes any."""
    _seen: HashSet = field(default_factory=HashSet)
    _positions: dict[str, int] = field(default_factory=dict)

    def check(self, rows: Rows) -> Checked:
        """Part the rows."""
        table = rows.table
        names = set(table.column_names)
        verdicts = Verdicts(table.num_rows)
        for name in table.column_names:
            verdicts.refuse(_broken(table.column(name)), NOT_UTF8)
        columns = {name: _as_ids(table.column(name)) for name in ("user_id", "item_id")}
        for name, ids in columns.items():
            verdicts.refuse(_blank(ids), f"{name} missing")
            # Two rows, of which the first opens a quote that only the second closes.
            ends = pc.fill_null(pc.match_substring(ids, "\n"), False)
            verdicts.refuse(ends.to_numpy(zero_copy_only=False), f"line end in {name}")
        content = list(columns.values())
        if "timestamp" in names:
            times = parse_times(table.column("timestamp"), self.timestamp_unit)
            verdicts.refuse(times.missing, "timestamp missing")
            verdicts.refuse(times.malformed, "timestamp not a number")
            verdicts.refuse(times.not_finite, "timestamp not finite")
            if self.has_timestamps:
                inside = (times.values > 0) & (times.values < LATEST)
                verdicts.refuse(~inside, OUT_OF_RANGE)
            content.append(pa.array(times.values))
            seconds = np.floor(np.where(verdicts.valid, times.values, 0))
            columns["timestamp"] = pa.array(seconds.astype(np.int64))
        if "value" in names:
            numbers = parse(table.column("value"))
            if not self.values_may_miss:
                verdicts.refuse(numbers.missing, "value missing")
            verdicts.refuse(numbers.malformed, "value not a number")
            with np.errstate(over="ignore"):
                values = numbers.values.astype(np.float32)
            verdicts.refuse(~np.isfinite(values) & ~numbers.missing, "value not finite")
            columns["value"] = pa.array(values, mask=numbers.missing)
            content.append(pa.array(numbers.values, mask=numbers.missing))
        default = "rating" if "value" in names else "interaction"
        for name in ("event", "text", "domain"):
            if name in names:
                texts = _as_ids(table.column(name))
                content.append(texts)
                columns[name] = pc.if_else(
                    _blank(texts), default if name == "event" else None, texts
                )
        if "event" not in names:
            columns["event"] = pa.repeat(pa.scalar(default), table.num_rows)
        if self.known_items is not None:
            known = self.known_items.contains(hash_column(columns["item_id"]))
            verdicts.refuse(~known, UNKNOWN_ITEM)
        _refuse_known(verdicts, self._seen, hash_rows(content), DUPLICATE)
        if "timestamp" not in names:
            columns["timestamp"] = pa.array(self._count(columns["user_id"], verdicts.valid))
        return verdicts.part(rows, _typed(columns))

    def _count(self, users: pa.Array, valid: BoolArray) -> IntArray:
        """[N] how many valid events of the same user came before each."""
        encoded = users.filter(pa.array(valid)).dictionary_encode()
        codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        ids = encoded.dictionary.to_pylist()
        counts = np.bincount(codes, minlength=len(ids))
        before = np.array([self._positions.get(user, 0) for user in ids], dtype=np.int64)
        self._positions.update(zip(ids, (before + counts).tolist(), strict=True))
        order = np.argsort(codes, kind="stable")
        rank = np.empty(len(codes), dtype=np.int64)
        rank[order] = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
        positions = np.zeros(len(valid), dtype=np.int64)
        positions[valid] = before[codes] + rank
        return positions


def _refuse_known(verdicts: Verdicts, seen: HashSet, hashes: HashArray, reason: str) -> None:
    """Refuse valid rows whose hash is in ``seen``, where the hashes of the others are added."""
    valid = verdicts.valid
    new = np.ones(len(valid), dtype=np.bool_)
    new[valid] = seen.add(hashes[valid])
    verdicts.refuse(~new, reason)


def _typed(columns: dict[str, pa.Array]) -> pa.Table:
    """A table with the columns of ``INTERACTION_SCHEMA``; rows to be refused may lack ids."""
    size = len(columns["user_id"])
    arrays = {
        f.name: columns[f.name].cast(f.type) if f.name in columns else pa.nulls(size, f.type)
        for f in INTERACTION_SCHEMA
    }
    return pa.table(arrays)


def _broken(column: pa.ChunkedArray) -> BoolArray:
    if pa.types.is_list(column.type):
        if not pa.types.is_string(column.type.value_type):
            return np.zeros(len(column), np.bool_)
        column = pc.binary_join(column, " ")
    if not pa.types.is_string(column.type):
        return np.zeros(len(column), np.bool_)
    found: BoolArray = pc.fill_null(pc.match_substring(column, BROKEN), False).to_numpy()
    return found


def _blank(texts: pa.Array) -> BoolArray:
    """[N] null, empty or only white space."""
    stripped = pc.utf8_trim_whitespace(pc.fill_null(texts, ""))
    blank: BoolArray = pc.equal(stripped, "").to_numpy(zero_copy_only=False)
    return blank


def _as_ids(column: pa.ChunkedArray) -> pa.Array:
    """Texts; numbers and other types as texts."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of no chunks
        array = pa.array([], pa.string())
    return array if pa.types.is_string(array.type) else array.cast(pa.string())


def _as_texts(table: pa.Table) -> list[str]:
    """Each row as one text, fields separated by tabs."""
    return ["\t".join("" if v is None else str(v) for v in r.values()) for r in table.to_pylist()]
