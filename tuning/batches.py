"""Several trials of a study as one of Ray Tune's: what Tune does around one takes 20 ms or more.

The study is asked for a batch, every trial of it is in the journal before it is evaluated, and what
came of them is on disk together before the next batch is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState
from ray.tune.search import Searcher

from tuning.journal import Lines, ask

BATCH = "batch"
"""In the config of a trial of Tune: the parameters of each of the study's."""
VALUES = "values"
"""In its result: the value of each."""


class Batches(Searcher):
    """Proposes batches of a study's trials; the trainable evaluates one after the other."""

    def __init__(
        self,
        study: optuna.Study,
        lines: Lines,
        space: Mapping[str, BaseDistribution],
        size: int,
        trials: int,
    ) -> None:
        """``trials`` in all, ``size`` at a time."""
        super().__init__()
        self._study, self._lines, self._space = study, lines, dict(space)
        self._size, self._left = size, trials
        self._asked: dict[str, list[int]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The parameters of the next batch; None once there is no more."""
        count = min(self._size, self._left)
        if not count:
            return None
        self._left -= count
        trials = ask(self._study, self._space, count)
        self._asked[trial_id] = [trial.number for trial in trials]
        return {BATCH: [trial.params for trial in trials]}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Note what came of each."""
        numbers = self._asked.pop(trial_id)
        values = None if error or result is None else result.get(VALUES)
        with self._lines.together():
            for place, number in enumerate(numbers):
                if values is None:
                    self._study.tell(number, state=TrialState.FAIL)
                else:
                    self._study.tell(number, values[place])

    def save(self, checkpoint_path: str) -> None:
        """The journal has all there is."""

    def restore(self, checkpoint_path: str) -> None:
        """See :meth:`save`."""
