"""Time-decayed popularity, as it stood when the question was asked.

    score(i, t) = log(1 + Σ 2^(−(t − time(e)) / half-life))     over training events e of i until t

``t`` is the time of the newest event of the history; a history without events is asked now, at the
end of the training data. The sums are kept at ``snapshots`` moments (quantiles of the training
events' times), and a history is answered from the last moment that is not after its own, so nothing
that happened later enters its answer. Data without times has one snapshot, of plain counts.

The first items of each snapshot are kept in order, so that an answer costs no look at all items.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import Field

from fusionrec.config import Config
from fusionrec.data.histories import CodeArray, FloatArray, Histories, IntArray
from fusionrec.retrieval.halves import Stored, single
from fusionrec.retrieval.lists import empty
from fusionrec.retrieval.neighbours import top_of_dense
from fusionrec.retrieval.rows import DENSE_WIDTH
from fusionrec.sources.protocol import Answer, Ranked, TrainingData
from fusionrec.space import Range

_HEAD = 1000
"""Items of each snapshot that are kept in order."""


class PopularityConfig(Config):
    """Settings of :class:`Popularity`."""

    half_life_days: Annotated[float, Range(7, 3650, log=True)] = Field(default=180.0, gt=0)
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
        scores: Stored | None = None,
        head: CodeArray | None = None,
    ) -> None:
        self.config = config or PopularityConfig()
        self._times = times
        self._scores = scores
        self._head = head

    def fit(self, data: TrainingData) -> Self:
        """Sum once over the events, by time.

        Memory: 4 · snapshots · I bytes; of that, what is kept is half where I is large.
        """
        histories = data.histories
        if not data.has_timestamps or not len(histories.items):
            counts = np.bincount(histories.items, minlength=data.num_items)
            return self._of(
                np.array([np.iinfo(np.int64).min]), np.log1p(counts, dtype=np.float32)[None]
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
        return self._of(times, scores)

    def ask(self, histories: Histories) -> Answer:
        """Find the snapshot that answers each history."""
        times, scores, head = self._fitted
        newest = np.full(len(histories), np.iinfo(np.int64).max)
        asked = histories.lengths > 0
        newest[asked] = histories.timestamps[histories.offsets[1:][asked] - 1]
        moments = np.maximum(np.searchsorted(times, newest, side="right") - 1, 0)
        return _AtMoments(histories, moments, scores, head)

    def top(self, histories: Histories, k: int) -> Ranked:
        """The most popular items at the time of each history."""
        return self.ask(histories).top(k)

    def score(self, histories: Histories, candidates: CodeArray) -> FloatArray:
        """[B, C] scores of ``candidates``."""
        return self.ask(histories).score(candidates)

    def save(self, directory: Path) -> None:
        """Write ``config.json``, ``times.npy``, ``scores.npy`` and ``head.npy``."""
        directory.mkdir(parents=True, exist_ok=True)
        times, scores, head = self._fitted
        np.save(directory / "times.npy", times, allow_pickle=False)
        np.save(directory / "scores.npy", scores, allow_pickle=False)
        np.save(directory / "head.npy", head, allow_pickle=False)
        (directory / "config.json").write_text(self.config.model_dump_json(indent=2))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the settings, memory-map the scores."""
        return cls(
            PopularityConfig.model_validate_json((directory / "config.json").read_bytes()),
            np.load(directory / "times.npy", allow_pickle=False),
            np.load(directory / "scores.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray),
            np.load(directory / "head.npy", allow_pickle=False),
        )

    def _of(self, times: IntArray, scores: FloatArray) -> Self:
        count = min(_HEAD, scores.shape[1])
        rows = [top_of_dense(row[None], Histories.of([[]]), count)[0] for row in scores]
        # In float16, logarithms of counts tell counts apart that differ by a percent.
        stored = scores if scores.shape[1] <= DENSE_WIDTH else scores.astype(np.float16)
        return type(self)(self.config, times, stored, np.concatenate(rows))

    @property
    def _fitted(self) -> tuple[IntArray, Stored, CodeArray]:
        assert self._times is not None
        assert self._scores is not None
        assert self._head is not None
        return self._times, self._scores, self._head


@dataclass(frozen=True, slots=True)
class _AtMoments:
    """B histories, each at one of T moments."""

    histories: Histories
    moments: IntArray
    """[B]"""
    scores: Stored
    """[T, I]"""
    head: CodeArray
    """[T, H] the best items of each moment, −1 behind."""

    def top(self, k: int) -> Ranked:
        items, values = empty(len(self.histories), k)
        for row, moment in enumerate(self.moments.tolist()):
            seen, head = self.histories.row(row), self.head[moment]
            best = head[(head >= 0) & ~np.isin(head, seen)][:k]
            if len(best) < k and len(head) < self.scores.shape[1] and head[-1] >= 0:
                alone = self.histories.slice(row, row + 1)
                all_scores = single(self.scores[moment])[None]
                best = top_of_dense(all_scores, alone, k)[0][0]
                best = best[best >= 0]
            items[row, : len(best)] = best
            values[row, : len(best)] = self.scores[moment, best]
        return Ranked(items, values)

    def score(self, candidates: CodeArray) -> FloatArray:
        found = self.scores[self.moments[:, None], np.maximum(candidates, 0)]
        return np.where(candidates >= 0, found, np.float32(0))
