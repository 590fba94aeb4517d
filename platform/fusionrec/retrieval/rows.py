"""Sparse rows that lie on disk: item–item neighbours, postings of words, words of items.

A matrix in CSR as three flat arrays, memory-mapped, so that all processes of a node share one copy.
scipy would not keep them that way: given 64-bit offsets, it copies the column numbers to 64 bits
as well, which is 2.4 GB for a million items with 300 neighbours. What is asked of such a matrix is
always the same, a weighted sum of a few of its rows, and that needs no more than numpy.

Shape legend: R rows, W columns (the width), N rows that are asked for, E entries of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fusionrec.data.histories import CodeArray, FloatArray, IntArray

CSR: TypeAlias = sp.csr_array
Stored: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float16]
"""Numbers that take half the memory where there are many of them."""

DENSE_WIDTH = 65_536
"""Columns up to which a sum is a dense array: clearing it is cheaper than sorting the entries."""
_PARTS = ("data", "indices", "indptr")


@dataclass(frozen=True, slots=True)
class SparseRows:
    """[R, W] weights, summed as float32."""

    data: Stored
    """[entries]"""
    indices: CodeArray
    """[entries] columns, ascending within a row."""
    indptr: IntArray
    """[R+1]; row r has the entries ``indptr[r]:indptr[r+1]``."""
    width: int
    """W."""

    @classmethod
    def of(cls, matrix: CSR) -> Self:
        """From a scipy matrix."""
        matrix.sort_indices()
        return cls(
            np.asarray(matrix.data, dtype=np.float32),
            np.asarray(matrix.indices, dtype=np.int32),
            np.asarray(matrix.indptr, dtype=np.int64),
            matrix.shape[1],
        )

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def compact(self) -> Self:
        """The same in a quarter less memory where that counts: wide matrices become float16.

        Of a learned weight, 11 bits are more than the data that it was learned from can tell.
        """
        if self.width <= DENSE_WIDTH or np.abs(self.data).max(initial=0) > np.finfo(np.float16).max:
            return self
        return replace(self, data=self.data.astype(np.float16))

    def lengths_of(self, rows: CodeArray) -> IntArray:
        """[N] entries of each of ``rows``."""
        return np.asarray(self.indptr[rows + 1] - self.indptr[rows])

    @property
    def matrix(self) -> CSR:
        """As a scipy matrix, for arithmetic on all of it; copies."""
        data = self.data.astype(np.float32, copy=False)
        return sp.csr_array((data, self.indices, self.indptr), shape=(len(self), self.width))

    def save(self, directory: Path, prefix: str = "") -> None:
        """Write ``data.npy``, ``indices.npy`` and ``indptr.npy``, each name after ``prefix``."""
        directory.mkdir(parents=True, exist_ok=True)
        for part in _PARTS:
            np.save(directory / f"{prefix}{part}.npy", getattr(self, part), allow_pickle=False)

    @classmethod
    def load(cls, directory: Path, prefix: str = "", *, width: int | None = None) -> Self:
        """Memory-map what :meth:`save` wrote; a square matrix unless ``width`` says otherwise."""
        data, indices, indptr = (
            # Plain views: slicing a np.memmap costs a microsecond more, and rows are many.
            np.load(directory / f"{prefix}{part}.npy", mmap_mode="r", allow_pickle=False).view(
                np.ndarray
            )
            for part in _PARTS
        )
        return cls(data, indices, indptr, len(indptr) - 1 if width is None else width)

    def entries(self, rows: CodeArray, weights: FloatArray) -> tuple[CodeArray, FloatArray]:
        """[E] columns and weighted values of ``rows`` [N], one row behind the other."""
        starts, stops = self.indptr[rows], self.indptr[rows + 1]
        parts = [slice(*bounds) for bounds in zip(starts.tolist(), stops.tolist(), strict=True)]
        if not parts:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        columns = np.concatenate([self.indices[part] for part in parts])
        values = np.concatenate([self.data[part] for part in parts], dtype=np.float32)
        values *= np.repeat(weights, stops - starts)
        return columns, values

    def sums(
        self, offsets: IntArray, rows: CodeArray, weights: FloatArray
    ) -> FloatArray | SparseRows:
        """[B, W] the weighted sums of B groups of ``rows`` [N]; sparse where W is large.

        Args:
            offsets: [B+1]; group b has ``rows[offsets[b]:offsets[b+1]]``.
            rows: [N] row numbers.
            weights: [N] one for each.
        """
        groups = (
            self.entries(rows[start:stop], weights[start:stop])
            for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        )
        if self.width > DENSE_WIDTH:
            return stack([total(*group) for group in groups], self.width)
        dense = np.empty((len(offsets) - 1, self.width), dtype=np.float32)
        for row, (columns, values) in enumerate(groups):
            dense[row] = np.bincount(columns, values, self.width)
        return dense


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


def stack(rows: Sequence[tuple[CodeArray, FloatArray]], width: int) -> SparseRows:
    """[B, W] out of the columns and values of B rows."""
    indptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(columns) for columns, _ in rows], out=indptr[1:])
    columns = np.concatenate([np.empty(0, np.int32), *(columns for columns, _ in rows)])
    values = np.concatenate([np.empty(0, np.float32), *(values for _, values in rows)])
    return SparseRows(values, columns, indptr, width)
