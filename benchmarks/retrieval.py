"""Candidate retrieval over a large catalogue: time, recall and memory, on one core.

``python -m benchmarks.retrieval --items 1000000`` generates vectors, builds each kind of index,
and asks each, one query at a time, in a process of its own with one thread. Then it does the same
to a whole retriever: every source that a catalogue of this size can have, from a pipeline directory
filled with generated weights, with indexes of the kind that ``--index`` names.

The vectors lie around cluster centres, with noise whose spectrum decays like that of text vectors.
The queries are other vectors of the same making ("items") and means of a few neighbouring ones
("histories"); none of them is in the index, and none has tuned it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.catalogue import (
    RETRIEVER,
    RetrievalBenchmark,
    build_index,
    build_retriever,
    generate,
    histories_like_people,
    truth,
)
from benchmarks.harness.machine import describe, today
from benchmarks.harness.tables import table
from fusionrec.allocator import keep_memory
from fusionrec.config import parse
from fusionrec.data.histories import Histories
from fusionrec.progress import console
from fusionrec.residence import read_in
from fusionrec.retrieval import index as indexes
from fusionrec.serving.pipeline import Pipeline, Stage
from jobs.entry import run

LIMIT_MS, LIMIT_GIB, LEAST_RECALL = 10.0, 3.0, 0.95
COLUMNS = (
    "index",
    "build, s",
    "on disk, GiB",
    "effort",
    "recall@100 of items",
    "of histories",
    "p50, ms",
    "p99, ms",
    "resident, GiB",
    "of it mapped",
)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def ask_index(config: RetrievalBenchmark, place: Path) -> dict[str, Any]:
    """Time and recall of single queries."""
    index = indexes.load(place)
    queries = np.load(config.folder / "queries.npy")
    exact = np.load(config.folder / "truth.npy")
    nothing = Histories.of([[]])
    for query in queries[:20]:
        index.top_unseen(query[None], nothing, 100)
    seconds, found = [], []
    for query in queries:
        start = time.perf_counter()
        items, _ = index.top_unseen(query[None], nothing, 100)
        seconds.append(time.perf_counter() - start)
        found.append(items[0])
    return {
        **_times(seconds),
        **_recall(found, exact),
        "effort": index.report.effort,
        **_memory(),
    }


def ask_retriever(config: RetrievalBenchmark, place: Path) -> dict[str, Any]:
    """Time of single histories through every source and the fusion; recall of its text vectors."""
    keep_memory()  # this, and what is read in, as in a replica
    pipeline = Pipeline.load(place, stages=frozenset({Stage.RETRIEVER}))
    read_in(place)
    queries = np.load(config.folder / "queries.npy")
    asked = histories_like_people(config, len(queries), config.seed + 9).with_vectors(queries)
    parts: dict[str, list[float]] = {source.name: [] for source in pipeline.sources}
    seconds = []
    for row in range(len(queries)):
        history = asked.slice(row, row + 1)
        start = time.perf_counter()
        fused = pipeline.retrieve(history)
        seconds.append(time.perf_counter() - start)
        assert (fused.items[0] >= 0).sum() > 100, "too few candidates for a fair measurement"
    memory = _memory()
    for row in range(min(200, len(queries))):
        history = asked.slice(row, row + 1)
        items = pipeline.candidates(history).items
        for source in pipeline.sources:
            start = time.perf_counter()
            answer = source.ask(history)
            answer.top(pipeline.config.candidates)
            answer.score(items)
            parts[source.name].append(1000 * (time.perf_counter() - start))
    found = {name: round(float(np.median(times)), 2) for name, times in parts.items()}
    [semantic] = [source for source in pipeline.sources if source.name == "semantic"]
    bare = Histories.of([[]] * len(queries)).with_vectors(queries)
    recall = _recall(semantic.top(bare, 100).items, np.load(config.folder / "truth.npy"))
    return {**_times(seconds[20:]), **memory, **recall, "parts": found}


def _recall(found: Any, exact: Any) -> dict[str, float]:
    """Share of the nearest 100 items among those found; the queries' halves are their kinds."""
    recall = [np.isin(wanted, items).mean() for items, wanted in zip(found, exact, strict=True)]
    half = len(recall) // 2
    return {
        "recall_items": float(np.mean(recall[:half])),
        "recall_histories": float(np.mean(recall[half:])),
    }


