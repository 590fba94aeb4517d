"""``python -m benchmarks.polishing --pipeline DIR --dataset DIR``: which way of weighing holds.

Fits the sources of a pipeline anew, on the training histories without their newest events, and asks
for those: as many questions a user as there are events left out, and neither validation nor test
among them. Weights are found on the questions of one event, as ``tuning.fusion`` finds them, and
measured on those of the others. So ways to find weights can be compared without a look at test.
Where sources are turned off, what only they proposed is gone.

Shape legend: S sources, B questions, C candidates.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field
from rich.table import Table

from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import BoolArray, FloatArray, Histories
from fusionrec.data.splits import Cases, Protocol, split
from fusionrec.errors import ConfigError
from fusionrec.fusion.candidates import Candidates
from fusionrec.fusion.normalisation import Normalisation, scales
from fusionrec.fusion.objective import Objective
from fusionrec.fusion.refine import Setting, bagged, polish, polished, trusted
from fusionrec.progress import bar, console
from fusionrec.serving.pipeline import Pipeline, Stage
from fusionrec.sources.protocol import TrainingData
from jobs.entry import run
from tuning.fusion import BEST_TRIALS
from tuning.tradeoff import collect

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
    max_cases: int = Field(default=5_000, ge=100)
    """Users that are asked about; more are sampled."""


def questions(histories: Histories, events: int) -> Iterator[Cases]:
    """Of each history with more than ``events``: its newest event, the one before it, and so on."""
    (users,) = np.nonzero(histories.lengths > events)
    asked = histories.take(users)
    for age in range(events):
        yield Cases(users, asked.without_last(age + 1), asked.without_last(age).newest(1))


class Asked:
    """The questions of one event, and what the sources say to them."""

    def __init__(
        self, found: Candidates, proposed: BoolArray, targets: Histories, cold: BoolArray
    ) -> None:
        """``proposed`` [S, B, C]: by which source; ``cold`` [I]."""
        self._found, self._proposed, self._targets, self._cold = found, proposed, targets, cold
        self._scales = scales(found)
        self._known: dict[bytes, Objective] = {}

    def __len__(self) -> int:
        return len(self._found)

    def objective(self, keep: BoolArray) -> Objective:
        """Under the normalisation ``scale``, where the sources ``keep`` [S] alone are asked."""
        key = keep.tobytes()
        if key not in self._known:
            items = np.where(self._proposed[keep].any(axis=0), self._found.items, -1)
            self._known[key] = Objective.of(
                Candidates(items.astype(np.int32), self._found.scores[keep], self._found.lengths),
                self._targets,
                Normalisation.SCALE,
                self._scales[keep],
                self._cold,
                K,
            )
        return self._known[key]


@dataclass(frozen=True, slots=True)
class Found:
    """What a way to find weights found."""

    setting: Setting
    keep: BoolArray
    """[S] the sources that it weighs."""

    def value(self, asked: Asked) -> float:
        """NDCG@k."""
        objective = asked.objective(self.keep)
        return objective.value(self.setting.weights, self.setting.cold_factor)


@dataclass(frozen=True, slots=True)
class Row:
    """What a way is worth, the mean over events and searches."""

    own: float
    """NDCG on the questions that it was found on."""
    elsewhere: float
    """NDCG on those of the other events."""
    off: FloatArray
    """[S] share of the searches in which a source was off."""


def material(config: PolishingBenchmark) -> tuple[tuple[str, ...], list[Asked]]:
    """Names of the sources, and the questions of each event."""
    dataset = Dataset.open(config.dataset)
    stages = frozenset({Stage.EMBEDDER, Stage.RETRIEVER})
    pipeline = Pipeline.load(config.pipeline, stages=stages, weighed=False)
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
    with bar("asking them", config.events) as advance:
        for cases in questions(train, config.events):
            some = cases.sample(config.max_cases, 0)
            histories = pipeline.embed(some.histories)
            proposed = collect(sources, histories, pipeline.config.candidates, pipeline.rules)
            found.append(Asked(*proposed, some.targets, cold))
            advance()
    return tuple(source.name for source in sources), found


def ways(asked: Asked, num_sources: int, trials: int, seed: int) -> dict[str, Found]:
    """Way → the weights that it finds."""
    every = np.ones(num_sources, dtype=np.bool_)
    objective = asked.objective(every)
    drawn = np.random.default_rng(seed).random((trials, num_sources)).astype(np.float32)
    best = np.argsort([-objective.value(weights) for weights in drawn])[:BEST_TRIALS]
    mean = Setting.mean([Setting(drawn[number]) for number in best])
    samples = polished(objective, mean, seed)
    settings = {
        "equal weights": Setting(np.ones(num_sources, dtype=np.float32)),
        "best trial": Setting(drawn[best[0]]),
        f"mean of the best {BEST_TRIALS}": mean,
        "polished": polish(objective, mean),
        "polished on samples of the cases": Setting.mean(samples),
    }
    keep = trusted(samples)
    fewer = bagged(asked.objective(keep), mean.of_sources(keep), seed)
    return {
        **{way: Found(setting, every) for way, setting in settings.items()},
        "the same, without what they distrust": Found(fewer, keep),
    }


def compare(found: list[Asked], num_sources: int, trials: int, seeds: int) -> dict[str, Row]:
    """Way → what it is worth."""
    rows: dict[str, list[Row]] = {}
    with bar("finding weights", len(found) * seeds) as advance:
        for chosen in found:
            others = [each for each in found if each is not chosen]
            for seed in range(seeds):
                for way, each in ways(chosen, num_sources, trials, seed).items():
                    elsewhere = float(np.mean([each.value(other) for other in others]))
                    off = (~each.keep).astype(np.float32)
                    rows.setdefault(way, []).append(Row(each.value(chosen), elsewhere, off))
                advance()
    return {
        way: Row(
            float(np.mean([row.own for row in every])),
            float(np.mean([row.elsewhere for row in every])),
            np.mean([row.off for row in every], axis=0),
        )
        for way, every in rows.items()
    }


def main() -> None:
    """Parse, compare, print."""
    config = parse(PolishingBenchmark)
    names, found = material(config)
    table = Table("weights", f"NDCG@{K} where they were found", "elsewhere", "off, of the searches")
    for way, row in compare(found, len(names), config.trials, config.seeds).items():
        off = [f"{name} {share:.0%}" for name, share in zip(names, row.off, strict=True) if share]
        table.add_row(way, f"{row.own:.4f}", f"{row.elsewhere:.4f}", ", ".join(off))
    console.print(table)
    sys.stdout.write(f"{len(found)} events of {len(found[0])} users; {config.seeds} searches\n")


if __name__ == "__main__":
    run(main)
