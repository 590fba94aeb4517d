"""Columns of numbers and times out of columns of anything, with what is wrong with each value.

Whether a value is a number does not depend on the values around it: the fast way, one cast of the
whole column, and the slow way accept the same texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fusionrec.data.histories import BoolArray

SECONDS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_PLAIN = r"^-?[0-9]{1,18}(\.[0-9]{1,18})?$"
_DATE = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?)?"
_ZONE = r"(Z|[+-][0-9]{2}:?[0-9]{2})$"


@dataclass(frozen=True, slots=True)
class Numbers:
    """N values as far as they are numbers."""

    values: npt.NDArray[np.float64]
    """[N] the numbers; NaN where there is none."""
    missing: BoolArray
    """[N] null, empty or blank."""
    malformed: BoolArray
    """[N] something that is not a number."""

    @property
    def not_finite(self) -> BoolArray:
        """[N] NaN or infinite, and written so."""
        return ~np.isfinite(self.values) & ~self.missing & ~self.malformed


def parse(column: pa.ChunkedArray | pa.Array) -> Numbers:
    """Numbers out of a column of texts or numbers."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not pa.types.is_string(array.type):
        missing = _bools(pc.is_null(array))
        kind = array.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            values = _floats(array.cast(pa.float64(), safe=False))
            return Numbers(values, missing, np.zeros(len(array), np.bool_))
        return Numbers(np.full(len(array), np.nan), missing, ~missing)
    array = pc.ascii_trim_whitespace(array)
    missing = _bools(pc.fill_null(pc.equal(array, ""), True))
    texts = pc.if_else(missing, None, array)
    try:
        return Numbers(
            _floats(pc.cast(texts, pa.float64())), missing, np.zeros(len(array), np.bool_)
        )
    except pa.ArrowInvalid:
        pass
    plain = _bools(pc.fill_null(pc.match_substring_regex(texts, _PLAIN), False))
    values = _floats(pc.cast(pc.if_else(plain, texts, None), pa.float64()))
    malformed = np.zeros(len(array), np.bool_)
    for index in np.flatnonzero(~plain & ~missing):
        try:
            values[index] = pc.cast(texts[int(index)], pa.float64()).as_py()
        except pa.ArrowInvalid:
            malformed[index] = True
    return Numbers(values, missing, malformed)


def parse_times(column: pa.ChunkedArray | pa.Array, unit: str) -> Numbers:
    """Seconds since the epoch out of numbers in ``unit``, timestamps or ISO 8601 texts (UTC)."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        ticks = array.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
        numbers = parse(ticks)
        return Numbers(numbers.values / 1e6, numbers.missing, numbers.malformed)
    dates = np.zeros(len(array), np.bool_)
    if pa.types.is_string(array.type):
        array = pc.ascii_trim_whitespace(array)
        dates = _bools(pc.fill_null(pc.match_substring_regex(array, _DATE), False))
    if not dates.any():
        numbers = parse(array)
        return Numbers(numbers.values / SECONDS[unit], numbers.missing, numbers.malformed)
    numbers = parse(pc.if_else(dates, "0", array))
    values, malformed = numbers.values / SECONDS[unit], numbers.malformed.copy()
    values[dates], malformed[dates] = _dates(array.filter(pa.array(dates)))
    return Numbers(values, numbers.missing, malformed)


def _dates(texts: pa.Array) -> tuple[npt.NDArray[np.float64], BoolArray]:
    """Seconds of texts that begin like ISO dates, and which are none after all."""
    timed = pc.if_else(
        pc.equal(pc.utf8_length(texts), 10), pc.binary_join_element_wise(texts, "T00:00", ""), texts
    )
    zoned = pc.match_substring_regex(timed, _ZONE)
    timed = pc.if_else(zoned, timed, pc.binary_join_element_wise(timed, "Z", ""))
    kind = pa.timestamp("us", "UTC")
    try:
        return _floats(pc.cast(timed, kind).cast(pa.int64())) / 1e6, np.zeros(len(texts), np.bool_)
    except pa.ArrowInvalid:
        pass
    values = np.full(len(texts), np.nan)
    for index, text in enumerate(timed):
        try:
            values[index] = pc.cast(text, kind).cast(pa.int64()).as_py() / 1e6
        except pa.ArrowInvalid:
            continue
    return values, np.isnan(values)


def _bools(array: pa.Array) -> BoolArray:
    result: BoolArray = array.to_numpy(zero_copy_only=False)
    return result


def _floats(array: pa.Array) -> npt.NDArray[np.float64]:
    return np.array(array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
