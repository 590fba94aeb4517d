"""Candidates to fuse: of a data set's validation cases, or made up."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import BoolArray, Histories
from fusionrec.data.ingest import IngestConfig, ingest
from fusionrec.data.splits import split
from fusionrec.fusion.candidates import Candidates
from fusionrec.serving.pipeline import Pipeline, Stage
from jobs.fit import FitConfig, fit
from tuning.fusion import collect


@dataclass(frozen=True, slots=True)
class Material:
    """What a fusion is searched on."""

    sources: tuple[str, ...]
    candidates: Candidates
    targets: Histories
    """[B]"""
    cold: BoolArray
    """[I] whether an item has no training events."""


def of_data(data: Path, folder: Path) -> Material:
    """The validation cases of raw data, split leave-one-out, by the sources that fit quickly."""
    dataset, pipeline = folder / "dataset", folder / "pipeline"
    shutil.rmtree(folder, ignore_errors=True)
    ingest(IngestConfig(raw=data, out=dataset))
    fit(FitConfig(dataset=dataset, pipeline=pipeline))
    fitted = Pipeline.load(pipeline, stages=frozenset({Stage.EMBEDDER, Stage.RETRIEVER}))
    cases = split(Dataset.open(dataset)).validation
    cold = fitted.item_counts == 0
    return Material(fitted.config.sources, collect(fitted, cases), cases.targets, cold)


def made_up(
    num_cases: int, width: int, seed: int, num_sources: int = 7, num_items: int = 10_000
) -> Material:
    """Cases of ``width`` candidates; the sources tend to like the target, which is among them."""
    generator = np.random.default_rng(seed)
    drawn = [generator.choice(num_items, width, replace=False) for _ in range(num_cases)]
    items = np.sort(np.stack(drawn), axis=1).astype(np.int32)
    scores = generator.pareto(2, (num_sources, *items.shape)).astype(np.float32)
    scores *= generator.random(scores.shape) < 0.4  # most sources know little of most candidates
    target = generator.integers(0, width, num_cases)
    rows = np.arange(num_cases)
    scores[:, rows, target] += generator.pareto(1, (num_sources, num_cases)).astype(np.float32)
    lengths = generator.integers(1, 50, num_cases)
    return Material(
        sources=tuple(f"source {number}" for number in range(num_sources)),
        candidates=Candidates(items, scores, lengths),
        targets=Histories.of(items[rows, target][:, None]),
        cold=generator.integers(0, 100, num_items) == 0,
    )
