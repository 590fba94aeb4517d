"""``make bench-finetuning DATA=FOLDER``: what fine-tuned language models are worth, with intervals.

Under each protocol two pipelines that differ in their encoder alone, as it was published and
fine-tuned on the training histories: the semantic source alone, on all targets and on cold ones,
and the fused list. Then a reranker on the second pipeline, against the fused order by the length of
the history. ``docs/benchmarks.md`` says more.
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
from benchmarks.harness.reranking import by_length, lists_of
from benchmarks.harness.tables import table
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.ingest import IngestConfig, ingest
from fusionrec.data.splits import Protocol, split
from fusionrec.data.text import history_texts
from fusionrec.evaluation.evaluate import FUSED, measure
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.ranks import Ranks, full_ranks
from fusionrec.evaluation.significance import (
    BootstrapConfig,
    Comparison,
    bootstrap_means,
    compare,
    estimate,
)
from fusionrec.evaluation.systems import Kind, Measured
from fusionrec.language.encoder import Encoder
from fusionrec.language.inference import has_bf16, pick_device
from fusionrec.language.models import DEFAULT_MODEL
from fusionrec.language.precision import Precision
from fusionrec.serving.pipeline import Pipeline
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.semantic import Semantic
from jobs.entry import run
from jobs.fit import FitConfig, fit
from tuning.fusion import FusionCampaign, campaign
from tuning.learned import FusionModel

K = 10
UNTOUCHED, TUNED = "untouched", "fine-tuned"
SEMANTIC = "semantic"
GAIN = 2.0
"""Times the semantic source's NDCG that fine-tuning is held to."""


class FinetuningBenchmark(JobConfig):
    """Measure fine-tuned language models on one data set, from its raw files."""

    data: Path
    """Folder with raw data, in any format that jobs.ingest reads."""
    out: Path = Path("artifacts/benchmarks/finetuning")
    """Where runs, pipelines and the report go, in a folder of the data's name."""
    protocols: tuple[Protocol, ...] = tuple(Protocol)
    """Splits to measure under."""
    encoder: str = DEFAULT_MODEL
    """To start from, as jobs.embed takes it."""
    history_items: int = Field(default=3, ge=1)
    """Newest items that the encoder is fine-tuned to read."""
    read_items: tuple[int, ...] = Field(default=(1, 2, 3, 5), min_length=1)
    """Newest items that are read afterwards: each encoder has the best number on validation."""
    max_tokens: int = Field(default=64, ge=8)
    """Tokens of a text that both encoders read."""
    examples: int = Field(default=12_000, ge=1)
    """That the encoder is fine-tuned on: with the epochs, what bounds the time."""
    examples_per_user: int = Field(default=50, ge=1)
    """Newest training events of each user that become examples."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the examples."""
    batch_size: int = Field(default=64, ge=2)
    """Pairs of a step of the encoder."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Of the encoder, at its peak."""
    temperature: float = Field(default=0.05, gt=0)
    """Of the encoder's loss."""
    popularity_correction: bool = True
    """Whether the encoder's loss undoes that popular items are drawn as negatives more often."""
    precision: Precision | None = None
    """Arithmetic of the fine-tuning; by default bf16 where there are instructions for it."""
    rerank: bool = True
    """Whether to train and measure a reranker too."""
    reranker_examples: int = Field(default=300, ge=1)
    """Lists that the reranker is fine-tuned on."""
    max_cases: int = Field(default=600, ge=50)
    """Validation cases that the reranker's weight is chosen on."""
    trials: int = Field(default=300, ge=1)
    """Trials of each search of the fusion."""
    draws: int = Field(default=2000, ge=100)
    """Bootstrap resamples."""
    seed: int = Field(default=0, ge=0)
    """Of everything."""
    quick: bool = False
    """Few examples and trials: whether it works, not what it brings."""


