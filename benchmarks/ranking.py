"""``make bench-ranking DATA=FOLDER``: what every source and every fusion is worth, from raw files.

Ingests, embeds, fits, searches the fusion on validation, measures on test, under each protocol that
the data allow; beside that implicit's and RecBole's models on the same split by the same evaluator,
what each source adds when it is left out, and an audit of the data. ``docs/benchmarks.md`` says
more.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import numpy as np
from pydantic import Field

from benchmarks.harness.command import command_of, run_job
from benchmarks.harness.machine import describe, today
from benchmarks.harness.ranking import (
    ablation,
    audit,
    fused,
    ndcg_of,
    peers,
    with_ties_reversed,
)
from benchmarks.harness.recbole import FOLDER, MISSING, epochs_told, recbole_peers
from benchmarks.harness.tables import table
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.ingest import IngestConfig, ingest
from fusionrec.data.splits import Protocol, Split, split
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.report import Report
from fusionrec.evaluation.significance import (
    BootstrapConfig,
    Comparison,
    bootstrap_means,
    estimate,
)
from fusionrec.evaluation.systems import Measured
from fusionrec.language.models import DEFAULT_MODEL
from fusionrec.serving.pipeline import Pipeline
from fusionrec.sources.protocol import TrainingData
from jobs.entry import run
from jobs.evaluate import EvaluateConfig, evaluate
from jobs.fit import FitConfig, fit
from tuning.fusion import FusionCampaign, campaign
from tuning.learned import FusionModel

K = 10


class RankingBenchmark(JobConfig):
    """Measure the ranking on one data set, from its raw files."""

    data: Path
    """Folder with raw data, in any format that jobs.ingest reads."""
    out: Path = Path("artifacts/benchmarks/ranking")
    """Where pipelines, runs and the report go, in a folder of the data's name."""
    protocols: tuple[Protocol, ...] = tuple(Protocol)
    """Splits to measure under; global-time is left out where the data have no timestamps."""
    text: bool = True
    """Whether a language model reads the items' texts, where they have any."""
    encoder: str = DEFAULT_MODEL
    """Which one, as jobs.embed takes it."""
    slow_sources: bool = True
    """Whether to fit sasrec too, which takes minutes to train."""
    trials: int = Field(default=300, ge=1)
    """Trials of each search of the fusion."""
    recbole_minutes: float = Field(default=15.0, ge=0)
    """RecBole's SASRec begins epochs for so long, where `make recbole` was run; 0: leave it out."""
    draws: int = Field(default=2000, ge=100)
    """Bootstrap resamples."""
    seed: int = Field(default=0, ge=0)
    """Of everything."""


