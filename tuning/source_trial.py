"""A trial of one setting of one source: fit it, measure the lists that it proposes.

Shape legend: B cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import tune

from fusionrec.config import Config
from fusionrec.data.splits import Cases
from fusionrec.evaluation.metrics import ndcg
from fusionrec.evaluation.ranks import RealArray, list_ranks
from fusionrec.sources.protocol import Iterative, Source, TrainingData
from fusionrec.space import replaced
from tuning.search import rungs

BLOCK = 256
"""Histories that a source answers together."""
DEPTH = 100
"""Length of the lists in which targets are looked for: ties are counted up to there."""


@dataclass(frozen=True, slots=True)
class Task:
    """What the trials of a search have in common."""

    kind: type[Source]
    settings: Config
    """What a trial's parameters replace a part of."""
    data: TrainingData
    cases: Cases
    k: int


class SourceTrial(tune.Trainable):
    """One setting. The actor and the data live on from trial to trial."""

    def setup(self, config: dict[str, Any], task: Task | None = None) -> None:
        """Take hold of the task; Ray fetches it from the object store once an actor."""
        if task is not None:  # Tune's signature has to be kept; a search always gives one
            self._task = task
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial, in the same actor."""
        source = built(self._task.kind, replaced(self._task.settings, new_config))
        self._steps = steps(source, self._task.data)
        return True

    def step(self) -> dict[str, float]:
        """Fit up to the next rung, and measure."""
        epochs, last, fitted = next(self._steps)
        value = float(gains(fitted, self._task.cases, self._task.k).mean())
        return {"ndcg": value, "epochs": epochs, "done": last}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A trial that was interrupted begins anew: there is nothing to keep."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See :meth:`save_checkpoint`."""


def built(kind: type[Any], settings: Config) -> Source:
    """The unfitted source of these settings: every source is made from its config alone."""
    source: Source = kind(settings)
    return source


def steps(source: Source, data: TrainingData) -> Iterator[tuple[int, bool, Source]]:
    """Passes done, whether they are all, and the source after them."""
    if not isinstance(source, Iterative):
        yield 1, True, source.fit(data)
        return
    stops = rungs(source.epochs)
    for stop, fitted in zip(stops, source.fit_in_steps(data, stops), strict=True):
        yield stop, stop == source.epochs, fitted


def gains(source: Source, cases: Cases, k: int) -> RealArray:
    """[B] NDCG@k of the lists that ``source`` proposes; ties take their mean rank."""
    found = []
    for start in range(0, len(cases), BLOCK):
        block = cases.take(np.arange(start, min(start + BLOCK, len(cases))))
        top = source.top(block.histories, DEPTH)
        found.append(ndcg(list_ranks(top.items, top.scores, block.targets), k))
    return np.concatenate(found)
