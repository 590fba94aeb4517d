"""Choose the precision that a pipeline's language models are served in.

Measures the served list on validation cases with the models in float32 and, one after the other, in
each faster precision that the machine has: bf16, and int8 on a CPU. Keeps for a model the fastest
here with which NDCG@10 stays within half a percent of float32. Leaves
``inference.json``, which offline evaluation and the endpoint follow, and the figures in
``metrics.json``, from where they go into the manifest and before the gate. Times are printed and
not kept: they differ from run to run, and equal pipelines must make equal bundles.
"""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field
from rich.table import Table

from fusionrec.bundles.gate import InferenceMetrics, Measured, forget_measurements
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.splits import Cases, split
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.systems import Kind, ListMeter
from fusionrec.language.precision import INFERENCE, InferenceConfig, Precision
from fusionrec.progress import bar, console
from fusionrec.serving.pipeline import Pipeline
from jobs.entry import run

K = 10
BLOCK = 16
"""Histories that travel through the pipeline together, as at an endpoint with some load."""
WATCHED = 64
"""Cases that show the peaks, which few tokens have, the same in most texts."""


class OptimiseConfig(JobConfig):
    """Choose the precision that a pipeline's language models are served in, by measuring."""

    pipeline: Path
    """Directory that jobs.fit and the jobs after it wrote; what was measured of it is replaced."""
    dataset: Path
    """The data set that it was fitted on."""
    max_cases: int = Field(default=300, ge=20)
    """Validation cases that are measured; more are sampled."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sample."""
    precision: Literal["bf16", "int8"] | None = None
    """The only faster one to try; by default each that this machine has instructions for."""


@dataclass(frozen=True, slots=True)
class Served:
    """What was measured of one setting."""

    ndcg: float
    embed_s: float
    """Seconds of the encoder for a history: the median over blocks of histories."""
    rerank_s: float

    def seconds(self, model: str) -> float:
        """Those of ``encoder`` or ``reranker``."""
        return self.embed_s if model == "encoder" else self.rerank_s


@dataclass(frozen=True, slots=True)
class Tried:
    """What was found for one model in one faster precision."""

    measured: Measured
    seconds: float
    """For a history."""
    peaks: tuple[float, ...] = ()
    """That it was loaded with, in int8."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was found for one model."""

    model: str
    fp32_s: float
    """Seconds for a history."""
    tried: tuple[Tried, ...]
    """At least one."""

    @property
    def best(self) -> Tried:
        """The fastest that keeps the quality; where none does, the one that comes closest."""
        kept = [tried for tried in self.tried if tried.measured.kept]
        if kept:
            return min(kept, key=lambda tried: tried.seconds)
        return max(self.tried, key=lambda tried: tried.measured.faster)

    @property
    def precision(self) -> Precision:
        """What it is served in."""
        measured = self.best.measured
        better = measured.kept and self.best.seconds < self.fp32_s
        return measured.precision if better else Precision.FP32

    @property
    def peaks(self) -> tuple[float, ...]:
        """The peaks that it is served with; none in another precision."""
        served = self.precision is self.best.measured.precision
        return self.best.peaks if served else ()


def optimise(config: OptimiseConfig) -> list[Choice]:
    """Measure, choose, write; one choice for each model that is used, none where there is none.

    Cost: ``max_cases`` lists are made once in float32, and once more for each model and precision.

    Raises:
        ConfigError: the pipeline was fitted on another data set.
    """
    pipeline = Pipeline.load(config.pipeline)
    dataset = Dataset.open(config.dataset)
    pipeline.config.refuse_other_data(dataset, config.pipeline)
    models = _used(pipeline)
    if not models:
        console.print("No language model is used: there is nothing to choose.")
        return []
    # Here, because torch costs seconds that nobody needs where there is no model.
    from fusionrec.language.inference import pick_device, usable

    asked = [Precision(config.precision)] if config.precision else [Precision.BF16, Precision.INT8]
    device = pick_device(None)
    faster = [each for each in asked if usable(each, device, frozen=True) is each]
    if not faster:
        missing = " and no ".join(asked)
        console.print(f"This machine has no {missing}: the models stay as they are.")
        return []
    validation = split(dataset, pipeline.config.protocol).validation
    cases = validation.sample(config.max_cases, config.seed)
    choices = _choose(pipeline, config.pipeline, cases, models, faster)
    if not choices:
        return []
    _write(config.pipeline, choices)
    return choices


def _used(pipeline: Pipeline) -> list[str]:
    weighed = any(segment.reranker > 0 for segment in pipeline.fusion.segments)
    used = {
        "encoder": pipeline.encoder is not None,
        "reranker": pipeline.reranker is not None and weighed,
    }
    return [name for name, is_used in used.items() if is_used]


