"""Weigh the reranker: per segment, and 0 where it does not help on cases that did not choose.

The weight multiplies the reranker's term over the top of the fused list. Every weight of a grid is
measured on the same reranked validation cases, so the language model reads each list once; and
those alone in whose top a target is: the others gain nothing under any weight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import Field

from fusionrec.bundles.gate import forget_measurements
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import BoolArray, CodeArray, FloatArray, Histories, IntArray
from fusionrec.data.splits import Cases, split
from fusionrec.errors import ConfigError
from fusionrec.evaluation.ranks import hit_lists
from fusionrec.fusion.model import Fused, Fusion
from fusionrec.fusion.refine import holds_out
from fusionrec.progress import bar
from fusionrec.serving.pipeline import Pipeline
from jobs.entry import run

GRID = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5)
"""Weights tried, relative to the mean spread of fused scores over the places that are read."""
BLOCK = 64
"""Histories that travel through the pipeline together."""


class RerankingCampaign(JobConfig):
    """Find the reranker's weight in each segment, on the validation cases."""

    pipeline: Path
    """Pipeline directory with fusion.json and reranker/; fusion.json is replaced."""
    dataset: Path
    """The data set that it was fitted on."""
    max_cases: int = Field(default=600, ge=50)
    """Validation cases that are reranked; more are sampled."""
    k: int = Field(default=10, ge=1)
    """Length of the lists whose NDCG counts."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sample and of the halves."""


def weigh(config: RerankingCampaign) -> Fusion:
    """The pipeline's fusion with a reranker weight in every segment that it helps.

    Cost: ``rerank_top`` texts through the reranker for each of ``max_cases`` whose list holds a
    target there.

    Raises:
        ConfigError: the pipeline has no reranker, or was fitted on another data set.
    """
    pipeline = Pipeline.load(config.pipeline)
    if pipeline.reranker is None:
        raise ConfigError(
            f"--pipeline {config.pipeline} has no reranker: run `python -m jobs.finetune "
            "--task reranker` first"
        )
    dataset = Dataset.open(config.dataset)
    pipeline.config.refuse_other_data(dataset, config.pipeline)
    validation = split(dataset, pipeline.config.protocol).validation
    cases = validation.sample(config.max_cases, config.seed)
    fusion = pipeline.fusion
    read = []
    with bar("weighing the reranker", len(cases)) as advance:
        for start in range(0, len(cases), BLOCK):
            read.append(_read(pipeline, cases, start))
            advance(len(read[-1][0]))
    spread = float(np.mean(np.concatenate([r[0] for r in read])))
    grid = (np.array(GRID) * spread).astype(np.float32)
    gains = np.concatenate([_gains(r[1], r[2], r[3], grid, config.k) for r in read])
    fusion = gated(fusion, cases.histories.lengths, gains, grid, config.seed)
    fusion.save(config.pipeline / "fusion.json")
    forget_measurements(config.pipeline)
    return fusion


def gated(
    fusion: Fusion, lengths: IntArray, gains: FloatArray, grid: FloatArray, seed: int
) -> Fusion:
    """``fusion`` with the best weight in every segment where it gains on cases that did not choose.

    Args:
        fusion: whose segments are weighed.
        lengths: [B] of the cases' histories.
        gains: [B, W] NDCG gained over the fused order under each weight.
        grid: [W] the weights.
        seed: of the halves.
    """
    segment_of = fusion.segment_of(lengths)
    segments = []
    for index, segment in enumerate(fusion.segments):
        among = segment_of == index

        def choose(chosen: BoolArray) -> Callable[[BoolArray], FloatArray]:
            best = int(gains[chosen].mean(axis=0).argmax())
            return lambda asked: gains[asked, best]

        helps = holds_out(len(lengths), choose, among, seed)
        weight = float(grid[int(gains[among].mean(axis=0).argmax())]) if helps else 0.0
        segments.append(segment.model_copy(update={"reranker": round(weight, 6)}))
    return fusion.model_copy(update={"segments": tuple(segments)})


def hit_scores(
    pipeline: Pipeline, histories: Histories, items: CodeArray, targets: Histories
) -> FloatArray:
    """[B, R] the reranker's scores of ``items`` [B, R] from 0 to 1; 0 where they hold no target.

    There the term lifts what stands above the targets anyway, so that their ranks stay.
    """
    scores = np.zeros(items.shape, dtype=np.float32)
    rows = hit_lists(items, targets)
    if len(rows):
        scores[rows] = pipeline.rerank_scores(histories.take(rows), items[rows])
    return scores


def _read(
    pipeline: Pipeline, cases: Cases, start: int
) -> tuple[FloatArray, Fused, FloatArray, Cases]:
    """Spread of the fused scores, fused lists, reranker scores and cases of one block."""
    block = cases.take(np.arange(start, min(start + BLOCK, len(cases))))
    fused = pipeline.recommend(block.histories, rerank=False)
    top = fused.items[:, : pipeline.config.rerank_top]
    scores = hit_scores(pipeline, block.histories, top, block.targets)
    spread = np.ptp(fused.scores[:, : scores.shape[1]], axis=1)
    return spread.astype(np.float32), fused, scores, block


def _gains(fused: Fused, scores: FloatArray, cases: Cases, grid: FloatArray, k: int) -> FloatArray:
    """[B, len(grid)] NDCG@k gained over the fused order under each weight."""
    return np.stack(
        [
            _ndcg(fused, scores * weight, cases, k) - _ndcg(fused, scores * 0, cases, k)
            for weight in grid
        ],
        axis=1,
    )


def _ndcg(fused: Fused, term: FloatArray, cases: Cases, k: int) -> FloatArray:
    """[B] NDCG@k after adding ``term`` [B, R] to the first R places."""
    depth = term.shape[1]
    total = fused.scores.copy()
    total[:, :depth] += term
    total[fused.items < 0] = -np.inf
    result = np.zeros(len(cases), dtype=np.float32)
    lengths = cases.targets.lengths
    for position in range(int(lengths.max(initial=0))):
        (rows,) = np.nonzero(lengths > position)
        target = cases.targets.items[cases.targets.offsets[rows] + position]
        hit = fused.items[rows] == target[:, None]
        found = hit.any(axis=1)
        own = np.where(hit, total[rows], -np.inf).max(axis=1)
        tied = np.maximum((total[rows] == own[:, None]).sum(axis=1) - 1, 0)
        rank = 1 + (total[rows] > own[:, None]).sum(axis=1) + tied / 2
        result[rows] += np.where(found & (rank <= k), 1 / np.log2(rank + 1), 0)
    ideal = np.cumsum(1 / np.log2(np.arange(2, k + 2)))[np.minimum(lengths, k) - 1]
    return np.asarray(result / ideal, dtype=np.float32)


def main() -> None:
    """Parse, weigh, report."""
    config = parse(RerankingCampaign)
    for segment, row in weigh(config).table().items():
        sys.stdout.write(f"{segment}: reranker weight {row['reranker']:.4f}\n")


if __name__ == "__main__":
    run(main)
