"""Ranked lists as two arrays: codes with −1 behind, scores with 0 behind. Where searches end.

Shape legend: C candidates, K items returned.
"""

from __future__ import annotations

import numpy as np

from fusionrec.data.histories import CodeArray, FloatArray


def empty(num_rows: int, k: int) -> tuple[CodeArray, FloatArray]:
    """Codes and scores of ``num_rows`` lists without an item."""
    return np.full((num_rows, k), -1, dtype=np.int32), np.zeros((num_rows, k), dtype=np.float32)


def fill(items: CodeArray, values: FloatArray, codes: CodeArray, scores: FloatArray) -> None:
    """Put the best of ``codes`` [C] into one empty list [K], ties to the lower code.

    Only positive scores. Cost: C, and K · log K for the order.
    """
    k = len(items)
    positive = scores > 0
    codes, scores = codes[positive], scores[positive]
    if len(scores) > k:
        near = scores >= np.partition(scores, -k)[-k]
        codes, scores = codes[near], scores[near]
    order = np.lexsort((codes, -scores))[:k]
    items[: len(order)] = codes[order]
    values[: len(order)] = scores[order]
