"""One search: Ray Tune evaluates what Optuna proposes, and the journal keeps it.

A trial takes one CPU or more in an actor that lives on from trial to trial, or none where it starts
workers that do; as many run at a time as the cluster has CPUs for, so that a search spreads over a
cluster and fits a laptop. Where a
trial can be measured on the way, ASHA stops those that are behind (Li et al., "A System for
Massively Parallel Hyperparameter Tuning", MLSys 2020).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import ray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.optuna import OptunaSearch

from fusionrec.errors import ConfigError
from fusionrec.progress import bar
from fusionrec.space import Choice, Range, Space
from jobs import cluster
from tuning.batches import BATCH, Batches
from tuning.journal import Lines, ended, open_study, spent_s

REDUCTION = 3
"""ASHA lets the best third of the trials go on at each rung."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is searched, how long, and where its journal lies."""

    name: str
    directory: Path
    space: Mapping[str, BaseDistribution]
    start: Mapping[str, Any]
    """Parameters of the first trial: what the search has to beat."""
    metrics: Mapping[str, Literal["max", "min"]]
    """What a trial reports; one, or several for a front."""
    sampler: Callable[[int], BaseSampler]
    """Given a seed, what proposes."""
    seed: int
    trials: int
    """In all, those of earlier starts included."""
    seconds: float | None = None
    """Time for the search, earlier starts included; None for as long as the trials take."""
    workers: int | None = None
    """Trials at a time; None for as many as fit."""
    cpus: int = 1
    """CPUs of a trial; 0 where it computes in workers of its own, and ``workers`` is for how many
    trials those have room (:mod:`tuning.workers`)."""
    batch: int = 1
    """Trials that an actor is given together: more than one where a trial takes milliseconds. The
    trainable gets them as ``BATCH`` and reports ``VALUES``, see :mod:`tuning.batches`."""
    epochs: int = 1
    """Passes of a whole trial, which reports after each of ``rungs(epochs)``."""


def rungs(epochs: int) -> list[int]:
    """After how many passes a trial is measured: 1, 3, 9 … of at most 27 parts, and the last."""
    found, step = [epochs], max(1, epochs // REDUCTION**3)
    while step < epochs:
        found.insert(-1, step)
        step *= REDUCTION
    return found


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The ranges and choices as Optuna's."""
    return {name: _distribution(each) for name, each in space.items()}


def _distribution(each: Range | Choice) -> BaseDistribution:
    if isinstance(each, Choice):
        return CategoricalDistribution(each.names)
    if each.whole:
        return IntDistribution(int(each.low), int(each.high), log=each.log)
    return FloatDistribution(each.low, each.high, log=each.log)


def run_search(search: Search, trainable: type[tune.Trainable], **parts: object) -> optuna.Study:
    """Go on with the search until its budget is spent; ``parts`` go to the trials' ``setup``.

    Raises:
        ConfigError: every trial failed.
        KeyboardInterrupt: it was stopped; the same call goes on with it.
    """
    directions = [
        StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE
        for mode in search.metrics.values()
    ]
    study, storage, lines = open_study(
        search.directory,
        search.name,
        directions,
        search.start,
        search.sampler,
        search.seed,
    )
    done = ended(study)
    left = None if search.seconds is None else search.seconds - spent_s(study)
    if len(done) < search.trials and (left is None or left > 0):
        with cluster.start(), bar(f"searching {search.name}", search.trials) as advance:
            advance(len(done))
            error = _tune(search, trainable, parts, study, storage, lines, left, advance)
        study = optuna.load_study(storage=storage, study_name=search.name)
        values = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        if not values and error is not None:
            raise ConfigError(f"every trial of {search.name} failed: {error}")
    return study


def _tune(
    search: Search,
    trainable: type[tune.Trainable],
    parts: Mapping[str, object],
    study: optuna.Study,
    storage: optuna.storages.JournalStorage,
    lines: Lines,
    left_s: float | None,
    advance: Callable[[int], object],
) -> BaseException | None:
    """Evaluate the trials that are left; returns the first error of one, if any."""
    done = len(ended(study))
    metrics, modes = list(search.metrics), [str(mode) for mode in search.metrics.values()]
    several = len(metrics) > 1
    searcher: Searcher
    if search.batch > 1:
        searcher = Batches(study, lines, search.space, search.batch, search.trials - done)
    else:
        searcher = OptunaSearch(
            space=dict(search.space),
            metric=metrics if several else metrics[0],
            mode=modes if several else modes[0],
            sampler=study.sampler,
            storage=storage,
            study_name=search.name,
        )
    if search.cpus:
        cpus, workers = fit(search.cpus, search.workers)
        resources: dict[str, float] = {"cpu": cpus}
    else:
        workers = search.workers or 1
        resources = {"cpu": 0, "memory": 1}  # Tune wants to reserve something: a byte
    whole = search.epochs == 1
    asha = ASHAScheduler(
        time_attr="epochs",
        metric=metrics[0],
        mode=modes[0],
        max_t=search.epochs,
        grace_period=rungs(search.epochs)[0],
        reduction_factor=REDUCTION,
    )
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trainable, **parts), resources),
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(searcher, max_concurrent=workers),
            scheduler=None if whole else asha,
            num_samples=-(-(search.trials - done) // search.batch),
            time_budget_s=left_s,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"from-{len(study.get_trials(deepcopy=False))}",
            storage_path=str(search.directory.resolve() / "tune"),
            callbacks=[Advance(advance)],
            verbose=0,
        ),
    )
    # Tune would take Ctrl-C for the end of the search, and what follows for its result.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the journal has what they would note
    # It would warn of each trial that nothing was logged.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    # Tune prints a banner even when told to be silent.
    with (search.directory / "tune.log").open("a") as log, contextlib.redirect_stdout(log):
        results = tuner.fit()
    errors: list[BaseException] = list(results.errors)
    # Ray wraps what a trial raised together with its traceback.
    first: BaseException | None = getattr(errors[0], "cause", errors[0]) if errors else None
    return first


def fit(cpus: int, workers: int | None) -> tuple[int, int]:
    """CPUs of a trial and trials at a time that the cluster can carry: asked for more, it hangs."""
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [int(node["Resources"].get("CPU", 0)) for node in alive]
    cpus = max(1, min(cpus, max(nodes)))
    room = max(1, sum(each // cpus for each in nodes))
    return cpus, min(workers or room, room)


class Advance(tune.Callback):
    """Moves the bar. Tune pickles its callbacks; a bar is not pickled with it."""

    def __init__(self, advance: Callable[[int], object] | None = None) -> None:
        self._advance = advance

    def __reduce__(self) -> tuple[Any, ...]:
        return (Advance, ())

    def on_trial_complete(self, *_args: Any, **info: Any) -> None:
        """One more, or one batch."""
        if self._advance is not None:
            self._advance(len(info["trial"].config.get(BATCH, (None,))))
