"""Fits the sources of a pipeline one by one, each in a process of its own; what that took."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.harness.memory import alone, peak_mib
from fusionrec.data.dataset import Dataset
from fusionrec.data.splits import split
from fusionrec.progress import bar
from fusionrec.serving.pipeline import read_config
from jobs.fit import FitConfig, fit, fit_source, training_data


@dataclass(frozen=True, slots=True)
class Fit:
    """What fitting one source, or one peer, took."""

    seconds: float
    before_mib: float
    """Peak memory of its process once the data were there."""
    peak_mib: float
    """The same once it was fitted."""


def fit_each(config: FitConfig) -> dict[str, Fit]:
    """Fit the pipeline's sources; source → what it took."""
    fit(config.model_copy(update={"prepare": True}))
    names = read_config(config.pipeline).sources
    found = {}
    with bar("fitting sources", len(names)) as advance:
        for name in names:
            found[name] = alone(_fit, config, name)
            advance(note=name)
    return found


def _fit(config: FitConfig, name: str) -> Fit:
    dataset = Dataset.open(config.dataset)
    data = training_data(config, dataset, split(dataset, config.protocol))
    before = peak_mib()
    seconds = fit_source(config, name, data)
    return Fit(seconds, before, peak_mib())
