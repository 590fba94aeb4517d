"""Weighted sums of sparse rows over so many columns that nobody wants all of them.

What is wanted of a sum is its largest places, and the places of a few candidates. It is kept as the
entries that it adds up, and added up in one of two ways: a few entries are sorted; many are added
to an array of all columns, which costs a pass over it but none of the comparisons.

Shape legend: E entries of a row, W columns, C candidates, K columns wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fusionrec.data.histories import CodeArray, FloatArray

_DENSE_FROM = 1 / 128
"""Entries for each column from which adding to all columns takes less time than sorting."""
_SAMPLE = 4096
"""Entries that are put in order, to see how large the largest sums are."""
_REPEATS = 4
"""How often a column is met, in the first guess at how many entries hold the largest sums."""


class Sum(Protocol):
    """One weighted sum of rows."""

    def largest(self, k: int, without: CodeArray) -> tuple[CodeArray, FloatArray]:
        """Columns and sums, in no order, among which are the ``k`` largest sums above 0.

        With all that are equal to the last of them; none of the columns ``without``.
        """
        ...

    def at(self, columns: CodeArray) -> FloatArray:
        """[C] the sums at some ``columns``; 0 where one is −1 or has no entry."""
        ...


def add_up(columns: CodeArray, values: FloatArray, width: int, *, keep: bool = False) -> Sum:
    """The sum of ``values`` [E] by ``columns`` [E], of ``width`` columns W.

    Which way depends on the number of entries alone: a history's scores are the same in any batch.

    Args:
        columns: of the entries.
        values: of the entries.
        width: W.
        keep: whether an array of all columns may be held, which answers a second question faster.
    """
    if len(columns) and len(columns) >= _DENSE_FROM * width:
        kept = _scatter(columns, values, width) if keep else None
        return _Scattered(columns, values, width, kept)
    return _Sorted(*total(columns, values))


def total(columns: CodeArray, values: FloatArray) -> tuple[CodeArray, FloatArray]:
    """The distinct ``columns`` [E], ascending, each with the sum of its ``values`` [E].

    The values of a column are added in the order of their bits, so that the sum does not depend on
    how a machine sorts.
    """
    # One number an entry, the column before the value: sorting those takes half of an argsort.
    keys = columns.astype(np.int64) << 32 | values.view(np.uint32)
    keys.sort()
    columns = (keys >> 32).astype(np.int32)
    (starts,) = np.nonzero(np.diff(columns, prepend=-1))
    if not len(starts):
        return columns, np.empty(0, np.float32)
    return columns[starts], np.add.reduceat(keys.astype(np.uint32).view(np.float32), starts)


def locate(columns: CodeArray, wanted: CodeArray) -> tuple[Any, Any]:
    """Where in the ascending ``columns`` each of ``wanted`` would be, and whether it is there."""
    place = np.searchsorted(columns, wanted)
    found = place < len(columns)
    found[found] = columns[place[found]] == wanted[found]
    return place, found


@dataclass(frozen=True, slots=True)
class _Sorted:
    columns: CodeArray
    """Distinct, ascending."""
    sums: FloatArray

    def largest(self, k: int, without: CodeArray) -> tuple[CodeArray, FloatArray]:
        sums = self.sums.copy()
        place, found = locate(self.columns, without)
        sums[place[found]] = 0
        edge = np.partition(sums, -k)[-k] if len(sums) > k else np.float32(0)
        keep = (sums >= edge) & (sums > 0)
        return self.columns[keep], sums[keep]

    def at(self, columns: CodeArray) -> FloatArray:
        result = np.zeros(len(columns), dtype=np.float32)
        place, found = locate(self.columns, columns)
        result[found] = self.sums[place[found]]
        return result


@dataclass(frozen=True, slots=True)
class _Scattered:
    """Not empty. Adds up for each question anew unless told: arrays of all columns are large."""

    columns: CodeArray
    """[E], repeated."""
    values: FloatArray
    """[E]"""
    width: int
    kept: FloatArray | None
    """[W] the sums, or None."""

    def largest(self, k: int, without: CodeArray) -> tuple[CodeArray, FloatArray]:
        sums = self._everywhere()
        put_back = sums[without]
        sums[without] = 0
        met = sums[self.columns]  # a column as often as it has entries
        # Any edge will do that leaves k columns above it: a sample of the entries says where.
        sample = np.sort(met[:: max(1, len(met) // _SAMPLE)])
        depth = 1 + _REPEATS * k * len(sample) // len(met)
        while True:
            edge = sample[-depth] if depth <= len(sample) else np.float32(0)
            columns = np.unique(self.columns[(met >= edge) & (met > 0)])
            if len(columns) >= k or edge <= 0:
                break
            depth *= 2
        found = sums[columns]
        sums[without] = put_back
        return columns, found

    def at(self, columns: CodeArray) -> FloatArray:
        found = self._everywhere()[columns]
        return np.where(columns >= 0, found, np.float32(0))

    def _everywhere(self) -> FloatArray:
        if self.kept is not None:
            return self.kept
        return _scatter(self.columns, self.values, self.width)


def _scatter(columns: CodeArray, values: FloatArray, width: int) -> FloatArray:
    """[W] the sums, of entries added in their order."""
    sums = np.zeros(width, dtype=np.float32)
    np.add.at(sums, columns, values)
    return sums
