"""``python -m benchmarks.polishing --pipeline DIR --dataset DIR``: which way of weighing holds.

Fits the sources of a pipeline anew, on the training histories without their newest events, and asks
for those: as many questions a user as there are events left out, and neither validation nor test
among them. Weights are found on the questions of one event, as ``tuning.fusion`` finds them, and
measured on those of the others. So ways to find weights can be compared without a look at test.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field
from rich.table import Table

from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import Histories
from fusionrec.data.splits import Cases, Protocol, split
from fusionrec.errors import ConfigError
from fusionrec.fusion.normalisation import Normalisation, scales
from fusionrec.fusion.objective import Objective
from fusionrec.fusion.refine import Setting, bagged, polish
from fusionrec.progress import bar, console
from fusionrec.serving.pipeline import Pipeline, Stage
from fusionrec.sources.protocol import TrainingData
from jobs.entry import run
from tuning.fusion import BEST_TRIALS, collect

K = 10


class PolishingBenchmark(JobConfig):
    """Compare ways to find the fusion's weights, on training events."""

    pipeline: Path
    """Pipeline directory with fitted sources, of a leave-one-out split; it is not changed."""
    dataset: Path
    """The data set that it was fitted on."""
    events: int = Field(default=5, ge=2)
    """Newest training events of each user that are left out and asked for."""
    trials: int = Field(default=300, ge=1)
    """Weights drawn at random in each search."""
    seeds: int = Field(default=2, ge=1)
    """Searches on the questions of each event."""


def questions(histories: Histories, events: int) -> Iterator[Cases]:
    """Of each history with more than ``events``: its newest event, the one before it, and so on."""
    (users,) = np.nonzero(histories.lengths > events)
    asked = histories.take(users)
    for age in range(events):
        yield Cases(users, asked.without_last(age + 1), asked.without_last(age).newest(1))


def objectives(config: PolishingBenchmark) -> list[Objective]:
    """One for the questions of each event, under the normalisation ``scale``."""
    dataset = Dataset.open(config.dataset)
    pipeline = Pipeline.load(config.pipeline, stages=frozenset({Stage.EMBEDDER, Stage.RETRIEVER}))
    pipeline.config.refuse_other_data(dataset, config.pipeline)
    if pipeline.config.protocol is not Protocol.LEAVE_ONE_OUT:
        raise ConfigError(f"--pipeline {config.pipeline} is of another split than leave-one-out")
    train = split(dataset).train
    left = train.without_last(config.events)
    data = TrainingData(
        dataset.catalogue,
        left,
        has_timestamps=dataset.info.has_timestamps,
        item_vectors=pipeline.item_vectors,
    )
    sources = pipeline.sources
    with bar("fitting the sources anew", len(sources)) as advance:
        for number, source in enumerate(sources):
            sources[number] = source.fit(data)
            advance(note=source.name)
    cold = np.bincount(left.items, minlength=data.num_items) == 0
    found = []
    for cases in questions(train, config.events):
        proposed = collect(pipeline, cases)
        normalised = Normalisation.SCALE, scales(proposed)
        found.append(Objective.of(proposed, cases.targets, *normalised, cold, K))
    return found


def ways(objective: Objective, trials: int, seed: int) -> dict[str, Setting]:
    """Way → the weights that it finds."""
    num_sources = len(objective.terms)
    drawn = np.random.default_rng(seed).random((trials, num_sources)).astype(np.float32)
    best = np.argsort([-objective.value(weights) for weights in drawn])[:BEST_TRIALS]
    mean = Setting.mean([Setting(drawn[number]) for number in best])
    return {
        "equal weights": Setting(np.ones(num_sources, dtype=np.float32)),
        "best trial": Setting(drawn[best[0]]),
        f"mean of the best {BEST_TRIALS}": mean,
        "polished": polish(objective, mean),
        "polished on samples of the cases": bagged(objective, mean, seed),
    }


def compare(found: list[Objective], trials: int, seeds: int) -> dict[str, tuple[float, float]]:
    """Way → NDCG on the questions that it was found on, and on those of the other events."""
    values: dict[str, list[tuple[float, float]]] = {}
    with bar("finding weights", len(found) * seeds) as advance:
        for chosen in found:
            others = [each for each in found if each is not chosen]
            for seed in range(seeds):
                for way, setting in ways(chosen, trials, seed).items():
                    point = setting.weights, setting.cold_factor
                    elsewhere = float(np.mean([each.value(*point) for each in others]))
                    values.setdefault(way, []).append((chosen.value(*point), elsewhere))
                advance()
    means = {way: np.mean(each, axis=0).tolist() for way, each in values.items()}
    return {way: (own, elsewhere) for way, (own, elsewhere) in means.items()}


def main() -> None:
    """Parse, compare, print."""
    config = parse(PolishingBenchmark)
    found = objectives(config)
    table = Table("weights", f"NDCG@{K} where they were found", "elsewhere")
    for way, (own, elsewhere) in compare(found, config.trials, config.seeds).items():
        table.add_row(way, f"{own:.4f}", f"{elsewhere:.4f}")
    console.print(table)
    sys.stdout.write(
        f"{len(found)} events of {found[0].num_cases} users; {config.seeds} searches\n"
    )


if __name__ == "__main__":
    run(main)
