"""Time of a trial of the fusion's search, beside that of other ways to evaluate weights.

``python -m benchmarks.fusion --data FOLDER`` fits the quick sources on raw data and searches over
what they propose for every validation case; without ``--data``, over made-up candidates. A trial is
that of ``tuning.fusion``. Beside it, on the same candidates: the same trial as a Ray task of its
own, the campaign as it runs (Ray Tune, actors, journal), and ranx's ``optimize_fusion`` where the
extra ``ranx`` is installed.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import ray
from pydantic import Field

from benchmarks.harness.candidates import Material, made_up, of_data
from benchmarks.harness.machine import describe, today
from benchmarks.harness.tables import spread, table
from fusionrec.config import JobConfig, parse
from fusionrec.data.histories import FloatArray
from fusionrec.fusion.normalisation import Normalisation, scales
from fusionrec.fusion.objective import Objective
from jobs import cluster
from jobs.entry import run
from tuning.fusion import TOGETHER, FusionCampaign, search, value

BOUND_MS = 25.0
"""A trial is held to this on the 22,363 cases of Amazon Beauty."""
LIST = 100
"""Places of a source's list that ranx is given: fewer than the trials here weigh."""
MADE_UP = (10_000, 580)
"""Cases whose target is among their candidates, and these: about as many as on Amazon Beauty."""
K = 10


class FusionBenchmark(JobConfig):
    """Measure a trial of the fusion's search."""

    data: Path | None = None
    """Raw data in any format that jobs.ingest reads; by default candidates are made up."""
    cases: int = Field(default=MADE_UP[0], ge=1)
    """Cases to make up."""
    out: Path = Path("artifacts/benchmarks/fusion")
    """Folder of data set, pipeline and report; what is there is replaced."""
    trials: int = Field(default=200, ge=2 * TOGETHER)
    """Settings that are evaluated, each way."""
    ranx: bool = True
    """Whether to measure ranx, which takes minutes."""
    seed: int = Field(default=0, ge=0)
    """Of the settings, and of what is made up."""


