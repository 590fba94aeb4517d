"""Item–item models in their one representation: a sparse matrix of each item's top-n neighbours.

Row *i* says how much an event of item *i* in a history speaks for each other item, so that scoring
a history is a weighted sum of the rows of its items.

Shape legend: B histories, I items, C candidates, K items returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.retrieval.lists import empty, fill
from fusionrec.retrieval.rows import CSR, SparseRows
from fusionrec.retrieval.sums import Sum

_BLOCK_ENTRIES = 8_000_000
"""Dense scores held at once (32 MB)."""
_DENSE = 0.02
"""Share of entries above which dense blocks are faster to cut than sorting the entries."""


def top_neighbours(matrix: CSR, count: int) -> SparseRows:
    """The ``count`` entries of largest magnitude of each row."""
    matrix = sp.csr_array(matrix, dtype=np.float32)
    if matrix.nnz > _DENSE * matrix.shape[0] * matrix.shape[1]:
        return top_neighbours_dense(matrix, count)
    matrix.sort_indices()
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -np.abs(matrix.data), rows))
    rank = np.arange(len(order)) - np.repeat(matrix.indptr[:-1], np.diff(matrix.indptr))
    keep = np.sort(order[(rank < count) & (matrix.data[order] != 0)])
    return _rows(matrix.data[keep], matrix.indices[keep], rows[keep], matrix.shape[0])


def top_neighbours_dense(matrix: Any, count: int) -> SparseRows:
    """As :func:`top_neighbours`, for a sparse or dense matrix with few zeros, in blocks of rows."""
    num_items = matrix.shape[0]
    count = min(count, num_items)
    block = max(1, _BLOCK_ENTRIES // max(num_items, 1))
    parts = []
    for start in range(0, num_items, block):
        rows = matrix[start : start + block]
        values = rows if isinstance(rows, np.ndarray) else rows.toarray()
        columns = np.argpartition(-np.abs(values), count - 1, axis=1)[:, :count]
        columns.sort(axis=1)
        values = np.take_along_axis(values, columns, axis=1)
        row, column = np.nonzero(values)
        parts.append((values[row, column], columns[row, column], row + start))
    data, indices, positions = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _rows(data, indices, positions, num_items)


def _rows(data: Any, indices: Any, rows: Any, num_items: int) -> SparseRows:
    indptr = np.zeros(num_items + 1, dtype=np.int64)
    np.cumsum(np.bincount(rows, minlength=num_items), out=indptr[1:])
    return SparseRows(data.astype(np.float32), indices.astype(np.int32), indptr, num_items)


def profiles(histories: Histories, weights: FloatArray, num_items: int) -> CSR:
    """[B, I] weight of each item in each history; a repeated item's ``weights`` [N] add up."""
    # Copies: sum_duplicates sorts in place, and the order of the histories belongs to them.
    matrix = sp.csr_array(
        (weights.copy(), histories.items.copy(), histories.offsets.copy()),
        shape=(len(histories), num_items),
    )
    matrix.sum_duplicates()
    return matrix


def top_of_sums(sums: Sequence[Sum], histories: Histories, k: int) -> tuple[CodeArray, FloatArray]:
    """[B, K] items and scores: the best positive places of each sum, history items left out.

    Ties go to the lower code.
    """
    items, values = empty(len(histories), k)
    for row, each in enumerate(sums):
        fill(items[row], values[row], *each.largest(k, histories.row(row)))
    return items, values


def top_of_dense(scores: FloatArray, histories: Histories, k: int) -> tuple[CodeArray, FloatArray]:
    """As :func:`top_of_sums`, for dense [B, I] scores."""
    items, values = empty(len(histories), k)
    for row in range(len(histories)):
        data = scores[row].copy()
        data[histories.row(row)] = 0
        (codes,) = np.nonzero(data > 0)
        fill(items[row], values[row], codes.astype(np.int32), data[codes])
    return items, values


def gather(scores: FloatArray, candidates: CodeArray) -> FloatArray:
    """[B, C] entries of dense [B, I] ``scores`` at ``candidates``; 0 where a candidate is −1."""
    taken = np.take_along_axis(scores, np.maximum(candidates, 0), axis=1)
    return np.where(candidates >= 0, taken, np.float32(0))


def gather_sums(sums: Sequence[Sum], candidates: CodeArray) -> FloatArray:
    """As :func:`gather`, of sums that are kept one by one."""
    result = np.zeros(candidates.shape, dtype=np.float32)
    for row, each in enumerate(sums):
        result[row] = each.at(candidates[row])
    return result
