"""Time of the learned fusion beside the linear one, and of its explanations beside TreeSHAP's.

``python -m benchmarks.learned_fusion`` grows trees of the default size on made-up candidates of
seven sources and prints milliseconds a history: the median of repeated calls with one history and
with a batch, in one thread.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from pydantic import Field
from rich.table import Table

from fusionrec.config import JobConfig, parse
from fusionrec.data.histories import Histories
from fusionrec.fusion.candidates import Candidates
from fusionrec.fusion.features import ItemStatistics
from fusionrec.fusion.lambdarank import LambdaRank, LambdaRankConfig
from fusionrec.fusion.model import Fusion, Segment, fuse
from fusionrec.progress import console
from jobs.entry import run

SOURCES = tuple(f"source {number}" for number in range(7))
ITEMS = 10_000
CASES = 500


def made_up(width: int, seed: int) -> tuple[Candidates, Histories]:
    """``CASES`` cases of ``width`` candidates, whose targets the sources tend to like."""
    generator = np.random.default_rng(seed)
    drawn = [generator.choice(ITEMS, width, replace=False) for _ in range(CASES)]
    items = np.sort(np.stack(drawn), axis=1).astype(np.int32)
    scores = generator.pareto(2, (len(SOURCES), *items.shape)).astype(np.float32)
    scores *= generator.random(scores.shape) < 0.4  # most sources know little of most candidates
    target = generator.integers(0, width, CASES)
    rows = np.arange(CASES)
    liked = generator.pareto(1, (len(SOURCES), CASES)).astype(np.float32)
    scores[:, rows, target] += liked
    candidates = Candidates(items, scores, generator.integers(1, 50, CASES))
    return candidates, Histories.of(items[rows, target][:, None])


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median of ``repeats`` calls, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


def measure(width: int, repeats: int) -> Table:
    """The table that is printed."""
    candidates, targets = made_up(width, seed=0)
    ones = dict.fromkeys(SOURCES, 1.0)
    linear = Fusion(sources=SOURCES, scales=ones, segments=(Segment(weights=ones),))
    items = ItemStatistics(np.random.default_rng(1).integers(0, 100, ITEMS), None)
    newest, config = np.zeros(CASES, dtype=np.int64), LambdaRankConfig()
    learned = LambdaRank.fit(linear, candidates, targets, newest, items, config, seed=0)
    cold = items.counts == 0
    num_features = learned.trees.booster.num_feature()
    table = Table("histories", "linear, ms", "lambdarank, ms", "its trees, ms", "TreeSHAP, ms")
    for count in (1, 32):
        block = candidates.take(np.arange(count))
        rows = np.random.default_rng(2).random((count * config.depth, num_features))
        read = rows.astype(np.float32)
        shap = partial(learned.trees.booster.predict, read, pred_contrib=True, num_threads=1)
        spent = (
            milliseconds(partial(fuse, linear, block, cold), repeats),
            milliseconds(partial(learned.fuse, block, newest[:count], cold), repeats),
            milliseconds(partial(learned.trees.terms, read), repeats),
            milliseconds(shap, max(3, repeats // 20)),
        )
        table.add_row(str(count), *(f"{each / count:.2f}" for each in spent))
    return table


class LearnedFusionBenchmark(JobConfig):
    """Measure the learned fusion beside the linear one."""

    candidates: int = Field(default=600, ge=1)
    """Of a history."""
    repeats: int = Field(default=100, ge=1)
    """Calls that a median is taken of."""


def main() -> None:
    """Parse, measure, print."""
    config = parse(LearnedFusionBenchmark)
    console.print(measure(config.candidates, config.repeats))
    sys.stdout.write(f"{config.candidates} candidates; milliseconds a history, one thread\n")


if __name__ == "__main__":
    run(main)