def drawn(sources: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Parameters of ``count`` trials, from the space that ``tuning.fusion`` searches."""
    generator = np.random.default_rng(seed)
    methods = [str(method) for method in Normalisation]
    return [
        {
            "normalisation": methods[number % len(methods)],
            "cold_factor": float(generator.uniform(0, 2)),
            **{f"weight.{name}": float(generator.random()) for name in sources},
        }
        for number in range(count)
    ]


def in_place(
    objectives: dict[str, Objective], sources: tuple[str, ...], settings: list[dict[str, Any]]
) -> tuple[list[float], list[float]]:
    """Values and milliseconds of each trial in this process, in one thread."""
    value(settings[0], objectives, sources)
    values, spent = [], []
    for each in settings:
        began = time.perf_counter()
        values.append(value(each, objectives, sources))
        spent.append((time.perf_counter() - began) * 1e3)
    return values, spent


def in_tasks(
    objectives: dict[str, Objective], sources: tuple[str, ...], settings: list[dict[str, Any]]
) -> tuple[list[float], float]:
    """Values, and milliseconds a trial where each is a Ray task, as many at a time as CPUs."""
    task: Any = ray.remote(num_cpus=1)(value)
    held = ray.put(objectives)
    ray.get([task.remote(each, held, sources) for each in settings[:8]])
    began = time.perf_counter()
    values = ray.get([task.remote(each, held, sources) for each in settings])
    return values, (time.perf_counter() - began) * 1e3 / len(settings)


def in_campaign(
    objectives: dict[str, Objective], sources: tuple[str, ...], config: FusionBenchmark
) -> tuple[float, float]:
    """Seconds of the search of a campaign, and milliseconds a trial once a batch has ended."""
    out = config.out / "campaign"
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    study = search(
        FusionCampaign(pipeline=out, dataset=out, out=out, trials=config.trials, seed=config.seed),
        objectives,
        sources,
    )
    seconds = time.perf_counter() - began
    ends = sorted(each.datetime_complete for each in study.trials if each.datetime_complete)
    first = TOGETHER - 1  # the end of the first batch
    return seconds, (ends[-1] - ends[first]).total_seconds() * 1e3 / (len(ends) - 1 - first)


def ranx_ms(material: Material, source_scales: FloatArray) -> float:
    """Milliseconds a weight vector of ranx's ``optimize_fusion``, compiled before.

    Its smallest grid is asked for: each source alone, which takes as long as any other weights.
    """
    from ranx import Qrels, Run, optimize_fusion

    found, targets = material.candidates, material.targets
    runs: list[dict[str, dict[str, float]]] = []
    for scores, scale in zip(found.scores, source_scales, strict=True):
        ranked = np.where(found.items >= 0, scores / scale, -np.inf)
        best = np.argsort(-ranked, axis=1, kind="stable")[:, :LIST]
        items = np.take_along_axis(found.items, best, axis=1).tolist()
        values = np.take_along_axis(ranked, best, axis=1).tolist()
        runs.append(
            {
                str(case): {str(i): v for i, v in zip(*each, strict=True) if i >= 0}
                for case, each in enumerate(zip(items, values, strict=True))
            }
        )
    qrels = {str(case): dict.fromkeys(map(str, targets.row(case)), 1) for case in range(len(found))}

    def seconds(cases: Sequence[str]) -> float:
        asked = Qrels({case: qrels[case] for case in cases})
        ours = [Run({case: each[case] for case in cases}) for each in runs]
        began = time.perf_counter()
        optimize_fusion(asked, ours, norm=None, metric=f"ndcg@{K}", step=1.0, show_progress=False)
        return time.perf_counter() - began

    cases = list(qrels)
    seconds(cases[:50])
    return seconds(cases) * 1e3 / len(runs)


def measure(config: FusionBenchmark) -> str:
    """The report."""
    machine = describe()
    if config.data is None:
        material = made_up(config.cases, MADE_UP[1], config.seed)
    else:
        material = of_data(config.data, config.out)
    found, sources = material.candidates, material.sources
    source_scales = scales(found)
    objectives = {
        str(method): Objective.of(found, material.targets, method, source_scales, material.cold, K)
        for method in Normalisation
    }
    settings = drawn(sources, config.trials, config.seed)
    values, spent = in_place(objectives, sources, settings)
    with cluster.start():
        from_tasks, task_ms = in_tasks(objectives, sources, settings)
        campaign_s, campaign_ms = in_campaign(objectives, sources, config)
    assert from_tasks == values, "a task says something else than the same trial in this process"
    median_ms = float(np.median(spent))
    rows = [
        ("a trial of tuning.fusion, one thread", spread(spent, 1)),
        ("one Ray task per trial", f"{task_ms:.1f}"),
        (f"the campaign's search, {campaign_s:.1f} s for {config.trials}", f"{campaign_ms:.1f}"),
    ]
    note = ""
    if find_spec("ranx") is None:
        note = "ranx is not here: `pip install 'fusionrec[ranx]'` brings it.\n"
    elif config.ranx:
        their_ms = ranx_ms(material, source_scales)
        rows.append((f"ranx optimize_fusion, {len(sources)} runs of {LIST}", f"{their_ms:.0f}"))
        note = f"ranx takes {their_ms / median_ms:,.0f} × as long as a trial.\n"
    held = "held" if median_ms < BOUND_MS else "missed"
    valid = (found.items >= 0).sum(axis=1)
    name = "made-up candidates" if config.data is None else config.data.resolve().name
    return (
        f"# Trials of the fusion on {name}, {today()}\n\n{machine}\n\n"
        f"{len(found):,} cases, {len(sources)} sources, {valid.mean():.0f} candidates a case; "
        f"a target is among them in {len(objectives['scale'].rows):,} cases.\n\n"
        + table(("", "ms a weight vector"), rows)
        + f"\n{note}A trial under {BOUND_MS:.0f} ms: {held}.\n"
    )


def main() -> None:
    """Parse, measure, print the report."""
    config = parse(FusionBenchmark)
    report = measure(config)
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / f"fusion-{today()}.md"
    path.write_text(report, encoding="utf-8")
    sys.stdout.write(f"{report}\nreport: {path}\n")


if __name__ == "__main__":
    run(main)
