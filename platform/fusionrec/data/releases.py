"""When each item came out: what freshness is reckoned from.

The catalogue says it, in a column ``released`` (whole seconds since the epoch, a date, a timestamp,
or a text in ISO 8601) or ``year`` (of which the first second counts); of an item of which it does
not, the time of its first training event is taken. Where the events have no times either, nothing
is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import FloatArray, Histories, IntArray
from fusionrec.errors import DataError

RELEASES = "releases.npz"
"""Its file in a pipeline directory."""
_UNKNOWN = np.iinfo(np.int64).max
_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Releases:
    """When I items came out."""

    times: IntArray
    """[I] seconds since the epoch, the largest int64 for an item of which nothing is known."""
    newest: int
    """Time of the newest training event: now, where nobody says when."""

    @classmethod
    def of(cls, dataset: Dataset, train: Histories) -> Self | None:
        """From the catalogue and the training histories; None where neither knows any time.

        Raises:
            DataError: the column ``released`` holds no times.
        """
        times = stated(dataset)
        if dataset.info.has_timestamps:
            first = np.full(len(times), _UNKNOWN, dtype=np.int64)
            np.minimum.at(first, train.items, train.timestamps)
            times = np.where(times == _UNKNOWN, first, times)
        known = times[times < _UNKNOWN]
        if not len(known):
            return None
        dated = dataset.info.has_timestamps and len(train.timestamps)
        return cls(times, int(train.timestamps.max() if dated else known.max()))

    def ages_days(self, items: IntArray, asked: IntArray) -> FloatArray:
        """Days from the release of ``items`` to the times ``asked``, two arrays that fit together.

        0 for what comes out later; infinite for an item of which nothing is known.
        """
        out = self.times[items]
        days = np.maximum(asked - np.minimum(out, asked), 0) / _DAY_S
        return np.where(out == _UNKNOWN, np.inf, days).astype(np.float32)

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """The inverse of :meth:`save`; None where there is no such file."""
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["times"], int(arrays["newest"]))

    def save(self, path: Path) -> None:
        """Write ``path``, an npz file."""
        np.savez(path, times=self.times, newest=np.int64(self.newest))


def stated(dataset: Dataset) -> IntArray:
    """[I] what the catalogue says."""
    table = dataset.items
    times = np.full(len(table), _UNKNOWN, dtype=np.int64)
    if "released" in table.column_names:
        found = _seconds(dataset, table.column("released").combine_chunks())
    elif "year" in table.column_names and pa.types.is_integer(table.schema.field("year").type):
        found = _first_seconds(table.column("year").combine_chunks())
    else:
        return times
    stated = found.is_valid().to_numpy(zero_copy_only=False)
    times[stated] = found.drop_null().to_numpy(zero_copy_only=False)
    return times


def _seconds(dataset: Dataset, column: pa.Array) -> pa.Array:
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    try:
        return pc.floor_temporal(column.cast(pa.timestamp("s"), safe=False), unit="second").cast(
            pa.int64()
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"data set {dataset.directory}: column released of the items holds no times "
            f"({str(error).splitlines()[0]}): write seconds since the epoch, or dates as 2024-01-31"
        ) from error


def _first_seconds(years: pa.Array) -> pa.Array:
    missing = years.is_null().to_numpy(zero_copy_only=False)
    since: npt.NDArray[np.int64] = years.fill_null(1970).to_numpy().astype(np.int64) - 1970
    return pa.array(
        since.astype("datetime64[Y]").astype("datetime64[s]").astype(np.int64), mask=missing
    )
