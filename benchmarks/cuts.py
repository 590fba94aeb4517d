"""``python -m benchmarks.cuts --data FOLDER``: the same ranking measured at several moments.

The global time split has one cut, and a result on it is a result of its weeks. Here the newest
events are dropped, again and again, and each time everything is made anew from what is left: the
sources, the fusion on the validation window, the measurement on the test window after it. No event
is a target of two cuts. What is reported of each system is its NDCG at every cut, their mean and
their spread, and at how many of the cuts the fused list was ahead.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import Field

from benchmarks.harness.command import command_of, run_job
from benchmarks.harness.machine import describe, today
from benchmarks.harness.tables import table
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.ingest import DatasetWriter, IngestConfig, ingest
from fusionrec.data.splits import Protocol
from fusionrec.errors import DataError
from fusionrec.evaluation.report import Report
from fusionrec.language.models import DEFAULT_MODEL
from jobs.entry import run
from jobs.evaluate import EvaluateConfig, evaluate
from jobs.fit import FitConfig, fit
from tuning.fusion import FusionCampaign, campaign
from tuning.learned import FusionModel

SHARE = 10
"""A window is one of so many parts of the events; the global time split has the same."""
K = 10


class CutsBenchmark(JobConfig):
    """Measure the ranking on one data set at several global time cuts, from its raw files."""

    data: Path
    """Folder with raw data with timestamps, in any format that jobs.ingest reads."""
    out: Path = Path("artifacts/benchmarks/cuts")
    """Where data sets, pipelines and the report go, in a folder of the data's name."""
    cuts: int = Field(default=3, ge=2, le=6)
    """How many; each one drops the newest tenth of what the one before it had."""
    sources: tuple[str, ...] | None = None
    """Sources to fit, as jobs.fit takes them; by default all that it fits by default."""
    slow_sources: bool = True
    """Whether to fit sasrec too, which takes minutes to train at each cut."""
    text: bool = True
    """Whether a language model reads the items' texts, where they have any."""
    encoder: str = DEFAULT_MODEL
    """Which one, as jobs.embed takes it."""
    model: FusionModel = FusionModel.AUTO
    """Kind of the fusion, as tuning.fusion takes it."""
    trials: int = Field(default=300, ge=1)
    """Trials of each search of the fusion."""
    seed: int = Field(default=0, ge=0)
    """Of everything."""


def earlier(dataset: Dataset, directory: Path) -> Dataset:
    """The data set without the newest tenth of its events, written to ``directory``."""
    table = dataset.interactions()
    times = table.column("timestamp").to_numpy()
    order = np.lexsort((np.arange(len(times)), times))  # as the global time split has it
    keep = np.zeros(len(times), dtype=np.bool_)
    keep[order[: len(order) - len(order) // SHARE]] = True
    with DatasetWriter(directory, name=dataset.info.name, format=dataset.info.format) as writer:
        writer.write_items(dataset.items)
        writer.write_interactions(table.filter(pa.array(keep)))
        writer.finish()
    return Dataset.open(directory)


def measure(config: CutsBenchmark) -> Path:
    """Make and measure everything at each cut; the report.

    Raises:
        DataError: the data have no timestamps, or no events are left at a cut.
    """
    folder = config.out / config.data.resolve().name
    shutil.rmtree(folder, ignore_errors=True)
    ingest(IngestConfig(raw=config.data, out=folder / "cut-1" / "dataset"))
    dataset = Dataset.open(folder / "cut-1" / "dataset")
    if not dataset.info.has_timestamps:
        raise DataError(
            f"--data {config.data} has an order of events but no timestamps, so there is no time "
            "to cut it at: measure it with `python -m benchmarks.ranking`"
        )
    reports = []
    for number in range(1, config.cuts + 1):
        place = folder / f"cut-{number}"
        if number > 1:
            dataset = earlier(dataset, place / "dataset")
        sys.stdout.write(f"cut {number} of {config.cuts}\n")
        reports.append(_at_cut(config, dataset, place))
    path = folder / f"cuts-{today()}.md"
    path.write_text(_text(config, reports), encoding="utf-8")
    return path


def _at_cut(config: CutsBenchmark, dataset: Dataset, place: Path) -> Report:
    pipeline = place / "pipeline"
    fitted = FitConfig(
        dataset=dataset.directory,
        pipeline=pipeline,
        protocol=Protocol.GLOBAL_TIME,
        prepare=True,
        sources=config.sources,
        slow_sources=config.slow_sources,
    )
    if config.text and dataset.catalogue.has_text:
        fit(fitted)
        _embed(config, pipeline, place.with_name("cut-1") / "pipeline")
    fit(fitted.model_copy(update={"prepare": False}))
    campaign(
        FusionCampaign(
            pipeline=pipeline,
            dataset=dataset.directory,
            out=place / "campaign",
            trials=config.trials,
            seed=config.seed,
            model=config.model,
        )
    )
    return evaluate(
        EvaluateConfig(pipeline=pipeline, dataset=dataset.directory, out=place / "report")
    )


def _embed(config: CutsBenchmark, pipeline: Path, first: Path) -> None:
    """Vectors of the items, which are the same at every cut."""
    if first != pipeline:
        shutil.copy(first / "vectors.npy", pipeline)
        shutil.copytree(first / "encoder", pipeline / "encoder")
        return
    run_job("jobs.embed", pipeline=pipeline, encoder=config.encoder)


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample) over the cuts."""
    return float(np.mean(values)), float(np.std(values, ddof=1))


def _text(config: CutsBenchmark, reports: list[Report]) -> str:
    sizes = "; ".join(
        f"cut {number}: {report.dataset.num_interactions:,} events, {report.num_cases:,} test cases"
        for number, report in enumerate(reports, 1)
    )
    columns = ("system", *(f"cut {n}" for n in range(1, len(reports) + 1)), "mean", "sd", "ahead")
    return (
        f"# Ranking at {len(reports)} time cuts on {config.data.resolve().name}, {today()}\n\n"
        f"{describe()}\n\n`{command_of('benchmarks.cuts', config)}`. {sizes}. "
        f"NDCG@{K} on test, cut 1 the newest; *ahead*: at how many cuts the served list was.\n\n"
        + table(columns, list(_rows(reports)))
    )


def _rows(reports: list[Report]) -> Iterator[tuple[str, ...]]:
    served = [report.served.metrics["ndcg"].mean for report in reports]
    known = [{system.name: system for system in report.systems} for report in reports]
    for name in known[0]:
        values = [systems[name].metrics["ndcg"].mean for systems in known if name in systems]
        if len(values) < len(reports):
            continue  # one cut had too little for this source
        mean, deviation = spread(values)
        ahead = sum(mine > other for mine, other in zip(served, values, strict=True))
        is_served = name == reports[0].served.name
        yield (
            name,
            *(f"{value:.4f}" for value in values),
            f"{mean:.4f}",
            f"{deviation:.4f}",
            "" if is_served else f"{ahead} of {len(reports)}",
        )


def main() -> None:
    """Parse, measure, print the report."""
    path = measure(parse(CutsBenchmark))
    sys.stdout.write(f"{path.read_text(encoding='utf-8')}\nreport: {path}\n")


if __name__ == "__main__":
    run(main)
