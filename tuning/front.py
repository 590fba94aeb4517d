"""The front: what no other point beats in everything, and which of its points is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from fusionrec.config import Config

FRONT = "front.json"


class Point(Config):
    """One point of the front."""

    number: int
    """Of its trial; 0 is the fusion as it was."""
    params: dict[str, float]
    """``trust.SOURCE``: factor on its weights; ``diversity.NAME``: of ``diversity.json``, where a
    cap per category of all places is none."""
    values: dict[str, float]
    """Metric → value on the validation cases."""


class Front(Config):
    """What a search of the front found."""

    start: Point
    """The fusion as it was, whether it is on the front or not."""
    points: tuple[Point, ...]
    """By descending NDCG."""
    chosen: int
    """Number of the chosen point."""
    max_loss: float
    num_cases: int
    num_trials: int
    cost_ms: dict[str, float]
    """What each source, and the diversity of lists, takes for one history."""

    @property
    def point(self) -> Point:
        """The chosen point."""
        return next(each for each in self.points if each.number == self.chosen)


def choose(
    points: Sequence[Point], modes: dict[str, Literal["max", "min"]], max_loss: float
) -> int:
    """The number of the point nearest to the best of everything (Zeleny, 1973).

    Each metric is scaled to 0 … 1 over ``points``, 1 the best; among the points whose NDCG is at
    least (1 − max_loss) of the best, the least Euclidean distance to (1, …, 1) wins.
    """
    signs = np.array([1 if mode == "max" else -1 for mode in modes.values()])
    values = signs * np.array([[point.values[name] for name in modes] for point in points])
    low, high = values.min(axis=0), values.max(axis=0)
    scaled = (values - low) / np.where(high > low, high - low, 1)
    distance = np.linalg.norm(np.where(high > low, 1 - scaled, 0), axis=1)
    quality = np.array([point.values["ndcg"] for point in points])
    distance[quality < (1 - max_loss) * quality.max()] = np.inf
    return min(zip(distance, (point.number for point in points), strict=True))[1]
