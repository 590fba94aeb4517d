"""The decays of transitions, learned: those under which held-out events are most likely.

A history h proposes its next item y as likely as its score is high among all that it may propose,
Luce's choice axiom (1959), or else y came because it is popular:

    P(y | h) = (1 − μ) · s(h, y) / Σ_{c ∉ h} s(h, c) + μ · n(y) / Σ_c n(c)
    s(h, c) = Σ_e  recency^age(e) · Σ_d decay^(d−1) · N_d[item(e), c] / (n(item(e))^p · n(c)^q)

The scores are those that are served: N_d counts the pairs ``d`` steps apart, n an item's events, p
and q are the powers that damp frequent items. With p = 1 and q = 0 this is the mixture transition
distribution of Raftery (JRSS B, 1985), whose weights of lags fall by the factor recency, and the
interpolation with what is popular that of Jelinek & Mercer (1980): events that the pairs do not
explain do not bend the decays. Of a history, its newest ``steps`` events are read here.

The newest event of some training histories is held out; on these the mean of log P is maximised
over μ and those of decay and recency that are to be learned, the pairs being counted in what is
left. With the learned ones, pairs are then counted in all. An event that no pair speaks for is as
likely whatever the decays, and is left out.

Shape legend: B questions, E newest events of their histories, L steps, P pairs, I items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.optimize
from pydantic import Field

from fusionrec.config import Config
from fusionrec.data.histories import CodeArray, Histories, IntArray
from fusionrec.sources.held_out import hold_out
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.transitions import Decay, Transitions

RealArray: TypeAlias = npt.NDArray[np.float64]
QUESTIONS, SHARE = 1000, 0.1
"""Events that are held out at most, and the most of all events that they may be."""
_START = {"decay": 0.8, "recency": 0.5, "popular": 0.5}
"""Where the search begins, and what remains where nothing is likely."""
_LEAST, _MOST_POPULAR = 0.05, 0.99
_DIGITS = 3
"""More of a decay than can be told from so many questions, so that machines agree."""


class Decays(Config):
    """Both, as they were learned or set."""

    decay: float = Field(gt=0, le=1)
    recency: float = Field(gt=0, le=1)


def learn_decays(learner: Transitions, recency: Decay, data: TrainingData) -> Decays:
    """The most likely decays; one that is set is kept.

    Cost: ``steps`` passes over the events, in each of which up to ``steps``² pairs of events are
    looked up for each question.
    """
    wanted: dict[str, Decay] = {"decay": learner.decay, "recency": recency}
    fixed = {name: value for name, value in wanted.items() if isinstance(value, float)}
    free = [name for name in _START if name not in fixed]
    evidence = Evidence.of(learner, data)
    found = [_START[name] for name in free]
    if evidence.num_questions:

        def loss(values: RealArray) -> float:
            return -evidence.log_likelihood(**fixed, **dict(zip(free, values, strict=True)))

        bounds = [(_LEAST, 1.0)] * (len(free) - 1) + [(0.0, _MOST_POPULAR)]
        best = scipy.optimize.minimize(loss, found, method="L-BFGS-B", bounds=bounds)
        found = [round(float(value), _DIGITS) for value in best.x]
    return Decays(**fixed, **dict(zip(free[:-1], found[:-1], strict=True)))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What pairs say about held-out events, by step and by age."""

    rows: IntArray
    """[E] the question of each event."""
    ages: IntArray
    """[E]"""
    for_target: RealArray
    """[E, L] what pairs of so many steps add to the score of the question's target."""
    for_all: RealArray
    """[E, L] and to the scores of all items that are not among the newest events."""
    popularity: RealArray
    """[B] the share of the question's target in all events."""
    num_questions: int
    """B, all with a pair that speaks for the target."""

    @classmethod
    def of(cls, learner: Transitions, data: TrainingData) -> Self:
        """Of what is held out of ``data``."""
        # Without timestamps it does not matter whose events are held out: any seed does.
        left, histories, targets = hold_out(data, SHARE, QUESTIONS, seed=0)
        newest = histories.newest(learner.steps)
        items, rows, num_items = newest.items, newest.rows, data.num_items
        counts = np.maximum(np.bincount(left.items, minlength=num_items), 1).astype(np.float64)
        damped_from, damped_to = counts**-learner.from_power, counts**-learner.to_power
        event, other = _companions(newest)
        wanted = targets[rows]
        known = np.isin(
            targets + num_items * np.arange(len(targets)),
            histories.items + num_items * histories.rows,
        )
        for_target, for_all = (np.zeros((len(items), learner.steps)) for _ in range(2))
        for step in range(learner.steps):
            pairs = _Pairs.of(left, step + 1, num_items)
            seen = pairs.find(items[event], other) * damped_to[other]
            for_all[:, step] = pairs.sums(damped_to)[items]
            for_all[:, step] -= np.bincount(event, seen, minlength=len(items))
            for_target[:, step] = pairs.find(items, wanted) * damped_to[wanted]
        for_all *= damped_from[items][:, None]
        for_target *= damped_from[items][:, None]
        spoken_for = np.bincount(rows, for_target.sum(axis=1), minlength=len(targets)) > 0
        spoken_for &= ~known  # what is in the history is not proposed
        keep = spoken_for[rows]
        number = np.cumsum(spoken_for) - 1
        return cls(
            rows=number[rows[keep]],
            ages=newest.ages[keep],
            for_target=for_target[keep],
            for_all=for_all[keep],
            popularity=counts[targets[spoken_for]] / max(len(left.items), 1),
            num_questions=int(spoken_for.sum()),
        )

    def log_likelihood(self, decay: float, recency: float, popular: float) -> float:
        """Mean of log P over the questions, in nats; ``popular`` is μ."""
        by_step = decay ** np.arange(self.for_target.shape[1])
        by_age = recency**self.ages
        target, every = (
            np.bincount(self.rows, by_age * (each @ by_step), minlength=self.num_questions)
            for each in (self.for_target, self.for_all)
        )
        return float(np.log((1 - popular) * target / every + popular * self.popularity).mean())


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The pairs that are some steps apart, each once."""

    keys: IntArray
    """[P] I · earlier + later, ascending."""
    counts: IntArray
    """[P] how often."""
    num_items: int

    @classmethod
    def of(cls, histories: Histories, steps: int, num_items: int) -> Self:
        """Those of ``histories``."""
        (first,) = np.nonzero(histories.ages >= steps)
        items = histories.items.astype(np.int64)
        keys, counts = np.unique(
            num_items * items[first] + items[first + steps], return_counts=True
        )
        return cls(keys, counts, num_items)

    def find(self, earlier: CodeArray, later: CodeArray) -> IntArray:
        """[N] how often each pair of [N] ``earlier`` and ``later`` was met."""
        if not len(self.keys):
            return np.zeros(len(earlier), dtype=np.int64)
        keys = self.num_items * earlier.astype(np.int64) + later
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.counts[place], 0)

    def sums(self, weights: RealArray) -> RealArray:
        """[I] of all that came after an item, the sum of ``weights`` [I]."""
        earlier, later = np.divmod(self.keys, self.num_items)
        sums = np.bincount(earlier, self.counts * weights[later], minlength=self.num_items)
        return sums.astype(np.float64)  # of no pairs it counts in whole numbers


def _companions(histories: Histories) -> tuple[IntArray, CodeArray]:
    """Every event with every distinct item of its history: [N] the event, [N] the item."""
    rows = histories.rows
    stride = int(histories.items.max(initial=0)) + 1
    distinct = np.unique(rows * stride + histories.items)
    counts = np.bincount(distinct // stride, minlength=len(histories))
    first = np.cumsum(counts) - counts
    event = np.repeat(np.arange(len(rows)), counts[rows])
    before = np.cumsum(counts[rows]) - counts[rows]
    place = np.arange(len(event)) - np.repeat(before - first[rows], counts[rows])
    return event, (distinct[place] % stride).astype(np.int32)
