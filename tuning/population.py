"""Population-based training, as an Optuna sampler: each trial is one pass of one member.

Jaderberg et al., "Population Based Training of Neural Networks" (2017). Members learn side by side.
Before its next pass a member that is in the worst quarter goes on from a model of the best quarter,
with settings near that one's; the others go on from their own with their own. Ray Tune's PBT takes
no searcher and so could not be in a journal; here a member's model lies on disk, what it goes on
from is among the trial's parameters, and a campaign that is killed goes on as any other does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

QUARTER = 4
FACTORS = (0.8, 1.25)
"""What a setting is multiplied by to look near it."""
ANEW = 0.25
"""Probability that it is drawn anew instead."""


class Pass(NamedTuple):
    """Which pass of which member a trial is, and what it goes on from; all are parameters."""

    member: int
    number: int
    """From 0."""
    of_member: int
    of_number: int
    """−1 for the weights that all start from."""

    @property
    def name(self) -> str:
        """Of its model's folder."""
        return f"{self.member}-{self.number}"

    @property
    def parent(self) -> str | None:
        """Of the folder of the model that it goes on from."""
        return None if self.of_number < 0 else f"{self.of_member}-{self.of_number}"


FIRST = Pass(0, 0, 0, -1)


def lineage(params: Mapping[str, Any]) -> Pass | None:
    """The parameters of a pass, where there are any."""
    if Pass._fields[0] not in params:
        return None
    return Pass(*(int(params[name]) for name in Pass._fields))


def passes(population: int, epochs: int) -> dict[str, BaseDistribution]:
    """The parameters that :class:`Pass` adds to a space."""
    member, number = IntDistribution(0, population - 1), IntDistribution(-1, epochs - 1)
    return dict(zip(Pass._fields, (member, number, member, number), strict=True))


class PopulationSampler(BaseSampler):
    """See the module. A study of it has ``population`` · epochs trials."""

    def __init__(self, space: Mapping[str, BaseDistribution], population: int, seed: int) -> None:
        self._space, self._population = dict(space), population
        self._random, self._generator = RandomSampler(seed=seed), np.random.default_rng(seed)

    def infer_relative_search_space(
        self, _study: Study, _trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All of it."""
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, _search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next pass of the member that has made the fewest, and is not at one."""
        busy, newest = set(), {}
        for each in study.get_trials(deepcopy=False):
            found = lineage(each.params)
            if found is None or each.number == trial.number:
                continue
            if each.state is TrialState.RUNNING:
                busy.add(found.member)
            elif each.state is TrialState.COMPLETE:
                newest[found.member] = (each, found.number)  # in the order of their numbers
        free = [m for m in range(self._population) if m not in busy] or [*range(self._population)]
        member = min(free, key=lambda m: newest[m][1] if m in newest else -1)
        if member not in newest:
            drawn = {n: self._drawn(study, trial, n) for n in self._space if n not in Pass._fields}
            return {**Pass(member, 0, member, -1)._asdict(), **drawn}
        parent = self._parent(member, {m: each.value or 0.0 for m, (each, _) in newest.items()})
        model, number = newest[parent]
        settings = {n: model.params[n] for n in self._space if n not in Pass._fields}
        if parent != member:
            settings = {n: self._near(study, trial, n, v) for n, v in settings.items()}
        return {**Pass(member, newest[member][1] + 1, parent, number)._asdict(), **settings}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """Of a parameter that is not in the space: at random."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def _parent(self, member: int, values: Mapping[int, float]) -> int:
        """Who ``member`` goes on from: itself, or one of the best if it is among the worst."""
        ranked = sorted(values, key=lambda m: (values[m], -m))
        few = -(-len(ranked) // QUARTER)
        if member not in ranked[:few] or len(ranked) < 2:
            return member
        return int(self._generator.choice(ranked[-few:]))

    def _near(self, study: Study, trial: FrozenTrial, name: str, value: float) -> Any:
        place = self._space[name]
        if self._generator.random() < ANEW or not isinstance(
            place, FloatDistribution | IntDistribution
        ):
            return self._drawn(study, trial, name)
        moved = float(np.clip(value * self._generator.choice(FACTORS), place.low, place.high))
        return round(moved) if isinstance(place, IntDistribution) else moved

    def _drawn(self, study: Study, trial: FrozenTrial, name: str) -> Any:
        return self._random.sample_independent(study, trial, name, self._space[name])
