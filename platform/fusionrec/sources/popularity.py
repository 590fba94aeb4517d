"""Time-decayed popularity, as it stood when the question was asked.

    score(i, t) = log(1 + Σ 2^(−(t − time(e)) / half-life))     over training events e of i until t

``t`` is the time of the newest event of the history; a history without events is asked now, at the
end of the training data. The sums are kept at ``snapshots`` moments (quantiles of the training
events' times), and a history is answered from the last moment that is not after its own, so nothing
that happened later enters its answer. Data without times has one snapshot, of plain counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field

from fusionrec.config import Config
from fusionrec.data.histories import CodeArray, FloatArray, Histories, IntArray
from fusionrec.retrieval.neighbours import blocks, gather, top_of_dense
from fusionrec.sources.protocol import Ranked, TrainingData


class PopularityConfig(Config):
    """Settings of :class:`Popularity`."""

    half_life_days: float = Field(default=365.0, gt=0)
    """After which an event counts half."""
    snapshots: int = Field(default=64, ge=1)
    """Moments at which the popularity of every item is kept."""


class Popularity:
    """Scores items by how often they were chosen of late."""

    name = "popularity"

    def __init__(
        self,
        config: PopularityConfig | None = None,
        times: IntArray | None = None,
        scores: FloatArray | None = None,
    ) -> None:
        self.config = config or PopularityConfig()
        self._times = times
        self._scores = scores

    def fit(self, data: TrainingData) -> Self:
        """Sum once over the events, by time. Memory: 4 · snapshots · I bytes."""
        histories = data.histories
        if not data.has_timestamps or not len(histories.items):
            counts = np.bincount(histories.items, minlength=data.num_items)
            return type(self)(
                self.config,
                np.array([np.iinfo(np.int64).min]),
                np.log1p(counts, dtype=np.float32)[None],
            )
        order = np.argsort(histories.timestamps, kind="stable")
        events, items = histories.timestamps[order], histories.items[order]
        last = (np.arange(1, self.config.snapshots + 1) * len(events)) // self.config.snapshots - 1
        times = np.unique(events[np.maximum(last, 0)])
        half_life_s = self.config.half_life_days * 86_400
        scores = np.zeros((len(times), data.num_items), dtype=np.float32)
        running = np.zeros(data.num_items)
        previous, done = times[0], 0
        for row, time in enumerate(times):
            stop = int(np.searchsorted(events, time, side="right"))
            running *= 2.0 ** (-(time - previous) / half_life_s)
            weights = 2.0 ** (-(time - events[done:stop]) / half_life_s)
            running += np.bincount(items[done:stop], weights, minlength=data.num_items)
            scores[row] = np.log1p(running)
            previous, done = time, stop
        return type(self)(self.config, times, scores)

    def top(self, histories: Histories, k: int) -> Ranked:
        """The most popular items at the time of each history."""
        moments, (_, scores) = self._moments(histories), self._fitted
        items = np.full((len(histories), k), -1, dtype=np.int32)
        values = np.zeros((len(histories), k), dtype=np.float32)
        for moment in np.unique(moments):
            (rows,) = np.nonzero(moments == moment)
            asked = histories.take(rows)
            # The history's items are among the first k + length at worst.
            depth = k + int(asked.lengths.max(initial=0))
            head, head_scores = top_of_dense(scores[moment][None], Histories.of([[]]), depth)
            for row in rows.tolist():
                new = ~np.isin(head[0], histories.row(row)) & (head[0] >= 0)
                best = head[0][new][:k]
                items[row, : len(best)] = best
                values[row, : len(best)] = head_scores[0][new][:k]
        return Ranked(items, values)

    def score(self, histories: Histories, candidates: CodeArray) -> FloatArray:
        """[B, C] scores of ``candidates``."""
        _, scores = self._fitted
        moments = self._moments(histories)
        result = np.zeros(candidates.shape, dtype=np.float32)
        for start, stop in blocks(len(histories), scores.shape[1]):
            result[start:stop] = gather(scores[moments[start:stop]], candidates[start:stop])
        return result

    def save(self, directory: Path) -> None:
        """Write ``config.json``, ``times.npy`` and ``scores.npy``."""
        directory.mkdir(parents=True, exist_ok=True)
        times, scores = self._fitted
        np.save(directory / "times.npy", times, allow_pickle=False)
        np.save(directory / "scores.npy", scores, allow_pickle=False)
        (directory / "config.json").write_text(self.config.model_dump_json(indent=2))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the settings, memory-map the scores."""
        return cls(
            PopularityConfig.model_validate_json((directory / "config.json").read_bytes()),
            np.load(directory / "times.npy", allow_pickle=False),
            np.load(directory / "scores.npy", mmap_mode="r", allow_pickle=False),
        )

    @property
    def _fitted(self) -> tuple[IntArray, FloatArray]:
        assert self._times is not None
        assert self._scores is not None
        return self._times, self._scores

    def _moments(self, histories: Histories) -> IntArray:
        """[B] the snapshot that answers each history."""
        times, _ = self._fitted
        newest = np.full(len(histories), np.iinfo(np.int64).max)
        asked = histories.lengths > 0
        newest[asked] = histories.timestamps[histories.offsets[1:][asked] - 1]
        return np.maximum(np.searchsorted(times, newest, side="right") - 1, 0)
