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

from benchmarks.harness.candidates import made_up
from fusionrec.config import JobConfig, parse
from fusionrec.fusion.features import ItemStatistics
from fusionrec.fusion.lambdarank import LambdaRank, LambdaRankConfig
from fusionrec.fusion.model import Fusion, Segment, fuse
from fusionrec.progress import console
from jobs.entry import run

CASES = 500


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
    material = made_up(CASES, width, seed=0)
    candidates, cold = material.candidates, material.cold
    ones = dict.fromkeys(material.sources, 1.0)
    linear = Fusion(sources=material.sources, scales=ones, segments=(Segment(weights=ones),))
    counts = np.random.default_rng(1).integers(1, 100, len(cold))
    items = ItemStatistics(np.where(cold, 0, counts), None)
    newest, config = np.zeros(CASES, dtype=np.int64), LambdaRankConfig()
    learned = LambdaRank.fit(linear, candidates, material.targets, newest, items, config, seed=0)
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
