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
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field

from benchmarks.harness.ablation import Ablation, LeftOut
from benchmarks.harness.audit import Systems, audit, with_ties_reversed
from benchmarks.harness.command import command_of, run_job
from benchmarks.harness.fits import Fit, fit_each
from benchmarks.harness.machine import describe, today
from benchmarks.harness.memory import alone, peak_mib
from benchmarks.harness.ranking import fused
from benchmarks.harness.rivals import measured
from benchmarks.harness.tables import table
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.ingest import IngestConfig, ingest
from fusionrec.data.splits import Protocol, Split, split
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.render import off_sentence
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
from fusionrec.sources.content import Content
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.sasrec import SASRec
from fusionrec.sources.semantic import Semantic
from jobs.entry import run
from jobs.evaluate import EvaluateConfig, evaluate
from jobs.fit import FitConfig, fit, training_data
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
    sources: tuple[str, ...] | None = None
    """Sources to fit, as jobs.fit takes them; by default all that it fits by default."""
    settings: Path | None = None
    """YAML with settings of the sources, as jobs.fit takes it with --config: those that a campaign
    left in winner.yaml, or an ease whose max_items makes it sparse."""
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

    def __init__(self, config: RankingBenchmark, dataset: Dataset, fit_with: FitConfig) -> None:
        self._config = config
        self._dataset = dataset
        self._pipeline = fit_with.pipeline
        self._folder = fit_with.pipeline.parent
        self._parts: Split = split(dataset, fit_with.protocol)
        self._bootstrap = BootstrapConfig(draws=config.draws, seed=config.seed)
        self._fit = fit_with

    def run(self, ingest_s: float) -> str:
        """Everything; a section of the report."""
        began = time.perf_counter() - ingest_s
        fits = self._fitted()
        fusions = self._fusions()
        report = self._evaluated()
        minutes = (time.perf_counter() - began) / 60
        rivals, told = measured(
            self._parts,
            self._data(self._parts),
            self._fit.sasrec,
            self._folder / "recbole",
            self._config.recbole_minutes,
            self._config.seed,
        )
        return "\n".join(
            (
                f"## {self._parts.protocol.capitalize()}\n",
                f"{report.num_cases:,} test cases, {report.num_targets:,} targets. From raw files "
                f"to the report {minutes:.1f} minutes, peers and ablation not included. Test run: "
                f"`{self._folder / 'run.parquet'}`.\n",
                self._systems(report, fits, fusions, rivals),
                *(
                    f"{_sentence(found)}\n"
                    for found in report.comparisons
                    if found.metric == "ndcg"
                ),
                *told,
                self._ablation(),
                self._audit(),
            )
        )

    def _fitted(self) -> dict[str, Fit]:
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._config.text and self._dataset.catalogue.has_text:
            fit(self._fit.model_copy(update={"prepare": True}))
            run_job("jobs.embed", pipeline=self._pipeline, encoder=self._config.encoder)
        return fit_each(self._fit)

    def _fusions(self) -> list[tuple[Measured, Fit]]:
        """The lists of each kind of fusion; the pipeline is left with the one that was chosen."""
        found = []
        for model in (FusionModel.LINEAR, FusionModel.LAMBDARANK, FusionModel.AUTO):
            search = FusionCampaign(
                pipeline=self._pipeline,
                dataset=self._dataset.directory,
                out=self._folder / "campaign",
                trials=self._config.trials,
                seed=self._config.seed,
                model=model,
            )
            took = alone(_searched, search)
            if model is not FusionModel.AUTO:
                pipeline = Pipeline.load(self._pipeline)
                found.append((fused(pipeline, self._parts.test, f"fused, {model}"), took))
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

    def _systems(
        self,
        report: Report,
        fits: dict[str, Fit],
        fusions: list[tuple[Measured, Fit]],
        rivals: list[tuple[Measured, Fit]],
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
                    f"{hits.mean:.4f} [{hits.low:.4f}, {hits.high:.4f}]",
                    *_took(fits.get(system.name)),
                    f"{system.seconds / report.num_cases * 1e3:.2f}",
                    f"{size / 2**20:.1f}" if size else "",
                )
            )
        rows.extend(self._row(each, took) for each, took in [*fusions, *rivals])
        columns = (
            "system",
            f"NDCG@{K} [95%]",
            f"HR@{K} [95%]",
            "fit, s",
            "fit, MiB",
            "s per 1,000 histories",
            "MiB kept",
        )
        least = min(each.before_mib for each in fits.values())
        return (
            f"{table(columns, rows)}\n*fit, MiB*: the peak of resident memory of a process that "
            f"fits it alone; {least:,.0f} MiB of that are there once the data are read. *fit, s* "
            "of what learns by torch holds loading it. A fusion's is its search, without the "
            "memory of Ray's workers; that of trees comes on top of the linear one, whose trials "
            "it takes over.\n"
        )

    def _row(self, found: Measured, took: Fit) -> tuple[str, ...]:
        values = np.stack([METRICS[name](found.ranks, K) for name in ("ndcg", "hr")], axis=1)
        draws = bootstrap_means(values, self._bootstrap)
        level = self._bootstrap.level
        each = (estimate(values[:, n].mean(), draws[:, n], level) for n in range(2))
        return (
            found.name,
            *(f"{value.mean:.4f} [{value.low:.4f}, {value.high:.4f}]" for value in each),
            *_took(took),
            f"{found.seconds / len(values) * 1e3:.2f}",
            "",
        )

    def _ablation(self) -> str:
        pipeline = Pipeline.load(self._pipeline)
        ablation = Ablation(pipeline, self._parts, self._bootstrap, K)
        found = ablation.without_each({n: (n,) for n in pipeline.fusion.personal.sources})
        trees = "" if pipeline.learned is None else ", and trees grown anew over them"
        text = (
            "### What each source adds\n\nThe served list against the list without it: the weights "
            f"of the others polished on validation{trees}. "
            f"{off_sentence(pipeline.off(), pipeline.fusion.fallback)}\n\n"
        )
        reads, others = self._without_model(pipeline)
        told = ""
        if reads and others is not None:
            names = others.config.sources
            both = {"the language model": names}
            if "bm25" in names and len(names) > 1:
                both["it and bm25"] = tuple(name for name in names if name != "bm25")
            found += ablation.instead(others, both)
            told = (
                f"\nThe language model is {self._config.encoder}, whose vectors are read by "
                f"{' and '.join(reads)}. It is left out with semantic, and the others are fitted "
                "again without it. No list is reranked.\n"
            )
        return (
            text
            + table(
                ("left out", "its weight", f"NDCG@{K} lost [95%]", "p"), list(map(_lost, found))
            )
            + told
        )

    def _without_model(self, pipeline: Pipeline) -> tuple[list[str], Pipeline | None]:
        """The sources that read the encoder's vectors, and the pipeline without these."""
        if pipeline.item_vectors is None:
            return [], None
        data = replace(self._data(self._parts), item_vectors=None, history_vectors=lambda _: None)
        reads, sources = [], []
        for source in pipeline.sources:
            if isinstance(source, Semantic):
                reads.append(source.name)
            elif isinstance(source, SASRec | Content) and source.config.text:
                reads.append(source.name)
                if isinstance(source, SASRec) or any(data.catalogue.categories):
                    sources.append(self._fit.build(source.name).fit(data))
            else:
                sources.append(source)
        if not sources:
            return reads, None
        names = tuple(source.name for source in sources)
        config = pipeline.config.model_copy(update={"sources": names})
        return reads, Pipeline(
            config,
            pipeline.catalogue,
            pipeline.item_counts,
            sources,
            pipeline.fusion,
            rules=pipeline.rules,
        )

    def _audit(self) -> str:
        found = audit(self._dataset, self._parts)
        text = (
            "### Audit\n\n"
            f"{found.tied_events:.1%} of the events share user and time with another, so that "
            f"their order is the file's; {found.tied_targets:.1%} of the targets are as old as "
            f"the event before them. {found.repeated_targets:.1%} of the targets had been met "
            f"before, and {found.cold_targets:.1%} have no training event; of the items without "
            f"one {found.cold_held_out:.1%} are a target of validation or test. Of the events of "
            f"the test window {found.met_before:,} are no targets since their user had met the "
            f"item before it, and {found.met_again:,} since they repeat one of it. "
            f"{found.twin_items:.1%} of the items are a work that has another id, too (equal "
            "title and year, or without a title an equal description): so are "
            f"{found.twin_targets:.1%} of the targets, and {found.twins_met:.1%} of the targets "
            "had been met under their other id.\n"
        )
        systems = Systems.load(self._pipeline)
        columns = ["system", f"NDCG@{K}", "with cold targets missed"]
        each = {name: list(values) for name, values in systems.ndcg(self._parts).items()}
        if found.tied_events:
            turned = with_ties_reversed(self._dataset, self._parts.protocol)
            again = systems.fitted_again(self._dataset, turned, self._fit)
            columns.append("with the order of ties reversed")
            for name, (ndcg, _) in again.ndcg(turned).items():
                each[name].append(ndcg)
        rows = [(name, *(f"{value:.4f}" for value in values)) for name, values in each.items()]
        return f"{text}\n{table(columns, rows)}"

    def _data(self, parts: Split) -> TrainingData:
        return training_data(self._fit, self._dataset, parts)


