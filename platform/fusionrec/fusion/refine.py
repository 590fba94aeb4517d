"""What follows a search: polish the best weights, and let a segment have its own where they hold.

Polishing is coordinate ascent on the validation objective. On a few hundred cases it follows their
noise, so it is done on many samples of them and the outcomes are averaged: bagging, Breiman,
"Bagging Predictors" (Machine Learning, 1996). A mean is hardly ever 0, not even that of a source
without any signal, so the samples vote on which sources are asked at all: stability selection,
Meinshausen and Bühlmann (JRSS B, 2010). Those that are asked are polished once more, from where all
began: polished from where polishing ended, weights would follow the noise further.

A segment's own weights always look better on the cases that chose them, so they are accepted by
cross-fitting: chosen on one half of the segment's cases, measured on the other, both ways round;
the gain on cases that did not choose must be positive at the 5% level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from fusionrec.data.histories import BoolArray, FloatArray, IntArray
from fusionrec.fusion.objective import Objective

_STEPS = (2.0, 1.4, 1.15)
BAGGED = 16
"""Samples of the cases that weights are polished on."""
_SHARE = 0.8
"""Of the cases, in each sample."""
_DISTRUST = 0.3
"""Share of the samples that may give a source weight 0 before it is off; Meinshausen and Bühlmann
want a variable chosen by .6 to .9 of them."""
ONE_SIDED_5_PERCENT = 1.645
_FLOOR = 0.01
"""Where a weight of 0 starts from when it is tried again, relative to the largest."""
_SMALL = 1e-9


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of the search: [S] weights and the factor on cold items."""

    weights: FloatArray
    cold_factor: float = 1.0

    def gains(self, objective: Objective) -> FloatArray:
        """[M] what it earns on each case."""
        return objective.gains(self.weights, self.cold_factor)

    @classmethod
    def mean(cls, settings: Sequence[Self]) -> Self:
        """Of weights relative to the largest of each setting, and of the factors."""
        weights = [each.weights / max(float(each.weights.max()), _SMALL) for each in settings]
        cold_factor = float(np.mean([each.cold_factor for each in settings]))
        return cls(np.mean(weights, axis=0).astype(np.float32), cold_factor)

    def of_sources(self, keep: BoolArray) -> Self:
        """Of the sources ``keep`` [S] alone; equal weights where all of theirs are 0."""
        weights = self.weights[keep]
        return replace(self, weights=weights if weights.any() else np.ones_like(weights))


def polish(objective: Objective, start: Setting, max_rounds: int = 3) -> Setting:
    """Coordinate ascent from ``start``; never worse than it on ``objective``."""
    best, value = start, objective.value(start.weights, start.cold_factor)
    for step in _STEPS:
        for _ in range(max_rounds):
            before = value
            for neighbour in _neighbours(best, step):
                found = objective.value(neighbour.weights, neighbour.cold_factor)
                if found > value:
                    best, value = neighbour, found
            if value == before:
                break
    return best


def _neighbours(setting: Setting, step: float) -> list[Setting]:
    """Each coordinate up, down and off; of the setting as it was."""
    moved = []
    floor = _FLOOR * float(setting.weights.max())
    for source in range(len(setting.weights)):
        for factor in (step, 1 / step, 0.0):
            weights = setting.weights.copy()
            weights[source] = max(float(weights[source]), floor) * factor
            moved.append(replace(setting, weights=weights))
    moved.extend(
        replace(setting, cold_factor=max(setting.cold_factor, _FLOOR) * factor)
        for factor in (step, 1 / step)
    )
    return moved


def holds_out(
    num_cases: int,
    choose: Callable[[BoolArray], Callable[[BoolArray], FloatArray]],
    among: BoolArray,
    seed: int,
) -> bool:
    """Whether the gain on cases that did not choose is positive, by two-fold cross-fitting.

    One-sided at the 5% level: mean gain > 1.645 · its standard error.

    Args:
        num_cases: B.
        choose: given the [B] cases to choose on, returns what tells the gain of each of the [B]
            cases asked for.
        among: [B] the cases to split in halves.
        seed: of the halves.
    """
    half = np.random.default_rng(seed).random(num_cases) < 0.5
    gains = [
        choose(among & chosen)(among & ~chosen)
        for chosen in (half, ~half)
        if (among & chosen).any() and (among & ~chosen).any()
    ]
    gain = np.concatenate(gains) if gains else np.zeros(0, dtype=np.float32)
    if len(gain) < 2:
        return False
    error = float(gain.std(ddof=1) / np.sqrt(len(gain)))
    return float(gain.mean()) > ONE_SIDED_5_PERCENT * error


def polished(
    objective: Objective,
    start: Setting,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> list[Setting]:
    """What polishing makes of ``start`` on each of ``BAGGED`` random samples of the cases.

    Args:
        objective: over all cases.
        start: where each polishing begins.
        seed: of the samples.
        advance: called after each polishing.
    """
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(BAGGED):
        sample = generator.random(objective.num_cases) < _SHARE
        found.append(polish(objective.take(sample), start))
        advance()
    return found


def bagged(
    objective: Objective,
    start: Setting,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> Setting:
    """The mean of what :func:`polished` finds."""
    return Setting.mean(polished(objective, start, seed, advance))


def distrust(settings: Sequence[Setting]) -> FloatArray:
    """[S] the share of the settings in which each source has weight 0."""
    zero = np.stack([setting.weights == 0 for setting in settings])
    return np.asarray(zero.mean(axis=0, dtype=np.float32))


def trusted(settings: Sequence[Setting]) -> BoolArray:
    """[S] the sources to ask: those that seven tenths of the ``settings`` trust; at least one.

    What :func:`polished` found on samples of the cases votes, as in stability selection.
    """
    keep = distrust(settings) <= _DISTRUST
    keep[int(Setting.mean(settings).weights.argmax())] = True
    return np.asarray(keep)


def segment_settings(
    objective: Objective, common: Setting, segment_of: IntArray, num_segments: int, seed: int
) -> list[Setting]:
    """One setting a segment: its own where that holds on held-out cases, else ``common``.

    Args:
        objective: over all B cases.
        common: the setting found on all of them.
        segment_of: [B] segment of each case.
        num_segments: how many there are.
        seed: of the halves.
    """
    settings = []
    for segment in range(num_segments):
        among = segment_of == segment

        def choose(chosen: BoolArray) -> Callable[[BoolArray], FloatArray]:
            own = polish(objective.take(chosen), common)
            return lambda asked: _gained(objective.take(asked), own, common, int(asked.sum()))

        own = holds_out(len(segment_of), choose, among, seed)
        settings.append(polish(objective.take(among), common) if own else common)
    return settings


def _gained(objective: Objective, own: Setting, common: Setting, num_cases: int) -> FloatArray:
    """[num_cases] what ``own`` earns over ``common``; 0 for cases without a proposed target."""
    every = np.zeros(num_cases, dtype=np.float32)
    found = own.gains(objective) - common.gains(objective)
    every[: len(found)] = found
    return every