def _times(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


def _memory() -> dict[str, float]:
    """GiB resident in this process, and how much of that is mapped from files and shared."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = {
        name: int(re.search(rf"{name}:\s+(\d+)", text)[1]) / 2**20  # type: ignore[index]
        for name in ("VmRSS", "RssFile")
    }
    return {"rss_gib": found["VmRSS"], "mapped_gib": found["RssFile"]}


def measure(config: RetrievalBenchmark, name: str) -> dict[str, Any]:
    """Build ``name`` in one process and ask it in another; what came of it."""
    place = config.folder / name.replace(" ", "-")
    start = time.perf_counter()
    _child(config, f"build {name}")
    seconds = time.perf_counter() - start
    os.sync()  # else what was built is written to the disk while it is asked
    found: dict[str, Any] = json.loads(_child(config, f"ask {name}"))
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    return {"name": name, "build_s": seconds, "disk_gib": size / 2**30, **found}


def _child(config: RetrievalBenchmark, task: str) -> str:
    """Run a task in a fresh process with one thread; its standard output."""
    settings = config.model_copy(update={"ask": task}).model_dump(mode="json")
    path = config.folder / "task.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "benchmarks.retrieval", "--config", str(path)]
    done = subprocess.run(
        command, env={**os.environ, **_ONE_THREAD}, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def work(config: RetrievalBenchmark) -> None:
    """What a child does."""
    assert config.ask is not None
    task, name = config.ask.split(" ", 1)
    place = config.folder / name.replace(" ", "-")
    if task == "make":
        generate(config)
        truth(config)
    elif task == "build" and name == RETRIEVER:
        build_retriever(config, place)
    elif task == "build":
        build_index(config, name, place)
    else:
        ask = ask_retriever if name == RETRIEVER else ask_index
        sys.stdout.write(json.dumps(ask(config, place)))


def report(config: RetrievalBenchmark, found: list[dict[str, Any]]) -> str:
    """The table, as Markdown."""
    lines = [
        f"# Retrieval over {config.items:,} items, {today()}",
        "",
        describe(),
        "",
        f"{config.items:,} vectors of {config.dimension} dimensions around {config.clusters:,} "
        f"centres; {config.queries:,} single queries on one thread, the nearest 100 each; indexes "
        f"tuned to recall {config.recall} on other vectors. Of the resident memory, what is mapped "
        "from files is held once for all processes of a node.",
        "",
        table(COLUMNS, [_cells(each) for each in found]),
    ]
    for each in found:
        if "parts" in each:
            parts = ", ".join(f"{name} {ms}" for name, ms in each["parts"].items())
            recall = min(each["recall_items"], each["recall_histories"])
            holds = (
                each["p99_ms"] < LIMIT_MS and each["rss_gib"] < LIMIT_GIB and recall >= LEAST_RECALL
            )
            lines += [
                f"Of the {each['name']} (index: {config.index}), 150 candidates a source, the "
                f"medians in ms: {parts}. Its recall is that of the text vectors.",
                f"Under {LIMIT_MS:.0f} ms p99 and {LIMIT_GIB:.0f} GiB at a recall@100 of at least "
                f"{LEAST_RECALL}: {'yes' if holds else 'no'}.",
            ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _cells(each: dict[str, Any]) -> list[str]:
    return [
        each["name"],
        f"{each['build_s']:.0f}",
        f"{each['disk_gib']:.2f}",
        str(each.get("effort") or ""),
        f"{each['recall_items']:.3f}",
        f"{each['recall_histories']:.3f}",
        f"{each['p50_ms']:.2f}",
        f"{each['p99_ms']:.2f}",
        f"{each['rss_gib']:.2f}",
        f"{each['mapped_gib']:.2f}",
    ]


def main() -> None:
    """Generate, measure each, report."""
    config = parse(RetrievalBenchmark)
    if config.ask is not None:
        work(config)
        return
    config.folder.mkdir(parents=True, exist_ok=True)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        _child(config, "make vectors")
        found = []
        for name in (*config.kinds, *([RETRIEVER] if config.whole else [])):
            console.print(f"== {name}")
            found.append(measure(config, name))
            shutil.rmtree(config.folder / name.replace(" ", "-"))
            text = report(config, found)
            config.out.write_text(text, encoding="utf-8")
    finally:
        shutil.rmtree(config.folder, ignore_errors=True)
    sys.stdout.write(text)


if __name__ == "__main__":
    run(main)
