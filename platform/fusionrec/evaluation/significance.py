"""How sure a number is: the paired bootstrap over cases.

Cases are drawn with replacement, as many as there are, and every mean is taken over the same draws:
two systems are compared on the same cases in every draw, so that what makes a case hard for both
cancels. Intervals are percentile intervals; the p-value is the two-sided share of draws in which
the difference has the other sign, so that the two agree: p < 1 − level when the interval leaves
out 0.

Efron & Tibshirani, An introduction to the bootstrap, 1993, chapters 13 and 15; for rankings, Sakai,
Evaluating evaluation metrics based on the bootstrap, SIGIR 2006.

What it does not know: that training itself is random, and that several systems are compared (no
correction for multiple comparisons).

Shape legend: B cases, M columns (a metric of a system each), R draws.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fusionrec.config import Config
from fusionrec.evaluation.ranks import RealArray

BLOCK_BYTES = 64 * 2**20
"""Size of one block of weights."""
ROUNDING = 1e-12
"""Differences of means below this are rounding of the sums, not differences."""


class Estimate(Config):
    """A mean over cases with its percentile interval."""

    mean: float
    low: float
    high: float


class Comparison(Config):
    """System ``a`` against system ``b`` in one metric, paired over the same cases."""

    metric: str
    a: str
    b: str
    num_cases: int
    mean_a: float
    mean_b: float
    difference: Estimate
    """a − b."""
    ratio: Estimate | None
    """a / b; null where b is 0 in the data or in a draw."""
    p_value: float
    """Two-sided; never below 2 / (R + 1), which R draws cannot resolve."""

    @property
    def significant(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.difference.low > 0 or self.difference.high < 0


class BootstrapConfig(Config):
    """Settings of the bootstrap."""

    draws: int = Field(2000, ge=100)
    """Number of resamples."""
    level: float = Field(0.95, gt=0, lt=1)
    """Probability that an interval covers."""
    seed: int = Field(0, ge=0)
    """Seed of the resampling."""


def bootstrap_means(values: RealArray, config: BootstrapConfig) -> RealArray:
    """[R, M] the means of the columns of ``values`` [B, M] over R draws of B cases.

    The draws depend on B and the seed alone, so that calls with the same cases are paired too.
    Each draw is a row of counts and each block of draws one matrix product: O(R · B · M).
    """
    num_cases = len(values)
    assert num_cases > 0, "there is nothing to draw from"
    rng = np.random.default_rng(config.seed)
    block = max(1, BLOCK_BYTES // (8 * num_cases))
    means = np.empty((config.draws, values.shape[1]))
    for start in range(0, config.draws, block):
        stop = min(start + block, config.draws)
        counts = np.empty((stop - start, num_cases))
        for row in counts:
            row[:] = np.bincount(rng.integers(num_cases, size=num_cases), minlength=num_cases)
        means[start:stop] = counts @ values / num_cases
    return means


def estimate(mean: float, draws: RealArray, level: float) -> Estimate:
    """The percentile interval of ``draws`` [R] around ``mean``."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean=float(mean), low=float(low), high=float(high))


def p_value(differences: RealArray) -> float:
    """Two-sided p-value of "the difference is 0" from bootstrapped ``differences`` [R].

    2 · min(P(d ≤ 0), P(d ≥ 0)) with one draw added to each side, at most 1; 1 when all are 0.
    """
    smaller = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (smaller + 1) / (len(differences) + 1))


def compare(
    metric: str,
    names: tuple[str, str],
    values: RealArray,
    config: BootstrapConfig,
    draws: RealArray | None = None,
) -> Comparison:
    """Compare two systems by ``values`` [B, 2], the metric of both on the same cases.

    ``draws`` [R, 2] are their bootstrapped means where these are at hand already.
    """
    draws = bootstrap_means(values, config) if draws is None else draws
    mean_a, mean_b = (float(mean) for mean in values.mean(axis=0))
    ratio = None
    if mean_b > 0 and (draws[:, 1] > 0).all():
        ratio = estimate(mean_a / mean_b, draws[:, 0] / draws[:, 1], config.level)
    differences = draws[:, 0] - draws[:, 1]
    differences[np.abs(differences) < ROUNDING] = 0
    return Comparison(
        metric=metric,
        a=names[0],
        b=names[1],
        num_cases=len(values),
        mean_a=mean_a,
        mean_b=mean_b,
        difference=estimate(mean_a - mean_b, differences, config.level),
        ratio=ratio,
        p_value=p_value(differences),
    )
