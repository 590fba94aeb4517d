"""Prices that keep every item within its share of the lists.

A list is made without a look at the others, so a cap on how many of them an item is in cannot be
kept one list at a time. A price can: subtracted from an item's scores, it drives the item out of
the lists that want it least. The prices are found on a sample of lists by an ascending auction
(Demange, Gale & Sotomayor, Journal of Political Economy 1986): an item that is in too many lists
raises its price to where just enough of them let it go, until none is in too many. No price is
higher than it must be but for the least rise of a round, as long as a place depends on scores
alone; on other lists than those of the
sample the cap holds as well as these are like them.

Shape legend: B lists, K places that count, C places of a list, I items.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fusionrec.data.histories import CodeArray, FloatArray, IntArray

_ROUNDS = 200
_ROUNDING = 1e-6
_STEP = 3e-3
"""Least rise: ends the race of items that overtake each other by next to nothing."""


def exposures(items: CodeArray, k: int, num_items: int) -> IntArray:
    """[I] in how many of the lists [B, C] each item is among the first ``k``."""
    top = items[:, :k]
    return np.bincount(top[top >= 0], minlength=num_items)


def capped_prices(
    fill: Callable[[FloatArray], tuple[CodeArray, FloatArray]],
    num_items: int,
    max_exposure: float,
    k: int,
) -> FloatArray:
    """[I] prices under which no item is in more than a share of the lists.

    Where that cannot be had, because lists have too few candidates, the items that are too often in
    them pay as much as the lists have alternatives for.

    Args:
        fill: given [I] prices, the lists [B, C] that come of them, best first, and their scores
            [B, C] in the unit of the prices.
        num_items: I.
        max_exposure: the share.
        k: places of a list that count.
    """
    prices = np.zeros(num_items, dtype=np.float32)
    for _ in range(_ROUNDS):
        items, scores = fill(prices)
        most = max(1, int(max_exposure * len(items) + _ROUNDING))
        surplus = np.maximum(exposures(items, k, num_items) - most, 0)
        rises = _rises(items, scores, k, surplus)
        if not rises.any():
            break
        prices += rises
    return prices


def _rises(items: CodeArray, scores: FloatArray, k: int, surplus: IntArray) -> FloatArray:
    """[I] by how much an item's price rises so that ``surplus`` [I] lists let it go.

    A list lets an item go once it falls behind the first item that is not among the first ``k``.
    """
    rises = np.zeros(len(surplus), dtype=np.float32)
    if items.shape[1] <= k:
        return rises
    rows, columns = np.nonzero((items[:, :k] >= 0) & (items[:, k] >= 0)[:, None])
    codes = items[rows, columns]
    wanted = surplus[codes] > 0
    rows, columns, codes = rows[wanted], columns[wanted], codes[wanted]
    margins = scores[rows, columns] - scores[rows, k]
    order = np.lexsort((margins, codes))
    codes, margins = codes[order], margins[order]
    over, first, number = np.unique(codes, return_index=True, return_counts=True)
    last = first + np.minimum(surplus[over], number) - 1
    rises[over] = margins[last] + _STEP
    return rises
