"""The reranker against the fused order, by the length of the history.

Shape legend: B cases, C items of a list, R items that the reranker reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusionrec.data.histories import FloatArray
from fusionrec.data.splits import Cases
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.ranks import RealArray, list_ranks
from fusionrec.evaluation.significance import BootstrapConfig, compare
from fusionrec.evaluation.slices import LENGTH_BOUNDS
from fusionrec.fusion.model import Fused
from fusionrec.serving.pipeline import Pipeline
from tuning.reranking import BLOCK, GRID, hit_scores


@dataclass(frozen=True, slots=True)
class Lists:
    """Fused lists of B cases and what the reranker thinks of their tops, in blocks."""

    cases: Cases
    fused: tuple[Fused, ...]
    scores: tuple[FloatArray, ...]
    """[·, R] from 0 to 1; 0 in lists that hold no target."""

    @property
    def spread(self) -> float:
        """Mean difference of the fused scores over the places that are read."""
        tops = (
            fused.scores[:, : scores.shape[1]]
            for fused, scores in zip(self.fused, self.scores, strict=True)
        )
        return float(np.mean(np.concatenate([top.max(axis=1) - top.min(axis=1) for top in tops])))

    def ndcg(self, weight: float | FloatArray, k: int) -> RealArray:
        """[B] NDCG@k with the reranker's term of this weight, or these [B]; 0: the fused order."""
        weights = np.broadcast_to(np.asarray(weight, dtype=np.float32), len(self.cases))
        found, start = [], 0
        for fused, scores in zip(self.fused, self.scores, strict=True):
            rows = np.arange(len(scores))
            own = weights[start : start + len(scores), None]
            final = fused.reranked(rows, own * scores)
            targets = self.cases.targets.slice(start, start + len(scores))
            ranks = list_ranks(final.items, final.scores, targets)
            found.append(METRICS["ndcg"](ranks, k))
            start += len(scores)
        return np.concatenate(found)


def lists_of(pipeline: Pipeline, cases: Cases) -> Lists:
    """Ask fusion and reranker about ``cases``, whatever the weight that the fusion gives it."""
    fused, scores = [], []
    for start in range(0, len(cases), BLOCK):
        block = cases.histories.slice(start, min(start + BLOCK, len(cases)))
        fused.append(pipeline.recommend(block, rerank=False))
        top = fused[-1].items[:, : pipeline.config.rerank_top]
        targets = cases.targets.slice(start, start + len(block))
        scores.append(hit_scores(pipeline, block, top, targets))
    return Lists(cases, tuple(fused), tuple(scores))


def best_weight(lists: Lists, k: int) -> float:
    """The best of the gate's grid, one for all cases."""
    weights = [factor * lists.spread for factor in GRID]
    return max(weights, key=lambda each: float(lists.ndcg(each, k).mean()))


def by_length(
    chosen_on: Lists, measured_on: Lists, bootstrap: BootstrapConfig, k: int
) -> tuple[float, list[tuple[str, ...]]]:
    """The best single weight on one part, and a row for each history length of the other."""
    weight = best_weight(chosen_on, k)
    values = np.stack([measured_on.ndcg(each, k) for each in (weight, 0.0)], axis=1)
    lengths = measured_on.cases.histories.lengths
    bounds = [*LENGTH_BOUNDS[1:], np.inf]
    rows: list[tuple[str, ...]] = []
    for low, high in [(0, np.inf), *zip(LENGTH_BOUNDS, bounds, strict=True)]:
        among = (lengths >= low) & (lengths < high)
        if not among.any():
            continue
        found = compare("ndcg", ("reranked", "fused"), values[among], bootstrap)
        name = f"{low}" if high == low + 1 else f"{low}–{high - 1:.0f}"
        name = "all" if (low, high) == (0, np.inf) else name
        difference = found.difference
        rows.append(
            (
                f"{low}+" if high == np.inf and low else name,
                f"{among.sum():,}",
                f"{found.mean_b:.4f}",
                f"{found.mean_a:.4f}",
                f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]",
                f"{found.p_value:.3f}",
            )
        )
    return weight, rows
