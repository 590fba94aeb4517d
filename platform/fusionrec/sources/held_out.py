"""What is held out of training histories, to see on it what the rest teaches.

The newest event of some histories: later than all that their users are learned from, and with
timestamps, of the histories that end last.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fusionrec.data.histories import CodeArray, Histories
from fusionrec.sources.protocol import TrainingData


class Questions(NamedTuple):
    """Training histories in two parts. Shape legend: B questions."""

    left: Histories
    """All histories, without what is held out."""
    histories: Histories
    """B of them, the shortest first."""
    targets: CodeArray
    """[B] the event that came next."""


def hold_out(data: TrainingData, share: float, most: int, seed: int) -> Questions:
    """``share`` of the events, at most ``most``, from histories that a question is left of.

    ``seed`` chooses the histories of data without timestamps.
    """
    histories = data.histories
    (enough,) = np.nonzero(histories.lengths >= 3)
    count = min(len(enough), most, int(share * len(histories.items)))
    ends = histories.offsets[1:] - 1
    if data.has_timestamps:
        order = np.argsort(-histories.timestamps[ends[enough]], kind="stable")
    else:
        order = np.random.default_rng(seed).permutation(len(enough))
    chosen = np.sort(enough[order[:count]])
    keep = np.ones(len(histories.items), dtype=np.bool_)
    keep[ends[chosen]] = False
    lengths = np.bincount(histories.rows[keep], minlength=len(histories))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    left = Histories(histories.items[keep], histories.timestamps[keep], offsets)
    chosen = chosen[np.argsort(lengths[chosen], kind="stable")]  # little padding in a block
    return Questions(left, left.take(chosen), histories.items[ends[chosen]])