class Bench:
    """One data set under one protocol."""

    def __init__(self, config: FinetuningBenchmark, dataset: Dataset, protocol: Protocol) -> None:
        self._config, self._dataset, self._protocol = config, dataset, protocol
        fast = Precision.BF16 if has_bf16(pick_device(None)) else Precision.FP32
        self._precision = config.precision or fast
        self._folder = dataset.directory.parent / protocol
        self._parts = split(dataset, protocol)
        self._bootstrap = BootstrapConfig(draws=config.draws, seed=config.seed)
        cold = self._parts.item_counts == 0
        self._cold = cold[self._parts.test.targets.items]
        self._read: dict[str, dict[int, float]] = {}
        """Validation NDCG of the semantic source by encoder and items read."""
        self.gain = 0.0
        """Of the semantic source: fine-tuned over untouched."""

    def run(self) -> str:
        """Everything; a section of the report."""
        shutil.rmtree(self._folder, ignore_errors=True)
        began = time.perf_counter()
        model = self._finetuned()
        minutes = (time.perf_counter() - began) / 60
        encoders = {UNTOUCHED: self._config.encoder, TUNED: str(model)}
        pipelines = {name: self._pipeline(name, encoder) for name, encoder in encoders.items()}
        measured = {name: self._measured(place) for name, place in pipelines.items()}
        cases = self._parts.test
        parts = [
            f"## {self._protocol.capitalize()}\n",
            f"{len(cases):,} test cases, {len(self._cold):,} targets, {self._cold.sum():,} of them "
            f"cold: without a training event. The encoder was fine-tuned in {minutes:.1f} minutes "
            f"in {self._precision}, its start included. Semantic source on validation, by the "
            f"number of items that are read of a history: {self._choices()}.\n",
            self._table(measured),
            *(f"{sentence(found)}\n" for found in self._comparisons(measured)),
        ]
        if self._config.rerank:
            parts.append(self._reranked(pipelines[TUNED]))
        parts.append(f"All of this took {(time.perf_counter() - began) / 60:.1f} minutes.\n")
        return "\n".join(parts)

    def _choices(self) -> str:
        """What :meth:`_choose_items` found, for people."""
        return "; ".join(
            f"{name} " + ", ".join(f"{count}: {value:.4f}" for count, value in found.items())
            for name, found in self._read.items()
        )

    def _finetuned(self) -> Path:
        config = self._config
        out = self._folder / "encoder"
        self._finetune(
            task="encoder",
            encoder=config.encoder,
            out=out,
            history_items=config.history_items,
            max_tokens=config.max_tokens,
            max_examples=config.examples,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            temperature=config.temperature,
            popularity_correction=config.popularity_correction,
        )
        return out / "model"

    def _finetune(self, **settings: object) -> None:
        """On this data set and protocol."""
        run_job(
            "jobs.finetune",
            dataset=self._dataset.directory,
            protocol=self._protocol,
            examples_per_user=self._config.examples_per_user,
            precision=self._precision,
            seed=self._config.seed,
            **settings,
        )

    def _pipeline(self, name: str, encoder: str) -> Path:
        """A pipeline with this encoder and a linear fusion that was searched on validation."""
        config, place = self._config, self._folder / name
        settings = FitConfig(
            dataset=self._dataset.directory,
            pipeline=place,
            protocol=self._protocol,
            prepare=True,
        )
        fit(settings)
        run_job("jobs.embed", pipeline=place, encoder=encoder, max_tokens=config.max_tokens)
        self._read[name] = self._choose_items(place)
        fit(settings.model_copy(update={"prepare": False}))
        campaign(
            FusionCampaign(
                pipeline=place,
                dataset=self._dataset.directory,
                out=self._folder / f"{name}-campaign",
                trials=config.trials,
                seed=config.seed,
                model=FusionModel.LINEAR,
            )
        )
        return place

    def _choose_items(self, place: Path) -> dict[int, float]:
        """Set how much of a history the encoder reads; NDCG on validation by number of items."""
        cases, catalogue = self._parts.validation, self._dataset.catalogue
        vectors = np.load(place / "vectors.npy")
        source = Semantic().fit(TrainingData(catalogue, self._parts.train, item_vectors=vectors))
        encoder = Encoder.load(place / "encoder")
        found = {}
        for count in self._config.read_items:
            asked = encoder.encode(history_texts(catalogue, cases.histories, count))
            histories = cases.histories.with_vectors(asked)
            ranks = full_ranks(source, histories, cases.targets, len(catalogue))
            found[count] = float(METRICS["ndcg"](ranks, K).mean())
        best = max(found, key=lambda count: found[count])
        settings = encoder.config.model_copy(update={"history_items": best})
        Encoder(encoder.model, encoder.tokenizer, settings).save(place / "encoder")
        return found

    def _measured(self, place: Path) -> dict[str, Measured]:
        pipeline = Pipeline.load(place)
        found = measure(pipeline, self._parts.test, self._parts.item_counts, K)
        return {system.name: system for system in found}

    def _table(self, measured: dict[str, dict[str, Measured]]) -> str:
        """Sources that do not read text are the same in both pipelines, and told once."""
        rows = []
        for encoder, systems in measured.items():
            for name, system in systems.items():
                reads = name == SEMANTIC or system.kind is not Kind.SOURCE
                if not reads and encoder == TUNED:
                    continue
                label = f"{name}, {encoder} encoder" if reads else name
                cold = system.ranks.where(self._cold)
                hits = METRICS["hr"](system.ranks, K).mean()
                rows.append(
                    (
                        label,
                        self._ndcg(system.ranks),
                        f"{hits:.4f}",
                        self._ndcg(cold) if len(cold) else "",
                    )
                )
        return table(
            ("system", f"NDCG@{K} [95%]", f"HR@{K}", f"NDCG@{K} of cold targets [95%]"), rows
        )

    def _ndcg(self, ranks: Ranks) -> str:
        values = METRICS["ndcg"](ranks, K)
        draws = bootstrap_means(values[:, None], self._bootstrap)[:, 0]
        found = estimate(values.mean(), draws, self._bootstrap.level)
        return f"{found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]"

    def _comparisons(self, measured: dict[str, dict[str, Measured]]) -> list[Comparison]:
        found = []
        for system in (SEMANTIC, FUSED):
            names = (f"{system}, {TUNED}", f"{system}, {UNTOUCHED}")
            values = [METRICS["ndcg"](measured[n][system].ranks, K) for n in (TUNED, UNTOUCHED)]
            found.append(compare("ndcg", names, np.stack(values, axis=1), self._bootstrap))
        self.gain = found[0].mean_a / found[0].mean_b if found[0].mean_b else float("inf")
        return found

    def _reranked(self, place: Path) -> str:
        config = self._config
        began = time.perf_counter()
        self._finetune(
            task="reranker",
            encoder=self._folder / "encoder" / "model",
            pipeline=place,
            out=self._folder / "reranker",
            max_examples=config.reranker_examples,
        )
        minutes = (time.perf_counter() - began) / 60
        run_job(
            "tuning.reranking",
            pipeline=place,
            dataset=self._dataset.directory,
            max_cases=config.max_cases,
            seed=config.seed,
        )
        pipeline = Pipeline.load(place)
        validation = self._parts.validation.sample(config.max_cases, config.seed)
        chosen_on, measured_on = (lists_of(pipeline, c) for c in (validation, self._parts.test))
        weight, rows = by_length(chosen_on, measured_on, self._bootstrap, K)
        gate = "; ".join(
            f"{name}: {row['reranker']:.3f}" for name, row in pipeline.fusion.table().items()
        )
        columns = ("history length", "cases", "fused", "reranked", "difference [95%]", "p")
        return (
            "### Reranker\n\n"
            f"Fine-tuned on {config.reranker_examples} lists in {minutes:.1f} minutes. Below, its "
            f"weight is {weight:.3f} everywhere, the best single one on {len(validation)} "
            f"validation cases. The gate (`tuning.reranking`), which asks each segment of the "
            f"fusion whether it holds on cases that did not choose, gives it these: {gate}.\n\n"
            + table(columns, rows)
        )


