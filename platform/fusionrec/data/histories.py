"""Histories: the one thing that a recommender is asked about.

A batch of histories is ragged and kept as CSR, so that it crosses process boundaries as a few flat
arrays. Sources, the fusion and the endpoint all work on this type; none of them knows users.

Shape legend: B histories, N events in all of them, D dimensions of a text vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]
CodeArray: TypeAlias = npt.NDArray[np.int32]
FloatArray: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Histories:
    """B histories of items, each oldest first and newest last; a history may be empty.

    ``items`` are codes: positions in the catalogue that the histories were encoded with.
    """

    items: CodeArray
    """[N] item codes, all ≥ 0."""
    timestamps: IntArray
    """[N] seconds since the epoch, ascending within a history."""
    offsets: IntArray
    """[B+1]; history b is ``items[offsets[b]:offsets[b+1]]``."""
    texts: tuple[str | None, ...] | None = None
    """B free-text wishes, where there are any."""
    vectors: FloatArray | None = None
    """[B, D] L2-normalised text vectors of the histories, added by the embedder; a row of zeros for
    a history without text."""

    def __post_init__(self) -> None:
        assert self.offsets[0] == 0
        assert self.offsets[-1] == len(self.items) == len(self.timestamps)
        assert self.texts is None or len(self.texts) == len(self)
        assert self.vectors is None or len(self.vectors) == len(self)

    @classmethod
    def of(
        cls,
        items: Iterable[Sequence[int]],
        timestamps: Iterable[Sequence[int]] | None = None,
        texts: Sequence[str | None] | None = None,
    ) -> Self:
        """From nested sequences; without timestamps, an event's position stands for its time."""
        rows = [np.asarray(row, dtype=np.int32) for row in items]
        times = (
            [np.arange(len(row), dtype=np.int64) for row in rows]
            if timestamps is None
            else [np.asarray(row, dtype=np.int64) for row in timestamps]
        )
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(
            items=np.concatenate(rows) if rows else np.empty(0, np.int32),
            timestamps=np.concatenate(times) if times else np.empty(0, np.int64),
            offsets=offsets,
            texts=None if texts is None else tuple(texts),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> IntArray:
        """[B] number of events of each history."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> IntArray:
        """[N] the history that each event belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def ages(self) -> IntArray:
        """[N] how many events of the same history are newer: 0 for the newest."""
        return np.repeat(self.offsets[1:], self.lengths) - 1 - np.arange(len(self.items))

    def row(self, index: int) -> CodeArray:
        """Item codes of one history, newest last."""
        return self.items[self.offsets[index] : self.offsets[index + 1]]

    def take(self, indices: npt.ArrayLike) -> Self:
        """The histories at ``indices``, in that order."""
        index = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[index]
        offsets = np.zeros(len(index) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        events = np.arange(offsets[-1]) + np.repeat(self.offsets[index] - offsets[:-1], lengths)
        return replace(
            self,
            items=self.items[events],
            timestamps=self.timestamps[events],
            offsets=offsets,
            texts=None if self.texts is None else tuple(self.texts[i] for i in index),
            vectors=None if self.vectors is None else self.vectors[index],
        )

    def slice(self, start: int, stop: int) -> Self:
        """Histories ``start`` to ``stop``; the arrays are views."""
        first, last = self.offsets[start], self.offsets[stop]
        return replace(
            self,
            items=self.items[first:last],
            timestamps=self.timestamps[first:last],
            offsets=self.offsets[start : stop + 1] - first,
            texts=None if self.texts is None else self.texts[start:stop],
            vectors=None if self.vectors is None else self.vectors[start:stop],
        )

    def newest(self, count: int) -> Self:
        """Only the newest ``count`` events of each history."""
        keep = self.ages < count
        offsets = np.zeros_like(self.offsets)
        np.cumsum(np.minimum(self.lengths, count), out=offsets[1:])
        return replace(
            self, items=self.items[keep], timestamps=self.timestamps[keep], offsets=offsets
        )

    def without_last(self, count: int = 1) -> Self:
        """Each history without its ``count`` newest events (or empty, where it is shorter)."""
        keep = self.ages >= count
        offsets = np.zeros_like(self.offsets)
        np.cumsum(np.maximum(self.lengths - count, 0), out=offsets[1:])
        return replace(
            self, items=self.items[keep], timestamps=self.timestamps[keep], offsets=offsets
        )

    def with_vectors(self, vectors: FloatArray | None) -> Self:
        """The same histories with [B, D] text vectors."""
        return replace(self, vectors=vectors)
