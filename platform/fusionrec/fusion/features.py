"""What the trees of a learned fusion look at: the first places of linear lists as rows of numbers.

Each source gives three: its score over the constant of the normalisation ``scale`` (how sure it is,
comparable between histories), its score over the largest it gave in this list, and the place that
it alone would give the candidate (missing where it gave no positive score). The linear score gives
the same three. Beside these stand the number of events of the history, the training events of the
item and, where data has times, the days between the item's first event and the newest event of the
history.

Every feature belongs to a term: those of a source to the source, the others to ``linear``,
``history`` and ``item``. Missing is NaN, as LightGBM wants it.

Shape legend: B histories, S sources, C candidates, D places that are read, F features, I items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from fusionrec.data.histories import FloatArray, Histories, IntArray
from fusionrec.fusion.candidates import Candidates

LINEAR, HISTORY, ITEM = "linear", "history", "item"
"""Names of the terms that belong to no source."""
_DAY_S = 86_400
_SMALL = np.float32(1e-9)
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class ItemStatistics:
    """What training says of each item."""

    counts: IntArray
    """[I] training events."""
    first_times: IntArray | None
    """[I] time of the first training event, the largest int64 for an item without any; None where
    the data has no times."""

    @classmethod
    def of(cls, train: Histories, num_items: int, *, has_timestamps: bool) -> Self:
        """From the training histories."""
        first = None
        if has_timestamps:
            first = np.full(num_items, _NEVER, dtype=np.int64)
            np.minimum.at(first, train.items, train.timestamps)
        return cls(np.bincount(train.items, minlength=num_items), first)


def feature_names(sources: tuple[str, ...], *, has_timestamps: bool) -> tuple[str, ...]:
    """F names, "term.feature"."""
    names = [
        f"{name}.{kind}" for name in (*sources, LINEAR) for kind in ("score", "share", "place")
    ]
    names += [f"{HISTORY}.events", f"{ITEM}.events"]
    return (*names, f"{ITEM}.age") if has_timestamps else tuple(names)


def features(
    candidates: Candidates,
    columns: IntArray,
    linear: FloatArray,
    scales: FloatArray,
    items: ItemStatistics,
    newest: IntArray,
) -> FloatArray:
    """[B, D, F] the features of some candidates, in the order of :func:`feature_names`.

    Args:
        candidates: of B histories.
        columns: [B, D] which of the candidates, best first by their linear score.
        linear: [B, D] that score.
        scales: [S] constants of the normalisation ``scale``.
        items: of the catalogue.
        newest: [B] time of the newest event of each history.
    """
    codes = np.maximum(np.take_along_axis(candidates.items, columns, axis=1), 0)
    found = []
    for scores, scale in zip(candidates.scores, scales, strict=True):
        top = np.maximum(scores.max(axis=1, keepdims=True), _SMALL)
        taken = np.take_along_axis(scores, columns, axis=1)
        place = np.take_along_axis(_places(scores), columns, axis=1)
        found += [taken / scale, taken / top, np.where(taken > 0, place, np.nan)]
    found += [
        linear,
        linear / np.maximum(linear[:, :1], _SMALL),
        np.arange(1, columns.shape[1] + 1),
    ]
    found += [candidates.lengths[:, None], items.counts[codes]]
    if items.first_times is not None:
        first = items.first_times[codes]
        unknown = (first == _NEVER) | (candidates.lengths == 0)[:, None]
        age = (newest[:, None] - np.where(unknown, 0, first)) / _DAY_S
        found.append(np.where(unknown, np.nan, age))
    rows = np.empty((*codes.shape, len(found)), dtype=np.float32)
    for number, feature in enumerate(found):
        rows[:, :, number] = feature
    return rows


def newest_times(histories: Histories) -> IntArray:
    """[B] time of the newest event of each history; 0 for an empty one."""
    times = np.zeros(len(histories), dtype=np.int64)
    filled = histories.lengths > 0
    times[filled] = histories.timestamps[histories.offsets[1:][filled] - 1]
    return times


def _places(scores: FloatArray) -> FloatArray:
    """[B, C] the place of each candidate by [B, C] ``scores``, from 1; ties by the item code."""
    order = np.argsort(-scores, axis=1, kind="stable")
    places = np.empty(scores.shape, dtype=np.float32)
    counted = np.arange(1, scores.shape[1] + 1, dtype=np.float32)
    np.put_along_axis(places, order, np.broadcast_to(counted, scores.shape), axis=1)
    return places
