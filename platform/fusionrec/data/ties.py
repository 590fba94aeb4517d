"""Targets of one case that have the same score."""

from __future__ import annotations

import numpy as np

from fusionrec.data.histories import FloatArray, IntArray


def tied_targets(rows: IntArray, scores: FloatArray) -> tuple[IntArray, IntArray]:
    """Of each target: its order (from 1) among its case's targets of equal score, and their number.

    Targets keep the order in which they came.

    Args:
        rows: [N] the case of each target.
        scores: [N] its score.
    """
    by_score = np.lexsort((scores, rows))
    new = np.ones(len(rows), dtype=np.bool_)
    new[1:] = (np.diff(rows[by_score]) != 0) | (scores[by_score][1:] != scores[by_score][:-1])
    (starts,) = np.nonzero(new)
    group = np.cumsum(new) - 1
    order, share = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.int64)
    order[by_score] = np.arange(len(rows)) - starts[group] + 1
    share[by_score] = np.bincount(group, minlength=len(starts))[group]
    return order, share
