"""Slices: the same ranking, measured on a part of the targets.

A slice is a mask over targets, not over cases. Where only some targets of a case are in it, the
others keep their places in the list and just do not count as answers. Slices of one group are
disjoint and cover all targets, but for the popularity of cold targets, which have none; an empty
slice is left out.

Shape legend: B cases, N targets of all of them, I items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusionrec.data.histories import BoolArray, IntArray
from fusionrec.data.splits import Cases

LENGTH_BOUNDS = (0, 1, 5, 10, 20, 50)
"""Lower bounds of the slices by history length."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A named part of the targets."""

    group: str
    name: str
    mask: BoolArray
    """[N] the targets that belong to it."""


def slices(cases: Cases, item_counts: IntArray) -> list[Slice]:
    """The slices of ``cases``; ``item_counts`` [I] are the training events of each item."""
    targets = cases.targets
    lengths = cases.histories.lengths[targets.rows]
    uppers = (*LENGTH_BOUNDS[1:], np.inf)
    parts = [
        Slice("history length", _range(low, high), (lengths >= low) & (lengths < high))
        for low, high in zip(LENGTH_BOUNDS, uppers, strict=True)
    ]
    bands = popularity_bands(item_counts)[targets.items]
    for band, name in ((2, "head"), (1, "mid"), (0, "tail")):
        parts.append(Slice("target popularity", name, bands == band))
    cold = item_counts[targets.items] == 0
    parts += [Slice("target", "warm", ~cold), Slice("target", "cold", cold)]
    return [part for part in parts if part.mask.any()]


def popularity_bands(item_counts: IntArray) -> IntArray:
    """[I] 2 for the head, 1 for the middle, 0 for the tail, −1 for items without training events.

    The items are lined up by popularity and cut into thirds of the *events*: the head is the few
    items that received the first third of them. So each band holds about as many targets, and its
    interval is about as wide. Items of equal count go the way of their codes.
    """
    order = np.argsort(-item_counts, kind="stable")
    before = np.cumsum(item_counts[order]) - item_counts[order]
    bands = np.empty(len(item_counts), dtype=np.int64)
    bands[order] = 2 - np.minimum(3 * before // max(int(item_counts.sum()), 1), 2)
    bands[item_counts == 0] = -1
    return bands


def _range(low: float, high: float) -> str:
    if high == np.inf:
        return f"{low:.0f}+"
    return f"{low:.0f}" if high - low == 1 else f"{low:.0f}–{high - 1:.0f}"
