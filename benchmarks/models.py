"""How fast the encoder and the reranker run on this machine, by runtime, and what that costs.

``python -m benchmarks.models --pipeline DIR --dataset DIR`` reads a pipeline directory with both
models. Each runtime encodes the same texts of histories and scores the same pairs, in batches of
similar length, with one thread and with as many as there are cores. What a faster one costs is said
three ways: the cosine of its vectors to those of torch in float32 (or the correlation of its
scores), and the NDCG@10 on validation cases of the semantic source alone, of the fused list, and of
the order that the reranker alone gives to the head of the fused list.

Where there is a GPU, both are measured there, too: kernel by kernel, and as CUDA graphs, which is
how a bundle is served. ONNX Runtime and OpenVINO are measured where the extra ``runtimes`` is
installed; the library needs neither.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from benchmarks.harness.machine import describe, today
from benchmarks.harness.runtimes import (
    PACKAGES,
    Forward,
    Run,
    WholeEncoder,
    WholeReranker,
    exported_runtimes,
    gpu_runtimes,
    missing_packages,
    torch_runtimes,
)
from benchmarks.harness.tables import table
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import FloatArray
from fusionrec.data.splits import Cases, split
from fusionrec.data.text import history_texts, item_text
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.ranks import list_ranks
from fusionrec.fusion.model import Fused
from fusionrec.language.encoder import Encoder
from fusionrec.language.inference import pad
from fusionrec.language.reranker import Reranker
from fusionrec.language.tokens import Row, tokenize
from fusionrec.progress import console
from fusionrec.serving.pipeline import Pipeline
from jobs.entry import run


class ModelBenchmark(JobConfig):
    """Measure the language models of a pipeline under every runtime that is installed."""

    pipeline: Path
    """Pipeline directory with an encoder; with a reranker, that is measured too."""
    dataset: Path
    """The data set that it was fitted on."""
    cases: int = Field(default=600, ge=20)
    """Validation cases whose texts are encoded, and on which NDCG is measured."""
    reranked: int = Field(default=100, ge=5)
    """Of these, cases whose candidates are scored by the reranker."""
    batch_size: int = Field(default=32, ge=1)
    """Texts of one pass: what the endpoint gathers under load."""
    threads: tuple[int, ...] = ()
    """Of a forward pass; by default one, then as many as there are cores."""
    repetitions: int = Field(default=3, ge=1)
    """Passes over the texts; the fastest counts."""
    runtimes: tuple[str, ...] = ()
    """Only runtimes whose name contains one of these; by default all."""
    out: Path = Path("artifacts/benchmarks/models.md")
    """The report."""
    seed: int = Field(default=0, ge=0)
    """Of the sample of cases."""


def in_batches(
    tokenizer: Any, rows: Sequence[Row], forward: Forward, batch_size: int
) -> FloatArray:
    """``forward`` of all rows, in batches of similar length; results in the rows' order."""
    order = np.argsort([-len(row["input_ids"]) for row in rows], kind="stable")
    results = [
        forward(pad(tokenizer, [rows[row] for row in order[start : start + batch_size]]))
        for start in range(0, len(order), batch_size)
    ]
    out: FloatArray = np.empty((len(rows), *results[0].shape[1:]), dtype=np.float32)
    out[order] = np.concatenate(results)
    return out


@dataclass(frozen=True, slots=True)
class Work:
    """What one model has to do, and how its results are judged."""

    name: str
    make: Callable[[], torch.nn.Module]
    load: Callable[..., Encoder | Reranker]
    """As a bundle loads it, by ``device``, ``precision`` and ``frozen``."""
    tokenizer: Any
    rows: Sequence[Row]
    judge: Callable[[FloatArray, FloatArray], dict[str, float]]
    """Of results, and those of torch in float32."""


def encoder_work(config: ModelBenchmark, pipeline: Pipeline, cases: Cases) -> Work:
    """Texts of histories → vectors."""
    encoder = pipeline.encoder
    assert encoder is not None
    texts = history_texts(pipeline.catalogue, cases.histories, encoder.config.history_items)
    semantic = [s for s in pipeline.sources if s.name == "semantic"]

    def judge(found: FloatArray, exact: FloatArray) -> dict[str, float]:
        histories = cases.histories.with_vectors(found)
        cosines = (found * exact).sum(axis=1)
        ranked = semantic[0].top(histories, 10)
        fused = pipeline.retrieve(histories)
        return {
            "mean cosine": float(cosines.mean()),
            "least cosine": float(cosines.min()),
            "NDCG@10 semantic": ndcg(ranked.items, ranked.scores, cases),
            "NDCG@10 fused": ndcg(fused.items, fused.scores, cases),
        }

    def make() -> torch.nn.Module:
        fresh = Encoder.load(config.pipeline / "encoder", device="cpu")
        return WholeEncoder(fresh.model, fresh.config.pooling).eval()

    rows = tokenize(encoder.tokenizer, encoder.config.max_tokens, texts)
    load = partial(Encoder.load, config.pipeline / "encoder")
    return Work("encoder", make, load, encoder.tokenizer, rows, judge)


