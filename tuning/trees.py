"""Search how the trees of the learned fusion are grown, on half of the validation cases.

The space stands in the annotations of ``LambdaRankConfig``; Optuna's TPE proposes, and a trial
grows trees on folds of its half and measures them on the others. The best settings are the luckiest
of many on these cases, so that whether trees are kept is decided on the other half.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from ray import tune

from fusionrec.data.histories import BoolArray
from fusionrec.data.splits import Cases
from fusionrec.errors import ConfigError
from fusionrec.fusion.candidates import Candidates
from fusionrec.fusion.features import ItemStatistics
from fusionrec.fusion.lambdarank import LambdaRankConfig
from fusionrec.fusion.model import LAMBDARANK, Fusion
from fusionrec.space import replaced, searched, setting
from tuning.journal import claim, ended, owned
from tuning.learned import cross_fitted
from tuning.search import Search, distributions, run_search


@dataclass(frozen=True, slots=True)
class TreesTask:
    """What the trials of a search have in common."""

    settings: LambdaRankConfig
    """What a trial's parameters replace a part of."""
    linear: Fusion
    candidates: Candidates
    cases: Cases
    items: ItemStatistics
    k: int
    seed: int

    def take(self, rows: BoolArray) -> TreesTask:
        """Over some of the cases."""
        (index,) = np.nonzero(rows)
        return TreesTask(
            self.settings,
            self.linear,
            self.candidates.take(index),
            self.cases.take(index),
            self.items,
            self.k,
            self.seed,
        )

    def value(self, parameters: dict[str, Any]) -> float:
        """NDCG@k of trees grown so, on cases that did not teach them."""
        settings = replaced(self.settings, parameters)
        values = cross_fitted(
            self.linear, self.candidates, self.cases, self.items, settings, self.k, self.seed
        )
        return float(values[:, 0].mean())


class TreesTrial(tune.Trainable):
    """One setting. The actor and the candidates live on from trial to trial."""

    def setup(self, config: dict[str, Any], task: TreesTask | None = None) -> None:
        """Take hold of the task; Ray fetches it from the object store once an actor."""
        if task is not None:  # Tune's signature has to be kept; a search always gives one
            self._task = task
        self._parameters = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial, in the same actor."""
        self._parameters = new_config
        return True

    def step(self) -> dict[str, float]:
        """Grow and measure."""
        return {"ndcg": self._task.value(self._parameters), "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A trial is one step: there is nothing to keep."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See :meth:`save_checkpoint`."""


def search_trees(
    task: TreesTask, directory: Path, trials: int, workers: int | None
) -> tuple[LambdaRankConfig, BoolArray]:
    """The settings of the best trial, and [B] the cases that did not choose them.

    Raises:
        ConfigError: no trial had anything to learn from.
    """
    half = np.random.default_rng(task.seed).random(len(task.cases)) < 0.5
    request = {
        "linear": task.linear.model_dump(mode="json"),
        "settings": task.settings.model_dump(mode="json"),
        "k": task.k,
        "seed": task.seed,
    }
    space = searched(task.settings)
    with owned(directory.parent):
        try:
            claim(directory, request)
        except ConfigError:  # over other weights: these trees are no others' match
            shutil.rmtree(directory)
            claim(directory, request)
        study = run_search(
            Search(
                name=LAMBDARANK,
                directory=directory,
                space=distributions(space),
                start={name: setting(task.settings, name) for name in space},
                metrics={"ndcg": "max"},
                sampler=_sampler,
                seed=task.seed,
                trials=trials,
                workers=workers,
            ),
            TreesTrial,
            task=task.take(half),
        )
    best = max(
        (trial for trial in ended(study) if trial.value is not None),
        key=lambda trial: (trial.value, -trial.number),
    )
    return replaced(task.settings, best.params), ~half


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
