"""What a journal says of a search, as data: its trials, the best of them, what mattered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from fusionrec.config import Config
from tuning.journal import AGAIN, JOURNAL, took_s


class TrialRecord(Config):
    """One trial that came to a value."""

    number: int
    params: dict[str, float]
    """A choice among names is its position in their order."""
    value: float
    """Of the first metric."""
    at_s: float
    """When it ended, in seconds of trials, one after another: pauses do not count."""
    whole: bool
    """False where it was stopped before its last pass."""


class SearchHistory(Config):
    """One search."""

    name: str
    metric: str
    ranges: dict[str, tuple[float, float, bool]]
    """Parameter → least and largest value, and whether the search looked at ratios."""
    choices: dict[str, tuple[str, ...]]
    """Parameter → its names, where it is a choice."""
    trials: tuple[TrialRecord, ...]
    best: int | None
    """Number of the best trial that was not stopped."""
    importance: dict[str, float]
    """Parameter → share in what makes a good trial (PED-ANOVA, Watanabe et al., IJCAI 2023); for a
    front, in what brings a trial onto it. Empty where there are too few trials."""
    num_failed: int
    """Trials that came to no value."""
    num_interrupted: int
    """Trials that a killed driver left, and that were evaluated again."""


def read(directory: Path, name: str, metric: str) -> SearchHistory:
    """The search whose journal is in ``directory``."""
    storage = JournalStorage(JournalFileBackend(str(directory / JOURNAL)))
    study = optuna.load_study(storage=storage, study_name=name)
    trials = study.get_trials(deepcopy=False)
    done = [t for t in trials if t.state is TrialState.COMPLETE]
    done.sort(key=lambda t: (t.datetime_complete, t.number))
    most = max((len(t.intermediate_values) for t in done), default=0)
    space = {n: d for t in done[:1] for n, d in t.distributions.items()}
    records, spent = [], 0.0
    for trial in done:
        spent += took_s(trial)
        records.append(
            TrialRecord(
                number=trial.number,
                params={n: float(space[n].to_internal_repr(v)) for n, v in trial.params.items()},
                value=trial.values[0],
                at_s=round(spent, 3),
                whole=len(trial.intermediate_values) == most,
            )
        )
    whole = [record for record in records if record.whole]
    again = {t.user_attrs[AGAIN] for t in trials if AGAIN in t.user_attrs}
    failed = [t for t in trials if t.state is TrialState.FAIL and t.number not in again]
    return SearchHistory(
        name=name,
        metric=metric,
        ranges={n: _range(d) for n, d in space.items()},
        choices={
            n: tuple(map(str, d.choices))
            for n, d in space.items()
            if isinstance(d, CategoricalDistribution)
        },
        trials=tuple(records),
        best=max(whole, key=lambda each: (each.value, -each.number)).number if whole else None,
        importance=_importance(study, done),
        num_failed=len(failed),
        num_interrupted=len(again),
    )


def _range(distribution: Any) -> tuple[float, float, bool]:
    if isinstance(distribution, FloatDistribution | IntDistribution):
        return float(distribution.low), float(distribution.high), distribution.log
    return 0.0, float(len(distribution.choices) - 1), False


def _importance(study: optuna.Study, done: list[FrozenTrial]) -> dict[str, float]:
    if len(done) < 5 or len({tuple(t.values) for t in done}) < 2:
        return {}
    found = optuna.importance.get_param_importances(study)
    return {name: round(float(share), 4) for name, share in found.items()}