def sentence(found: Comparison) -> str:
    """A paired comparison in words."""
    low, high = found.difference.low, found.difference.high
    ratio = ""
    if found.ratio is not None:
        at = found.ratio
        ratio = f" ({at.mean:.2f} × [{at.low:.2f}, {at.high:.2f}])"
    return (
        f"{found.a} {found.mean_a:.4f} against {found.b} {found.mean_b:.4f}{ratio}: "
        f"{found.difference.mean:+.4f} [{low:+.4f}, {high:+.4f}], p = {found.p_value:.3f}."
    )


def measure_all(config: FinetuningBenchmark) -> tuple[Path, bool]:
    """Run all protocols; the report, and whether the semantic source gained what it should."""
    name = config.data.resolve().name
    folder = config.out / name
    machine = describe()
    ingest(IngestConfig(raw=config.data, out=folder / "dataset"))
    dataset = Dataset.open(folder / "dataset")
    benches = [
        Bench(config, dataset, protocol)
        for protocol in config.protocols
        if dataset.info.has_timestamps or protocol is not Protocol.GLOBAL_TIME
    ]
    sections = [bench.run() for bench in benches]
    held = all(bench.gain >= GAIN for bench in benches)
    head = (
        f"# Fine-tuning on {name}, {today()}\n\n{machine}\n\n"
        f"`{command_of('benchmarks.finetuning', config)}`; fused lists are linear, "
        "and every choice was made on validation cases. The semantic source is held to "
        f"{GAIN:g} × its NDCG@{K} without fine-tuning: "
        + "; ".join(f"{bench.gain:.2f} ×" for bench in benches)
        + (", holds.\n" if held else ", **missed**.\n")
    )
    path = folder / f"finetuning-{today()}.md"
    path.write_text("\n".join((head, *sections)), encoding="utf-8")
    return path, held


def main() -> None:
    """Parse, measure, print the report; exit status 1 where the gain is too small."""
    config = parse(FinetuningBenchmark)
    if config.quick:
        quick = {"examples": 256, "reranker_examples": 16, "trials": 20, "max_cases": 50}
        config = config.model_copy(update=quick)
    path, held = measure_all(config)
    sys.stdout.write(f"{path.read_text(encoding='utf-8')}\nreport: {path}\n")
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    run(main)
