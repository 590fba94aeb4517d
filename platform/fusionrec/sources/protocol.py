"""What a candidate source is: it knows items, never users.

Shape legend: B histories, I items of the catalogue, C candidates, K items returned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import numpy as np

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import CodeArray, FloatArray, Histories


@dataclass(frozen=True, slots=True)
class TrainingData:
    """All that a source may learn from."""

    catalogue: Catalogue
    histories: Histories
    """One history a user; nothing of validation or test."""
    has_timestamps: bool = True
    """False where ``timestamps`` only count a user's events."""
    item_vectors: FloatArray | None = None
    """[I, D] L2-normalised text vectors of the items, where there is an encoder; a row of zeros for
    an item without text."""
    history_vectors: Callable[[int], FloatArray | None] = lambda _: None
    """Given a number, the text vectors of so many of the histories, or fewer: a sample of what
    ``item_vectors`` will be asked. Worked out when it is called, at the cost of a model."""

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.catalogue)


@dataclass(frozen=True, slots=True)
class Ranked:
    """The best K items of each of B histories, best first."""

    items: CodeArray
    """[B, K] item codes; −1 where a source has nothing more to offer."""
    scores: FloatArray
    """[B, K] descending; 0 where the item is −1."""

    def __post_init__(self) -> None:
        assert self.items.shape == self.scores.shape
        assert self.items.dtype == np.int32
        assert self.scores.dtype == np.float32


class Answer(Protocol):
    """What a source thinks of B histories: worked out once, then asked for items and for scores."""

    def top(self, k: int) -> Ranked:
        """As :meth:`Source.top`."""
        ...

    def score(self, candidates: CodeArray) -> FloatArray:
        """As :meth:`Source.score`."""
        ...


class Source(Protocol):
    """A candidate source. Equal inputs give equal outputs; ties go to the lower item code."""

    @property
    def name(self) -> str:
        """Short, stable, in kebab case; names the directory and the weights of the source."""
        ...

    def fit(self, data: TrainingData) -> Self:
        """A fitted source; ``self`` stays as it was."""
        ...

    def ask(self, histories: Histories) -> Answer:
        """The answer that ``top`` and ``score`` are parts of. Takes memory: ask in blocks."""
        ...

    def top(self, histories: Histories, k: int) -> Ranked:
        """The best ``k`` items of each history that are not in it and have a positive score.

        A source that has nothing to say about a history (it is empty, it has no vector) returns −1.
        """
        ...

    def score(self, histories: Histories, candidates: CodeArray) -> FloatArray:
        """[B, C] the scores of ``candidates`` [B, C]; 0 where the candidate is −1 or unknown.

        Agrees with :meth:`top`: an item's score does not depend on who asks.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write settings and weights into ``directory`` (made if missing): no pickle."""
        ...

    @classmethod
    def load(cls, directory: Path) -> Self:
        """The inverse of :meth:`save`; large arrays are memory-mapped."""
        ...


@runtime_checkable
class Iterative(Protocol):
    """A source that learns in passes and is one after any of them: a search can stop it early."""

    @property
    def epochs(self) -> int:
        """Passes of a whole fit."""
        ...

    def fit_in_steps(self, data: TrainingData, after: Collection[int]) -> Iterator[Source]:
        """The source as it is after each of the passes ``after``, and after the last.

        The last is what ``fit`` returns, however many came before it.
        """
        ...


@runtime_checkable
class ReadsItemVectors(Protocol):
    """A source that may learn from ``TrainingData.item_vectors``: others do not look at them."""

    @property
    def reads_item_vectors(self) -> bool:
        """Whether it does under its settings: with other vectors, it is to be fitted again."""
        ...
