"""Which sources give nothing: backward elimination on cases that weights were not found on.

After bagging (:func:`fusionrec.fusion.refine.bagged`) hardly a weight is exactly 0, not even that
of a source without any signal: some samples of the cases trust it. Whether it gives anything shows
on the cases that are *out of bag*: those that a sample left out. The source of the least weight is
left out, the others are polished again on the same samples, and where nothing is lost out of bag it
is off. Then comes the next one, and each source has its turn once. Costs a bagging a source.

Out of bag: Breiman, "Out-of-bag estimation" (1996). To bear a loss of a standard error, as he does
for the size of trees, cost more than it spared: the losses of several sources add up. A vote of the
samples, as in stability selection (Meinshausen and Bühlmann, 2010), keeps what most of them trust
by chance. ``docs/results.md`` has the figures.

Shape legend: S sources, B cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fusionrec.data.histories import BoolArray, FloatArray
from fusionrec.fusion.objective import Objective
from fusionrec.fusion.refine import Setting, polish, samples

MAX_CASES = 5_000
"""Cases that decide; more are sampled, for time grows with them."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What an elimination leaves."""

    keep: BoolArray
    """[S] the sources that are asked; at least one."""
    adds: FloatArray
    """[S] mean NDCG that each adds out of bag to those that were left when its turn came."""


@dataclass(frozen=True, slots=True)
class _Bags:
    """Settings that were found on samples of the cases, and what they earn elsewhere."""

    settings: Sequence[Setting]
    gains: FloatArray
    """[B] the mean over the samples that a case is not in; 0 where it is in all."""

    @classmethod
    def of(cls, objective: Objective, start: Setting, drawn: Sequence[BoolArray]) -> _Bags:
        """Polish ``start`` on each of the ``drawn`` samples [B] of the cases."""
        settings = [polish(objective.take(sample), start) for sample in drawn]
        total, count = np.zeros(objective.num_cases), np.zeros(objective.num_cases)
        for setting, sample in zip(settings, drawn, strict=True):
            others = objective.take(~sample)
            total[others.rows] += setting.gains(others)
            count += ~sample
        return cls(settings, (total / np.maximum(count, 1)).astype(np.float32))

    @property
    def mean(self) -> Setting:
        """What bagging takes."""
        return Setting.mean(self.settings)


def select(
    objective: Objective,
    start: Setting,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> Selection:
    """Turn off the sources whose weight gains nothing on cases that it was not found on.

    Args:
        objective: over all cases and sources.
        start: where each polishing begins.
        seed: of the samples.
        advance: called once a source.
    """
    num_sources = len(objective.terms)
    deciding = np.random.default_rng(seed).permutation(objective.num_cases) < MAX_CASES
    drawn, objective = samples(objective.num_cases, seed), objective.take(deciding)
    keep, adds = np.ones(num_sources, dtype=np.bool_), np.zeros(num_sources, dtype=np.float32)
    bags = _Bags.of(objective, start, drawn)
    for source in np.argsort(bags.mean.weights, kind="stable").tolist():
        others = keep.copy()
        others[source] = False
        if others.any():
            # From the same start: polished from where polishing ended, weights follow the cases on.
            fewer = _Bags.of(objective.of_sources(others), start.of_sources(others), drawn)
            lost = (bags.gains - fewer.gains)[deciding]
            adds[source] = lost.mean()
            if adds[source] <= 0:
                keep, bags = others, fewer
        advance()
    return Selection(keep, adds)