def _choose(
    pipeline: Pipeline, directory: Path, cases: Cases, models: list[str], faster: list[Precision]
) -> list[Choice]:
    """One model after the other; what is chosen for the encoder stays for the reranker."""
    for model in models:
        _reload(pipeline, directory, model, Precision.FP32)
    before = measure(pipeline, cases, "fp32")
    peaks = _peaks(pipeline, cases, models) if Precision.INT8 in faster else {}
    choices = []
    for model in models:
        tried = []
        for precision in faster:
            known = peaks.get(model, ()) if precision is Precision.INT8 else ()
            if _reload(pipeline, directory, model, precision, known) is not precision:
                console.print(f"The {model} has no {precision}.")
                continue
            after = measure(pipeline, cases, f"{precision} {model}")
            measured = Measured(
                num_cases=len(cases), precision=precision, fp32=before.ndcg, faster=after.ndcg
            )
            tried.append(Tried(measured, after.seconds(model), known))
        chosen, known = Precision.FP32, ()
        if tried:
            choices.append(Choice(model, before.seconds(model), tuple(tried)))
            chosen, known = choices[-1].precision, choices[-1].peaks
        _reload(pipeline, directory, model, chosen, known)
    return choices


def _peaks(pipeline: Pipeline, cases: Cases, models: list[str]) -> dict[str, tuple[float, ...]]:
    """Inside the layers of each model, in float32; nothing where int8 makes nothing of them."""
    from fusionrec.language.quantized import has_vnni, watched

    if not has_vnni():
        return {}
    with ExitStack() as stack:
        found = {m: stack.enter_context(watched(getattr(pipeline, m).model)) for m in models}
        for start in range(0, min(WATCHED, len(cases)), BLOCK):
            pipeline.recommend(cases.histories.slice(start, min(start + BLOCK, len(cases))))
    # A model that was given nothing to read has shown nothing.
    return {m: tuple(map(_rounded_up, peaks)) for m, peaks in found.items() if all(peaks)}


def _rounded_up(peak: float) -> float:
    """To two digits, so that machines that differ in the last bit mostly write the same."""
    unit = 10.0 ** (math.floor(math.log10(peak)) - 1)
    return float(f"{math.ceil(peak / unit) * unit:.2g}")


def _reload(
    pipeline: Pipeline,
    directory: Path,
    model: str,
    precision: Precision,
    peaks: tuple[float, ...] = (),
) -> Precision:
    """Load it in ``precision``, or what it can have of that."""
    from fusionrec.language.encoder import Encoder
    from fusionrec.language.rankers import load_reranker

    if model == "encoder":
        pipeline.encoder = Encoder.load(
            directory / model, precision=precision, frozen=True, peaks=peaks
        )
        return pipeline.encoder.precision
    pipeline.reranker = load_reranker(
        directory / model, precision=precision, frozen=True, peaks=peaks
    )
    return pipeline.reranker.precision


def measure(pipeline: Pipeline, cases: Cases, name: str) -> Served:
    """NDCG@10 of the served list of ``cases``, and the time of the language models."""
    pipeline.recommend(cases.histories.slice(0, min(BLOCK, len(cases))))  # the first is slow
    meter = ListMeter(name, Kind.RERANKED, cases, K, K)
    seconds = []
    with bar(f"measuring {name}", len(cases)) as advance:
        for start in range(0, len(cases), BLOCK):
            block = cases.histories.slice(start, min(start + BLOCK, len(cases)))
            began = time.perf_counter()
            embedded = pipeline.embed(block)
            embed_s = time.perf_counter() - began
            fused = pipeline.retrieve(embedded)
            began = time.perf_counter()
            fused = pipeline.rerank(embedded, fused)
            rerank_s = time.perf_counter() - began
            meter.add(fused.items, fused.scores)
            seconds.append((embed_s / len(block), rerank_s / len(block)))
            advance(len(block))
    ndcg = METRICS["ndcg"](meter.measured().ranks, K).mean()
    # A mean would count what else the machine does.
    embed_s, rerank_s = np.median(seconds, axis=0)
    return Served(float(ndcg), float(embed_s), float(rerank_s))


def _write(directory: Path, choices: list[Choice]) -> None:
    """``inference.json`` comes last: without it the models are served by the defaults."""
    forget_measurements(directory)
    metrics = InferenceMetrics(**{choice.model: choice.best.measured for choice in choices})
    document = {"inference": metrics.model_dump(mode="json", exclude_none=True)}
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    (directory / "metrics.json").write_text(text, encoding="utf-8")
    chosen = InferenceConfig(
        **{choice.model: choice.precision for choice in choices},
        **{f"{choice.model}_peaks": choice.peaks for choice in choices},
    )
    text = chosen.model_dump_json(indent=2) + "\n"
    (directory / INFERENCE).write_text(text, encoding="utf-8")


def main() -> None:
    """Parse, measure, report."""
    config = parse(OptimiseConfig)
    choices = optimise(config)
    if not choices:
        return
    table = Table("model", "precision", "ms", "NDCG@10", "served")
    for choice in choices:
        fp32 = choice.tried[0].measured.fp32
        rows = [(Precision.FP32, choice.fp32_s, fp32)] + [
            (each.measured.precision, each.seconds, each.measured.faster) for each in choice.tried
        ]
        for precision, seconds, ndcg in rows:
            served = "yes" if precision is choice.precision else ""
            table.add_row(choice.model, precision, f"{seconds * 1000:.2f}", f"{ndcg:.4f}", served)
    console.print(table)
    sys.stdout.write(f"precision: {config.pipeline / INFERENCE}\n")


if __name__ == "__main__":
    run(main)
