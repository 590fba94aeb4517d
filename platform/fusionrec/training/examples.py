"""Examples for the language models: what came next after a part of a training history.

Made from training histories alone, so nothing of validation or test is in them. Shape legend:
P examples, M negatives, U users, N events of all histories.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy

from fusionrec.data.histories import BoolArray, CodeArray, FloatArray, Histories, IntArray
from fusionrec.errors import TrainingError

_FILE = "examples.safetensors"
_REVIEWS = "reviews.parquet"


@dataclass(frozen=True, slots=True)
class Examples:
    """P times: a history, the item that came next, and items that did not."""

    histories: Histories
    """[P] what came before, oldest first; never empty."""
    positives: CodeArray
    """[P] the item that came next; not in the history."""
    users: IntArray
    """[P] rows of ``seen``."""
    seen: Histories
    """[U] every training item of each user: none of them is a negative."""
    negatives: CodeArray
    """[P, M] items that the user never had; −1 behind where there are fewer; M may be 0."""
    scores: FloatArray | None = None
    """[P, 1+M] a teacher's scores of the positive and the negatives; 0 where there is no item."""
    ratings: FloatArray | None = None
    """[P] what the user gave the positive."""
    expected: FloatArray | None = None
    """[P] what could be expected without reading a text, in the unit of the ratings."""
    reviews: CodeArray | None = None
    """[P, 2, R] what the user wrote before, and what others wrote of the positive: positions in
    ``review_texts``, newest first; −1 behind where there are fewer."""
    review_texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.positives)

    @classmethod
    def of(
        cls,
        train: Histories,
        *,
        per_user: int,
        limit: int,
        generator: np.random.Generator,
        with_text: BoolArray | None = None,
    ) -> Self:
        """The newest ``per_user`` events of each training history with all that came before them.

        Args:
            train: [U] training histories.
            per_user: Examples of one user at most.
            limit: Examples in all; beyond it a random choice.
            generator: Makes that choice.
            with_text: [I] items that have text; others are never an answer.

        Raises:
            TrainingError: no user has two training events.
        """
        places = np.arange(len(train.items)) - np.repeat(train.offsets[:-1], train.lengths)
        chosen = (places > 0) & (train.ages < per_user)
        if with_text is not None:
            chosen &= with_text[train.items]
        (events,) = np.nonzero(chosen)
        events = events[~_repeated(train, events, places[events])]
        if len(events) == 0:
            raise TrainingError(
                "there is nothing to train a language model on: no user has two different training "
                "events whose second item has text; bring a larger data set"
            )
        if len(events) > limit:
            events = np.sort(generator.choice(events, size=limit, replace=False))
        users = train.rows[events]
        return cls(
            histories=_before(train, events, places[events]),
            positives=train.items[events],
            users=users,
            seen=train,
            negatives=np.empty((len(events), 0), dtype=np.int32),
        )

    def newest(self, count: int) -> Self:
        """The same with histories of at most ``count`` events: what the text of a history needs."""
        return replace(self, histories=self.histories.newest(count))

    def take(self, indices: IntArray) -> Self:
        """The examples at ``indices``; ``seen`` stays whole."""
        beside: dict[str, Any] = {n: self._optional(n)[indices] for n in self._present()}
        return replace(
            self,
            histories=self.histories.take(indices),
            positives=self.positives[indices],
            users=self.users[indices],
            negatives=self.negatives[indices],
            **beside,
        )

    def with_negatives(self, candidates: CodeArray, count: int) -> Self:
        """With the first ``count`` of [P, C] ``candidates`` that their user never had.

        Examples that are left without any negative are dropped.
        """
        keys = np.sort(self.seen.rows * (1 << 32) + self.seen.items)
        unseen = ~_among(keys, self.users[:, None] * (1 << 32) + candidates) & (candidates >= 0)
        # A stable sort brings the unseen ones to the front in the order they came.
        order = np.argsort(~unseen, axis=1, kind="stable")[:, :count]
        negatives = np.where(
            np.take_along_axis(unseen, order, 1), np.take_along_axis(candidates, order, 1), -1
        )
        with_any = replace(self, negatives=negatives.astype(np.int32))
        return with_any.take(np.flatnonzero((negatives >= 0).any(axis=1)))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything in it."""
        digest = hashlib.sha256()
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
        if self.review_texts:
            digest.update(json.dumps(self.review_texts).encode())
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        """Write ``examples.safetensors`` into ``directory``, made if missing.

        Where there are reviews, their texts are ``reviews.parquet``.
        """
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(array) for name, array in self._arrays().items()}
        safetensors.numpy.save_file(arrays, directory / _FILE)
        if self.reviews is not None:
            texts = pa.table({"text": pa.array(self.review_texts, pa.string())})
            pq.write_table(texts, directory / _REVIEWS)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """The inverse of :meth:`save`."""
        arrays: dict[str, Any] = safetensors.numpy.load_file(directory / _FILE)
        histories, seen = (
            Histories(*[arrays[f"{name}.{part}"] for part in _PARTS])
            for name in ("histories", "seen")
        )
        required = (histories, arrays["positives"], arrays["users"], seen, arrays["negatives"])
        beside: dict[str, Any] = {name: arrays[name] for name in _OPTIONAL if name in arrays}
        if "reviews" in beside:
            texts = pq.read_table(directory / _REVIEWS).column("text")
            beside["review_texts"] = tuple(texts.to_pylist())
        return cls(*required, **beside)

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        arrays: dict[str, npt.NDArray[Any]] = {
            "positives": self.positives,
            "users": self.users,
            "negatives": self.negatives,
        }
        arrays |= {name: self._optional(name) for name in self._present()}
        for name, histories in (("histories", self.histories), ("seen", self.seen)):
            arrays |= {f"{name}.{part}": getattr(histories, part) for part in _PARTS}
        return arrays

    def _present(self) -> list[str]:
        return [name for name in _OPTIONAL if getattr(self, name) is not None]

    def _optional(self, name: str) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = getattr(self, name)
        return array


_OPTIONAL = ("scores", "ratings", "expected", "reviews")
_PARTS = ("items", "timestamps", "offsets")


def lists(rows: Examples) -> tuple[CodeArray, BoolArray]:
    """[B, C] codes of each example's list, the positive first, and which of them exist."""
    codes: CodeArray = np.column_stack([rows.positives, rows.negatives]).astype(np.int32)
    return codes, codes >= 0


def _before(train: Histories, events: IntArray, places: IntArray) -> Histories:
    """[P] for each event, all events of the same history before it."""
    offsets = np.zeros(len(events) + 1, dtype=np.int64)
    np.cumsum(places, out=offsets[1:])
    index = np.arange(offsets[-1]) + np.repeat(events - places - offsets[:-1], places)
    return Histories(train.items[index], train.timestamps[index], offsets)


def _repeated(train: Histories, events: IntArray, places: IntArray) -> BoolArray:
    """[P] whether an event's item came before in its history."""
    order = np.lexsort((np.arange(len(train.items)), train.items, train.rows))
    rows, items = train.rows[order], train.items[order]
    again = np.zeros(len(order), dtype=np.bool_)
    again[order[1:]] = (rows[1:] == rows[:-1]) & (items[1:] == items[:-1])
    assert len(places) == len(events)
    return again[events]


def _among(sorted_keys: IntArray, keys: IntArray) -> BoolArray:
    """Whether each of ``keys`` is one of ``sorted_keys``."""
    place = np.searchsorted(sorted_keys, keys).clip(max=max(0, len(sorted_keys) - 1))
    found: BoolArray = sorted_keys[place] == keys if len(sorted_keys) else np.zeros_like(keys, bool)
    return found