def reranker_work(config: ModelBenchmark, pipeline: Pipeline, cases: Cases, fused: Fused) -> Work:
    """Pairs of a history and a candidate → logits."""
    reranker = pipeline.reranker
    assert reranker is not None
    items = fused.items[:, : pipeline.config.rerank_top]
    asked = history_texts(pipeline.catalogue, cases.histories, reranker.config.history_items)
    at = [(row, place) for row, place in np.argwhere(items >= 0).tolist()]
    firsts = [asked[row] for row, _ in at]
    seconds = [item_text(pipeline.catalogue, int(items[row, place])) for row, place in at]

    def judge(found: FloatArray, exact: FloatArray) -> dict[str, float]:
        scores = np.full(items.shape, -np.inf, dtype=np.float32)
        scores[tuple(np.array(at).T)] = found[:, 0]
        return {
            "correlation": float(np.corrcoef(found[:, 0], exact[:, 0])[0, 1]),
            "NDCG@10 reranked": ndcg(items, scores, cases),
        }

    def make() -> torch.nn.Module:
        fresh = Reranker.load(config.pipeline / "reranker", device="cpu")
        return WholeReranker(fresh.model).eval()

    rows = tokenize(reranker.tokenizer, reranker.config.max_tokens, firsts, seconds)
    load = partial(Reranker.load, config.pipeline / "reranker")
    return Work("reranker", make, load, reranker.tokenizer, rows, judge)


def ndcg(items: Any, scores: FloatArray, cases: Cases) -> float:
    """Mean over the cases."""
    ranks = list_ranks(np.asarray(items), scores, cases.targets)
    return float(METRICS["ndcg"](ranks, 10).mean())


def measure(
    config: ModelBenchmark, work: Work, threads: int, exports: Path
) -> list[dict[str, Any]]:
    """A row for each runtime; exported models are kept in the folder ``exports``."""
    torch.set_num_threads(threads)
    lengths = sorted((row for row in work.rows), key=lambda row: -len(row["input_ids"]))
    calibration = [
        pad(work.tokenizer, lengths[start : start + config.batch_size])
        for start in range(0, len(lengths), max(1, len(lengths) // 8))
    ]
    exact: FloatArray | None = None
    found = []
    forwards = torch_runtimes(work.make, calibration)
    forwards |= exported_runtimes(work.make, calibration, exports, threads)
    runtimes: dict[str, Callable[[], Run]] = {
        name: partial(_batched, prepare, work.tokenizer, config.batch_size)
        for name, prepare in forwards.items()
    }
    if torch.cuda.is_available():
        runtimes |= gpu_runtimes(work.load, config.batch_size, "cuda")
    for name, prepare in runtimes.items():
        if exact is not None and not any(part in name for part in config.runtimes or ("",)):
            continue
        start = time.perf_counter()
        run_all = prepare()
        result = run_all(work.rows)
        preparation = time.perf_counter() - start
        seconds = []
        for _ in range(config.repetitions):
            start = time.perf_counter()
            result = run_all(work.rows)
            seconds.append(time.perf_counter() - start)
        exact = result if exact is None else exact
        start = time.perf_counter()
        for _ in range(20):
            run_all(work.rows[:1])
        found.append(
            {
                "runtime": name,
                "threads": threads,
                "items/s": len(work.rows) / min(seconds),
                "one, ms": (time.perf_counter() - start) / 20 * 1000,
                "first pass, s": preparation,
                **work.judge(result, exact),
            }
        )
        console.print(found[-1])
    return found


def _batched(prepare: Callable[[], Forward], tokenizer: Any, batch_size: int) -> Run:
    forward = prepare()
    return lambda rows: in_batches(tokenizer, rows, forward, batch_size)


def padding(work: Work, batch_size: int) -> str:
    """How much of the model's work is on padding."""
    lengths = np.sort([len(row["input_ids"]) for row in work.rows])[::-1]
    padded = sum(
        lengths[start] * len(lengths[start : start + batch_size])
        for start in range(0, len(lengths), batch_size)
    )
    arrival = [len(row["input_ids"]) for row in work.rows]
    unsorted = sum(
        max(arrival[start : start + batch_size]) * len(arrival[start : start + batch_size])
        for start in range(0, len(arrival), batch_size)
    )
    real = lengths.sum()
    return (
        f"{len(lengths)} texts of {lengths[-1]} to {lengths[0]} tokens, {lengths.mean():.1f} in "
        f"the mean: batches of {batch_size} by length are {1 - real / padded:.1%} padding, as they "
        f"come {1 - real / unsorted:.1%}."
    )


def report(tables: list[tuple[Work, str, list[dict[str, Any]]]]) -> str:
    """Markdown."""
    extra = () if missing_packages() else PACKAGES
    lines = [f"# Language models by runtime, {today()}", "", describe(extra)]
    for work, waste, rows in tables:
        cells = [[_cell(name, value) for name, value in row.items()] for row in rows]
        lines += ["", f"## The {work.name}", "", waste, "", table(list(rows[0]), cells).rstrip()]
    return "\n".join(lines) + "\n"


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if "NDCG" in name or "cos" in name or "corr" in name else f"{value:.1f}"


def main() -> None:
    """Measure both models, report."""
    config = parse(ModelBenchmark)
    dataset = Dataset.open(config.dataset)
    pipeline = Pipeline.load(config.pipeline)
    cases = split(dataset, pipeline.config.protocol).validation
    generator = np.random.default_rng(config.seed)
    cases = cases.take(np.sort(generator.permutation(len(cases))[: config.cases]))
    works = [encoder_work(config, pipeline, cases)]
    if pipeline.reranker is not None:
        some = cases.take(np.arange(min(config.reranked, len(cases))))
        fused = pipeline.retrieve(pipeline.embed(some.histories))
        works.append(reranker_work(config, pipeline, some, fused))
    if sentence := missing_packages():
        console.print(sentence)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    tables = []
    for work in works:
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for threads in config.threads or sorted({1, len(os.sched_getaffinity(0))}):
                rows += measure(config, work, threads, Path(folder))
        tables.append((work, padding(work, config.batch_size), rows))
        config.out.write_text(report(tables), encoding="utf-8")
    sys.stdout.write(report(tables))


if __name__ == "__main__":
    run(main)
