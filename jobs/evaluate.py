"""Measure a pipeline: every source alone, the fused list, the reranked list, and any other run.

Writes ``report.json``, ``report.md`` and ``report.html``. The served list's metrics are also kept
in the pipeline directory (``metrics.json``, and on the validation part ``validation.parquet``),
where publishing and its gate find them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from fusionrec.bundles.gate import write_cases
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.splits import Cases, Protocol, split
from fusionrec.errors import ConfigError
from fusionrec.evaluation.evaluate import measure, measure_run
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.orders import OrderSensitivity, order_sensitivity
from fusionrec.evaluation.render import off_sentence, orders_sentence, sentence, write
from fusionrec.evaluation.report import EvaluationConfig, Report, build
from fusionrec.evaluation.run import read_run, write_run
from fusionrec.evaluation.significance import BootstrapConfig
from fusionrec.evaluation.systems import Measured
from fusionrec.progress import bar
from fusionrec.serving.pipeline import Pipeline, Stage
from jobs.entry import run


class EvaluateConfig(JobConfig):
    """Measure a pipeline on a data set; write the report as JSON, Markdown and HTML."""

    pipeline: Path
    """The directory that jobs.fit and the jobs after it wrote."""
    dataset: Path
    """The data set that the pipeline was fitted on."""
    out: Path = Path("artifacts/report")
    """Directory of the report; made if missing."""
    protocol: Protocol | None = None
    """leave-one-out or global-time; it must be the one that the pipeline was fitted under."""
    part: Literal["test", "validation"] = "test"
    """The cases to measure on."""
    export_run: Path | None = None
    """Parquet file for the served lists: user_id, item_id, rank, score, the first 100 of each."""
    against: Path | None = None
    """A run in the same format to compare the served list with, user by user."""
    top_k: int = Field(10, ge=1, le=100)
    """Length of the lists that the metrics look at."""
    draws: int = Field(2000, ge=100)
    """Number of bootstrap resamples."""
    seed: int = Field(0, ge=0)
    """Seed of the bootstrap."""
    order_cases: int = Field(100, ge=0)
    """Cases on which a reranker that reads its candidates together (a decoder with letters) is
    shown them in other orders as well, to measure what that changes; more are sampled, 0: none."""


def evaluate(config: EvaluateConfig) -> Report:
    """Measure, write, report.

    Raises:
        ConfigError: the pipeline was fitted on other data or under another protocol.
        DataError: the data set or the other run cannot be used.
    """
    start = time.perf_counter()
    dataset = Dataset.open(config.dataset)
    pipeline = Pipeline.load(config.pipeline)
    off = pipeline.off()
    fitted = pipeline
    if off:  # They are measured alone all the same.
        stages = frozenset({Stage.EMBEDDER, Stage.RETRIEVER})
        fitted = Pipeline.load(config.pipeline, stages=stages, weighed=False)
    parts = split(dataset, _protocol(config, pipeline, dataset))
    cases = parts.test if config.part == "test" else parts.validation
    user_ids = [parts.user_ids[user] for user in cases.users]
    runs = []  # Read first: a mistake in it is said before the minutes of measuring.
    if config.against is not None:
        lists = read_run(config.against, user_ids, pipeline.catalogue)
        runs.append(measure_run(f"run {config.against}", lists, cases, config.top_k))
    measured = measure(pipeline, cases, parts.item_counts, config.top_k, fitted)
    served = measured[-1]
    orders = _orders(pipeline, cases, config)
    with bar("comparing the rankings by bootstrap", None):
        report = build(
            [*measured, *runs],
            cases,
            dataset=dataset.info,
            protocol=parts.protocol,
            part=config.part,
            catalogue=pipeline.catalogue,
            item_counts=parts.item_counts,
            vectors=pipeline.item_vectors,
            weights=pipeline.weights(),
            off=off,
            fallback=pipeline.fusion.fallback,
            orders=orders,
            seconds=time.perf_counter() - start,
            config=EvaluationConfig(
                k=config.top_k, bootstrap=BootstrapConfig(draws=config.draws, seed=config.seed)
            ),
        )
    write(report, config.out)
    _keep(config, report, served, user_ids)
    if config.export_run is not None:
        write_run(config.export_run, user_ids, served.items, served.scores, pipeline.catalogue)
    return report


def _protocol(config: EvaluateConfig, pipeline: Pipeline, dataset: Dataset) -> Protocol:
    """The protocol to split by, after checking that nothing of the cases was fitted on."""
    fitted = pipeline.config
    if fitted.dataset.fingerprint != dataset.info.fingerprint:
        raise ConfigError(
            f"--dataset {config.dataset} is {dataset.info.name} "
            f"({dataset.info.fingerprint[:12]}), but pipeline {config.pipeline} was fitted on "
            f"{fitted.dataset.name} ({fitted.dataset.fingerprint[:12]}): give that data set"
        )
    if config.protocol not in (None, fitted.protocol):
        raise ConfigError(
            f"--protocol {config.protocol} would measure on events that pipeline "
            f"{config.pipeline} was fitted on under {fitted.protocol}: fit it again with "
            f"--protocol {config.protocol}"
        )
    return fitted.protocol


def _orders(pipeline: Pipeline, cases: Cases, config: EvaluateConfig) -> OrderSensitivity | None:
    """What the order of the candidates does to the reranker, where it can do anything."""
    reranker = pipeline.reranker
    if reranker is None or not reranker.reads_lists or not config.order_cases:
        return None
    asked = cases.sample(config.order_cases, config.seed).histories
    with bar("showing the reranker other orders", None):
        top = pipeline.recommend(asked, rerank=False).items[:, : pipeline.config.rerank_top]
        return order_sensitivity(pipeline.rerank_scores, asked, top, seed=config.seed)


def _keep(config: EvaluateConfig, report: Report, served: Measured, user_ids: list[str]) -> None:
    """Leave the served list's metrics where publishing and the gate look for them."""
    path = config.pipeline / "metrics.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept[config.part] = {
        f"{name}@{config.top_k}": found.model_dump()
        for name, found in report.served.metrics.items()
    }
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if config.part == "validation":
        write_cases(config.pipeline, user_ids, METRICS["ndcg"](served.ranks, 10))


def main() -> None:
    """Parse, evaluate, say what was found and where it lies."""
    config = parse(EvaluateConfig)
    report = evaluate(config)
    for found in report.comparisons:
        if found.metric == "ndcg":
            sys.stdout.write(sentence(found, config.top_k).replace("**", "") + "\n")
    if report.off or report.fallback:
        sys.stdout.write(off_sentence(report.off, report.fallback) + "\n")
    if report.orders is not None:
        sys.stdout.write(orders_sentence(report.orders) + "\n")
    sys.stdout.write(f"report: {config.out / 'report.html'}\n")
    if config.export_run is not None:
        sys.stdout.write(f"run: {config.export_run}\n")


if __name__ == "__main__":
    run(main)