def fit_config(config: RankingBenchmark, folder: Path, protocol: Protocol) -> FitConfig:
    """What the sources are fitted with: the settings that are given, on this split.

    Raises:
        ConfigError: a setting is wrong or unknown.
    """
    words = [] if config.settings is None else ["--config", str(config.settings)]
    places = {"dataset": folder / "dataset", "pipeline": folder / protocol / "pipeline"}
    for flag, value in (*places.items(), ("protocol", protocol)):
        words += [f"--{flag}", str(value)]
    given = parse(FitConfig, words)
    update: dict[str, object] = {"slow_sources": config.slow_sources, "prepare": False}
    if config.sources is not None:
        update["sources"] = config.sources
    return given.model_copy(update=update)


def _searched(search: FusionCampaign) -> Fit:
    before, began = peak_mib(), time.perf_counter()
    campaign(search)
    return Fit(time.perf_counter() - began, before, peak_mib())


def _took(fit: Fit | None) -> tuple[str, str]:
    return ("", "") if fit is None else (f"{fit.seconds:.1f}", f"{fit.peak_mib:,.0f}")


def _lost(each: LeftOut) -> tuple[str, ...]:
    lost = each.lost.difference
    return (
        each.name,
        "" if each.weight is None else f"{each.weight:.2f}",
        f"{lost.mean:+.4f} [{lost.low:+.4f}, {lost.high:+.4f}]",
        f"{each.lost.p_value:.3f}",
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
    machine, began = describe(), time.perf_counter()
    fits = [fit_config(config, folder, protocol) for protocol in config.protocols]
    ingest(IngestConfig(raw=config.data, out=folder / "dataset"))
    ingest_s = time.perf_counter() - began
    dataset = Dataset.open(folder / "dataset")
    path, sections = folder / f"ranking-{today()}.md", list[str]()
    for each in fits:
        if each.protocol is Protocol.GLOBAL_TIME and not dataset.info.has_timestamps:
            sections.append(f"## {each.protocol.capitalize()}\n\nThe data have no timestamps.\n")
        else:
            sections.append(Bench(config, dataset, each).run(ingest_s))
        head = (
            f"# Ranking on {name}, {today()}\n\n{machine}\n\n"
            f"`{command_of('benchmarks.ranking', config)}`; every choice was made on validation "
            f"cases. In all {(time.perf_counter() - began) / 60:.1f} minutes.\n"
        )
        path.write_text("\n".join((head, *sections)), encoding="utf-8")
    return path


def main() -> None:
    """Parse, measure, print the report."""
    path = measure(parse(RankingBenchmark))
    sys.stdout.write(f"{path.read_text(encoding='utf-8')}\nreport: {path}\n")


if __name__ == "__main__":
    run(main)
