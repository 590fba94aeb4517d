"""The source around every item–item model: EASE, item-kNN, transitions.

A history's score for an item is the sum, over the events of the history, of the recency weight of
the event times the learned weight of (event's item → item):

    score(h, c) = Σ_e  recency ** age(e) · W[item(e), c]      age 0 is the newest event

How ``W`` is learned is the learner's business; one file each.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Self, TypeAlias

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from fusionrec.config import Config
from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.retrieval.rows import SparseRows
from fusionrec.sources.answers import scored
from fusionrec.sources.decays import Decays, learn_decays
from fusionrec.sources.ease import EASE
from fusionrec.sources.item_knn import ItemKNN
from fusionrec.sources.protocol import Answer, Ranked, TrainingData
from fusionrec.sources.transitions import Decay, Transitions
from fusionrec.space import Range

Learner: TypeAlias = Annotated[EASE | ItemKNN | Transitions, Field(discriminator="kind")]

_FELT = 1e-7
"""Weight, relative to the newest event's, below which an event is left out, so that a long history
costs no more than a bounded one; an item that only such events speak for scores 0."""
_DECAYS = "decays.json"


class ItemItemConfig(Config):
    """Settings of one item–item source."""

    learner: Learner
    """What learns the weights."""
    recency: Annotated[Decay, Range(0.2, 1)] = 0.8
    """Weight of an event relative to the next newer one of its history; 1 forgets the order;
    learned, of transitions alone: that under which held-out training events are most likely."""
    neighbours: Annotated[int, Range(50, 1000, log=True)] = Field(default=300, ge=1)
    """Weights kept for each item."""

    @field_validator("recency")
    @classmethod
    def _learned_by_transitions(cls, recency: Decay, info: ValidationInfo) -> Decay:
        learner = info.data.get("learner")
        if recency == "learned" and not isinstance(learner, Transitions | None):
            raise ValueError(f"only transitions learn it, {learner.kind} does not: give a number")
        return recency

    @property
    def learns_decays(self) -> bool:
        """Whether a decay is found when the source is fitted."""
        learner = self.learner
        return isinstance(learner, Transitions) and "learned" in (learner.decay, self.recency)


class ItemItem:
    """Scores items by their learned weights to the items of a history."""

    def __init__(
        self,
        config: ItemItemConfig,
        neighbours: SparseRows | None = None,
        decays: Decays | None = None,
    ) -> None:
        self.config = config
        self._neighbours = neighbours
        self._decays = decays

    @property
    def name(self) -> str:
        """The learner's name."""
        return self.config.learner.kind

    def fit(self, data: TrainingData) -> Self:
        """Learn the weights. Cost: the learner's."""
        learner, decays = self.config.learner, None
        if self.config.learns_decays:
            assert isinstance(learner, Transitions), "others are refused"
            decays = learn_decays(learner, self.config.recency, data)
            learner = learner.model_copy(update={"decay": decays.decay})
        learned = learner.learn(data, self.config.neighbours)
        return type(self)(self.config, learned.compact(), decays)

    def ask(self, histories: Histories) -> Answer:
        """Add up the neighbours of the items of each history."""
        felt = histories.newest(self._reach)
        weights = (self._recency**felt.ages).astype(np.float32)
        return scored(histories, self._fitted.sums(felt.offsets, felt.items, weights))

    def top(self, histories: Histories, k: int) -> Ranked:
        """The best ``k`` items of each history."""
        return self.ask(histories).top(k)

    def score(self, histories: Histories, candidates: CodeArray) -> FloatArray:
        """[B, C] scores of ``candidates``."""
        return self.ask(histories).score(candidates)

    def save(self, directory: Path) -> None:
        """Write ``config.json``, the neighbours and, where decays were learned, these."""
        self._fitted.save(directory)
        (directory / "config.json").write_text(self.config.model_dump_json(indent=2))
        if self._decays is None:
            (directory / _DECAYS).unlink(missing_ok=True)  # of an earlier fit
        else:
            (directory / _DECAYS).write_text(self._decays.model_dump_json(indent=2))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the settings and what was learned of decays, memory-map the neighbours."""
        config = ItemItemConfig.model_validate_json((directory / "config.json").read_bytes())
        decays = None
        if config.learns_decays:
            decays = Decays.model_validate_json((directory / _DECAYS).read_bytes())
        return cls(config, SparseRows.load(directory), decays)

    @property
    def _fitted(self) -> SparseRows:
        assert self._neighbours is not None, f"{self.name} is not fitted"
        return self._neighbours

    @property
    def _recency(self) -> float:
        """As it was set, or learned."""
        recency = self.config.recency if self._decays is None else self._decays.recency
        assert isinstance(recency, float), f"{self.name} is not fitted"
        return recency

    @property
    def _reach(self) -> int:
        """How many of a history's newest events are looked at."""
        recency = self._recency
        return sys.maxsize if recency == 1 else 1 + int(math.log(_FELT) / math.log(recency))
