"""What language models make of the heads of fused lists: alone, and beside the fusion.

A model reads the lists that hold a target within the places that are reranked; the others are worth
0 in its order alone, and what they are in the fused order beside it.

Shape legend: B cases, R places that are reranked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from benchmarks.harness.reranking import Lists, best_weight
from fusionrec.data.histories import CodeArray, FloatArray, Histories, IntArray
from fusionrec.data.splits import Cases
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.ranks import RealArray, hit_lists, list_ranks
from fusionrec.evaluation.significance import BootstrapConfig, Estimate, bootstrap_means, estimate
from fusionrec.fusion.model import Fused, Fusion
from fusionrec.language.encoder import Encoder
from fusionrec.language.precision import Precision
from fusionrec.language.rankers import load_reranker
from fusionrec.serving.pipeline import Pipeline
from jobs.distilled import nearness
from tuning.reranking import BLOCK, GRID, gated

TOGETHER = 16
"""Lists that are read together, as at an endpoint with some load."""

Score: TypeAlias = Callable[[Histories, CodeArray], FloatArray]


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder, and how it is loaded."""

    folder: Path
    kind: Literal["encoder", "reranker"]
    precision: Precision = Precision.AUTO

    def load(self) -> Any:
        """As it is served, but in int8 without peaks: an encoder as a reranker by its cosines."""
        if self.kind == "reranker":
            return load_reranker(self.folder, precision=self.precision, frozen=True)
        return Cosines(Encoder.load(self.folder, precision=self.precision, frozen=True))

    @property
    def num_weights(self) -> int:
        """Of all layers, embeddings and head."""
        # Not as it is served, where weights may be packed for the kernels.
        load = load_reranker if self.kind == "reranker" else Encoder.load
        return sum(weight.numel() for weight in load(self.folder).model.parameters())

    @property
    def mib(self) -> float:
        """Of the weights on disk, from which int8 is made when they are loaded."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors")) / 2**20


class Cosines:
    """An encoder in a reranker's place."""

    reads_lists = False

    def __init__(self, encoder: Encoder) -> None:
        self.model, self.config = encoder.model, encoder.config
        self.score = partial(nearness, encoder)


@dataclass(frozen=True, slots=True)
class Reading:
    """What one model said of the lists of one part."""

    scores: FloatArray
    """[B, R] from 0 to 1; 0 in lists that hold no target."""
    ms: float
    """Milliseconds of a list, texts and tokens included: the median over blocks of lists."""


class Heads:
    """The fused lists of a part's cases."""

    def __init__(self, pipeline: Pipeline, cases: Cases) -> None:
        self._pipeline, self.cases = pipeline, cases
        self._fused = Fused.join(
            [
                pipeline.recommend(
                    cases.histories.slice(start, min(start + BLOCK, len(cases))), rerank=False
                )
                for start in range(0, len(cases), BLOCK)
            ]
        )
        self._head = self._fused.head(pipeline.config.rerank_top)
        self.hits = hit_lists(self._head.items, cases.targets)
        """Rows of the lists that hold a target."""

    def read(self, reranker: Any) -> Reading:
        """Let a model read the lists that hold a target."""
        self._pipeline.reranker = reranker
        scores = np.zeros(self._head.items.shape, dtype=np.float32)
        seconds = []
        self._scores(self.hits[:1])  # the first takes longer
        for start in range(0, len(self.hits), TOGETHER):
            rows = self.hits[start : start + TOGETHER]
            began = time.perf_counter()
            scores[rows] = self._scores(rows)
            seconds.append((time.perf_counter() - began) / len(rows))
        # A mean would count what else the machine does.
        return Reading(scores, 1e3 * float(np.median(seconds)))

    def _scores(self, rows: IntArray) -> FloatArray:
        return self._pipeline.rerank_scores(self.cases.histories.take(rows), self._head.items[rows])

    def shown(self, count: int) -> tuple[Score, Histories, CodeArray]:
        """How the model that read last scores, and what of the first ``count`` lists it read."""
        rows = self.hits[:count]
        found = self.cases.histories.take(rows), self._head.items[rows]
        return self._pipeline.rerank_scores, *found

    def fused(self, k: int) -> RealArray:
        """[B] NDCG@k of the head in the fused order."""
        return self._ndcg(self._head.scores, k)

    def alone(self, scores: FloatArray, k: int) -> RealArray:
        """[B] NDCG@k of the head in the order of ``scores``; where these are equal, as fused."""
        told = np.ptp(scores, axis=1, keepdims=True) > 0
        return self._ndcg(np.where(told, scores, self._head.scores), k)

    def lists(self, scores: FloatArray) -> Lists:
        """For weighing."""
        return Lists(self.cases, (self._fused,), (scores,))

    def _ndcg(self, scores: FloatArray, k: int) -> RealArray:
        ranks = list_ranks(self._head.items, scores, self.cases.targets)
        return METRICS["ndcg"](ranks, k)


@dataclass(frozen=True, slots=True)
class Weighed:
    """Test lists reranked with weights that were found on validation."""

    weight: float
    """The best single one."""
    best: RealArray
    """[B] NDCG with that."""
    gates: dict[str, float]
    """By segment, as ``tuning.reranking`` gives them."""
    gated: RealArray
    """[B] NDCG with these."""


def weighed(fusion: Fusion, chosen_on: Lists, measured_on: Lists, seed: int, k: int) -> Weighed:
    """Find weights on one part, measure on the other."""
    weight = best_weight(chosen_on, k)
    grid = (np.array(GRID) * chosen_on.spread).astype(np.float32)
    before = chosen_on.ndcg(0.0, k)
    gains = np.stack([chosen_on.ndcg(each, k) - before for each in grid.tolist()], axis=1)
    lengths = chosen_on.cases.histories.lengths
    found = gated(fusion, lengths, gains.astype(np.float32), grid, seed)
    given = found.reranked(measured_on.cases.histories.lengths)
    return Weighed(
        weight,
        measured_on.ndcg(weight, k),
        {name: row["reranker"] for name, row in found.table().items()},
        measured_on.ndcg(given, k),
    )


def kept(
    student: RealArray, teacher: RealArray, untouched: RealArray, config: BootstrapConfig
) -> Estimate | None:
    """(student − untouched) / (teacher − untouched) in the mean over the same [B] cases.

    Returns:
        None where the teacher's gain is not above 0 in 19 of 20 draws, or in the mean.
    """
    values = np.stack([student - untouched, teacher - untouched], axis=1)
    draws = bootstrap_means(values, config)
    mean = values.mean(axis=0)
    if mean[1] <= 0 or np.quantile(draws[:, 1], 0.05) <= 0:
        return None
    told = draws[draws[:, 1] > 0]
    return estimate(float(mean[0] / mean[1]), told[:, 0] / told[:, 1], config.level)