class Bench:
    """One data set under one protocol."""

    def __init__(self, config: RankingBenchmark, dataset: Dataset, protocol: Protocol) -> None:
        self._config = config
        self._dataset = dataset
        self._folder = dataset.directory.parent / protocol
        self._pipeline = self._folder / "pipeline"
        self._parts: Split = split(dataset, protocol)
        self._bootstrap = BootstrapConfig(draws=config.draws, seed=config.seed)
        self._fit = FitConfig(
            dataset=dataset.directory,
            pipeline=self._pipeline,
            protocol=protocol,
            prepare=True,
            slow_sources=config.slow_sources,
        )

    def run(self) -> str:
        """Everything; a section of the report."""
        began = time.perf_counter()
        fit_s = self._fitted()
        fusions = self._fusions()
        report = self._evaluated()
        minutes = (time.perf_counter() - began) / 60
        rivals = list(peers(self._parts, self._config.seed))
        recbole = self._recbole(rivals)
        return "\n".join(
            (
                f"## {self._parts.protocol.capitalize()}\n",
                f"{report.num_cases:,} test cases, {report.num_targets:,} targets. From raw files "
                f"to the report {minutes:.1f} minutes, peers and ablation not included. Test run: "
                f"`{self._folder / 'run.parquet'}`.\n",
                self._systems(report, fit_s, fusions, rivals),
                *(
                    f"{_sentence(found)}\n"
                    for found in report.comparisons
                    if found.metric == "ndcg"
                ),
                recbole,
                self._ablation(),
                self._audit(),
            )
        )

    def _fitted(self) -> dict[str, float]:
        shutil.rmtree(self._folder, ignore_errors=True)
        fit(self._fit)
        if self._config.text and self._dataset.catalogue.has_text:
            run_job("jobs.embed", pipeline=self._pipeline, encoder=self._config.encoder)
        return fit(self._fit.model_copy(update={"prepare": False}))

    def _fusions(self) -> list[Measured]:
        """The lists of each kind of fusion; the pipeline is left with the one that was chosen."""
        found = []
        for model in (FusionModel.LINEAR, FusionModel.LAMBDARANK, FusionModel.AUTO):
            campaign(
                FusionCampaign(
                    pipeline=self._pipeline,
                    dataset=self._dataset.directory,
                    out=self._folder / "campaign",
                    trials=self._config.trials,
                    seed=self._config.seed,
                    model=model,
                )
            )
            if model is not FusionModel.AUTO:
                pipeline = Pipeline.load(self._pipeline)
                found.append(fused(pipeline, self._parts.test, f"fused, {model}"))
        return found

    def _evaluated(self) -> Report:
        return evaluate(
            EvaluateConfig(
                pipeline=self._pipeline,
                dataset=self._dataset.directory,
                out=self._folder / "report",
                export_run=self._folder / "run.parquet",
                draws=self._config.draws,
                seed=self._config.seed,
            )
        )

    def _recbole(self, rivals: list[tuple[Measured, float]]) -> str:
        """Add its models to ``rivals``; a sentence on its epochs, or on why there are none."""
        minutes = self._config.recbole_minutes
        if not FOLDER.is_dir() or not minutes:
            return MISSING if minutes else ""
        found = recbole_peers(self._parts, self._folder / "recbole", minutes, self._config.seed)
        rivals.extend((peer.measured, peer.fit_s) for peer in found.values())
        return epochs_told(found["SASRec"].epochs_s, self._data(self._parts))

    def _systems(
        self,
        report: Report,
        fit_s: dict[str, float],
        fusions: list[Measured],
        rivals: list[tuple[Measured, float]],
    ) -> str:
        rows: list[tuple[str, ...]] = []
        for system in report.systems:
            ndcg, hits = system.metrics["ndcg"], system.metrics["hr"]
            kept = self._pipeline / "sources" / system.name
            size = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file())
            rows.append(
                (
                    system.name,
                    f"{ndcg.mean:.4f} [{ndcg.low:.4f}, {ndcg.high:.4f}]",
                    f"{hits.mean:.4f}",
                    f"{fit_s[system.name]:.1f}" if system.name in fit_s else "",
                    f"{system.seconds / report.num_cases * 1e3:.2f}",
                    f"{size / 2**20:.1f}" if size else "",
                )
            )
        others = [*((each, None) for each in fusions), *rivals]
        rows.extend(self._row(each, seconds) for each, seconds in others)
        columns = (
            "system",
            f"NDCG@{K} [95%]",
            f"HR@{K}",
            "fit, s",
            "s per 1,000 histories",
            "MiB kept",
        )
        return table(columns, rows)

    def _row(self, found: Measured, fit_s: float | None) -> tuple[str, ...]:
        values = np.stack([METRICS[name](found.ranks, K) for name in ("ndcg", "hr")], axis=1)
        draws = bootstrap_means(values, self._bootstrap)
        ndcg = estimate(values[:, 0].mean(), draws[:, 0], self._bootstrap.level)
        return (
            found.name,
            f"{ndcg.mean:.4f} [{ndcg.low:.4f}, {ndcg.high:.4f}]",
            f"{values[:, 1].mean():.4f}",
            "" if fit_s is None else f"{fit_s:.1f}",
            f"{found.seconds / len(values) * 1e3:.2f}",
            "",
        )

    def _ablation(self) -> str:
        found = ablation(Pipeline.load(self._pipeline), self._parts, self._bootstrap, K)
        rows = [
            (
                each.source,
                f"{each.weight:.2f}",
                f"{each.lost.difference.mean:+.4f} "
                f"[{each.lost.difference.low:+.4f}, {each.lost.difference.high:+.4f}]",
                f"{each.lost.p_value:.3f}",
            )
            for each in found
        ]
        return "### What each source adds\n\n" + table(
            ("left out", "its weight", f"NDCG@{K} lost [95%]", "p"), rows
        )

    def _audit(self) -> str:
        found = audit(self._dataset, self._parts)
        text = (
            "### Audit\n\n"
            f"{found.tied_events:.1%} of the events share user and time with another, so that "
            f"their order is the file's; {found.tied_targets:.1%} of the targets are as old as "
            f"the event before them. {found.repeated_targets:.1%} of the targets had been met "
            f"before, and {found.cold_targets:.1%} have no training event.\n"
        )
        if not found.tied_events:
            return text
        turned = with_ties_reversed(self._dataset, self._parts.protocol)
        rows = []
        for name in self._fit_names():
            source = self._fit.build(name)
            values = [
                ndcg_of(source, self._data(parts), parts.test) for parts in (self._parts, turned)
            ]
            rows.append((name, *(f"{value:.4f}" for value in values)))
        columns = ("source", f"NDCG@{K}", "with the order of ties reversed")
        return f"{text}\n{table(columns, rows)}"

    def _fit_names(self) -> list[str]:
        """Sources that need no vectors of histories, which do not know the order of ties anyway."""
        names = Pipeline.load(self._pipeline, stages=frozenset()).config.sources
        return [name for name in names if name != "semantic"]

    def _data(self, parts: Split) -> TrainingData:
        return TrainingData(
            self._dataset.catalogue, parts.train, has_timestamps=self._dataset.info.has_timestamps
        )


def _sentence(found: Comparison) -> str:
    low, high = found.difference.low, found.difference.high
    ratio = f" ({found.ratio.mean:.3f} ×)" if found.ratio is not None else ""
    return (
        f"{found.a} {found.mean_a:.4f} against {found.b} {found.mean_b:.4f}{ratio}: "
        f"{found.difference.mean:+.4f} [{low:+.4f}, {high:+.4f}], p = {found.p_value:.3f}."
    )


def measure(config: RankingBenchmark) -> Path:
    """Run all protocols; the report."""
    name = config.data.resolve().name
    folder = config.out / name
    machine = describe()
    ingest(IngestConfig(raw=config.data, out=folder / "dataset"))
    dataset = Dataset.open(folder / "dataset")
    sections = []
    for protocol in config.protocols:
        if protocol is Protocol.GLOBAL_TIME and not dataset.info.has_timestamps:
            sections.append(f"## {protocol.capitalize()}\n\nThe data have no timestamps.\n")
            continue
        sections.append(Bench(config, dataset, protocol).run())
    head = (
        f"# Ranking on {name}, {today()}\n\n{machine}\n\n"
        f"`{command_of('benchmarks.ranking', config)}`; "
        "every choice was made on validation cases.\n"
    )
    path = folder / f"ranking-{today()}.md"
    path.write_text("\n".join((head, *sections)), encoding="utf-8")
    return path


def main() -> None:
    """Parse, measure, print the report."""
    path = measure(parse(RankingBenchmark))
    sys.stdout.write(f"{path.read_text(encoding='utf-8')}\nreport: {path}\n")


if __name__ == "__main__":
    run(main)
