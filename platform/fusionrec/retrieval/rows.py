"""Sparse rows that lie on disk: item–item neighbours, postings of words, words of items.

A matrix in CSR as three flat arrays, memory-mapped, so that all processes of a node share one copy.
scipy would not keep them that way: given 64-bit offsets, it copies the column numbers to 64 bits
as well, which is 2.4 GB for a million items with 300 neighbours. What is asked of such a matrix is
always the same, a weighted sum of a few of its rows, and that needs no more than numpy.

A wide matrix is kept in two thirds or half of the memory: weights as float16, and of the columns,
which ascend within a row, the lower 16 bits, beside a count of how many of a row's entries lie in
each page of 65,536 columns.

Shape legend: R rows, W columns (the width), P pages, N rows that are asked for, E entries of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from fusionrec.data.histories import CodeArray, FloatArray, IntArray
from fusionrec.retrieval.halves import Stored, single
from fusionrec.retrieval.sums import Sum, add_up

CSR: TypeAlias = sp.csr_array

DENSE_WIDTH = 65_536
"""Columns up to which a batch of sums is one dense array."""
_PARTS = ("data", "indices", "indptr")
_PAGES = "pages"
_PAGE_BITS = 16
_BLOCK = 65_536
"""Rows whose pages are counted at a time."""


@dataclass(frozen=True, slots=True)
class SparseRows:
    """[R, W] weights, summed as float32."""

    data: Stored
    """[entries]"""
    indices: CodeArray | npt.NDArray[np.uint16]
    """[entries] columns, ascending within a row; of columns in pages, the place in the page."""
    indptr: IntArray
    """[R+1]; row r has the entries ``indptr[r]:indptr[r+1]``."""
    width: int
    """W."""
    pages: npt.NDArray[np.unsignedinteger] | None = None
    """[R, P] how many entries of a row lie in each page; None where columns are kept whole."""

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
        """The same in less memory where that counts, in wide matrices.

        Of a learned weight, 11 bits are more than the data that it was learned from can tell.
        """
        if self.width <= DENSE_WIDTH or np.abs(self.data).max(initial=0) > np.finfo(np.float16).max:
            return self
        halved = replace(self, data=self.data.astype(np.float16))
        num_pages = (self.width - 1 >> _PAGE_BITS) + 1
        if self.pages is not None or len(self) * num_pages >= 2 * len(self.indices):
            return halved  # the counts would take more than they save
        pages = np.zeros((len(self), num_pages), dtype=np.uint32)
        for start in range(0, len(self), _BLOCK):
            bounds = self.indptr[start : start + _BLOCK + 1]
            page = self.indices[bounds[0] : bounds[-1]] >> _PAGE_BITS
            rows = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
            counts = np.bincount(rows * num_pages + page, minlength=(len(bounds) - 1) * num_pages)
            pages[start : start + _BLOCK] = counts.reshape(-1, num_pages)
        pages = pages.astype(np.min_scalar_type(pages.max(initial=0)))
        if pages.nbytes >= 2 * len(self.indices):
            return halved
        return replace(halved, indices=self.indices.astype(np.uint16), pages=pages)

    def lengths_of(self, rows: CodeArray) -> IntArray:
        """[N] entries of each of ``rows``."""
        return np.asarray(self.indptr[rows + 1] - self.indptr[rows])

    @property
    def matrix(self) -> CSR:
        """As a scipy matrix, for arithmetic on all of it; copies."""
        data = single(self.data)
        indices = self._columns(self.indices, slice(None))
        return sp.csr_array((data, indices, self.indptr), shape=(len(self), self.width))

    def save(self, directory: Path, prefix: str = "") -> None:
        """Write a file for each part, ``data.npy`` and so on, each name after ``prefix``."""
        directory.mkdir(parents=True, exist_ok=True)
        for part in _PARTS:
            np.save(directory / f"{prefix}{part}.npy", getattr(self, part), allow_pickle=False)
        if self.pages is None:
            (directory / f"{prefix}{_PAGES}.npy").unlink(missing_ok=True)  # of an earlier fit
        else:
            np.save(directory / f"{prefix}{_PAGES}.npy", self.pages, allow_pickle=False)

    @classmethod
    def load(cls, directory: Path, prefix: str = "", *, width: int | None = None) -> Self:
        """Memory-map what :meth:`save` wrote; a square matrix unless ``width`` says otherwise."""
        data, indices, indptr = (_mapped(directory / f"{prefix}{part}.npy") for part in _PARTS)
        paged = directory / f"{prefix}{_PAGES}.npy"
        pages = _mapped(paged) if paged.is_file() else None
        return cls(data, indices, indptr, len(indptr) - 1 if width is None else width, pages)

    def entries(self, rows: CodeArray, weights: FloatArray) -> tuple[CodeArray, FloatArray]:
        """[E] columns and weighted values of ``rows`` [N], one row behind the other."""
        starts, stops = self.indptr[rows], self.indptr[rows + 1]
        parts = [slice(*bounds) for bounds in zip(starts.tolist(), stops.tolist(), strict=True)]
        if not parts:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        columns = self._columns(np.concatenate([self.indices[part] for part in parts]), rows)
        values = single(np.concatenate([self.data[part] for part in parts]))
        values *= np.repeat(weights, stops - starts)
        return columns, values

    def _columns(self, indices: Any, rows: Any) -> CodeArray:
        """[E] the columns whose ``indices`` [E] are those of ``rows``, one row behind the other."""
        if self.pages is None:
            return np.asarray(indices, dtype=np.int32)
        counts = self.pages[rows]
        first = np.arange(counts.shape[1], dtype=np.int32) << _PAGE_BITS
        columns = np.repeat(np.tile(first, len(counts)), counts.ravel())
        columns |= indices
        return columns

    def sums(
        self, offsets: IntArray, rows: CodeArray, weights: FloatArray
    ) -> FloatArray | list[Sum]:
        """The weighted sums of B groups of ``rows`` [N]: [B, W], or one by one where W is large.

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
            alone = len(offsets) == 2
            return [add_up(*group, self.width, keep=alone) for group in groups]
        dense = np.empty((len(offsets) - 1, self.width), dtype=np.float32)
        for row, (columns, values) in enumerate(groups):
            dense[row] = np.bincount(columns, values, self.width)
        return dense


def _mapped(path: Path) -> Any:
    # A plain view: slicing a np.memmap costs a microsecond more, and rows are many.
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def stack(rows: Sequence[tuple[CodeArray, FloatArray]], width: int) -> SparseRows:
    """[B, W] out of the columns and values of B rows."""
    indptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(columns) for columns, _ in rows], out=indptr[1:])
    columns = np.concatenate([np.empty(0, np.int32), *(columns for columns, _ in rows)])
    values = np.concatenate([np.empty(0, np.float32), *(values for _, values in rows)])
    return SparseRows(values, columns, indptr, width)
