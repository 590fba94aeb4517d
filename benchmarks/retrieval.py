"""Candidate retrieval over a large catalogue: time, recall and memory, on one core.

``python -m benchmarks.retrieval --items 1000000`` generates vectors, builds each kind of index,
and asks each, one query at a time, in a process of its own with one thread. Then it does the same
to a whole retriever: every source that a catalogue of this size can have, from a pipeline directory
filled with generated weights.

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
from typing import Any, Literal

import numpy as np
from pydantic import Field

from benchmarks.harness.machine import describe, today
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import DatasetInfo
from fusionrec.data.histories import FloatArray, Histories
from fusionrec.data.splits import Protocol
from fusionrec.progress import bar, console
from fusionrec.retrieval import index as indexes
from fusionrec.retrieval.index import IndexConfig
from fusionrec.retrieval.rows import SparseRows
from fusionrec.serving.pipeline import Pipeline, PipelineConfig, Stage
from fusionrec.sources.bm25 import BM25, BM25Config
from fusionrec.sources.ials import IALS, IALSConfig
from fusionrec.sources.item_item import ItemItem, ItemItemConfig
from fusionrec.sources.item_knn import ItemKNN
from fusionrec.sources.popularity import Popularity
from fusionrec.sources.protocol import Source, TrainingData
from fusionrec.sources.semantic import Semantic
from fusionrec.sources.transitions import Transitions
from jobs.entry import run

RETRIEVER = "whole retriever"
LIMIT_MS, LIMIT_GIB = 10.0, 3.0
_BLOCK = 50_000
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class RetrievalBenchmark(JobConfig):
    """Measure retrieval on generated catalogues."""

    items: int = Field(default=100_000, ge=1000)
    """Size of the catalogue."""
    dimension: int = Field(default=384, ge=8)
    """Of the text vectors."""
    clusters: int = Field(default=2000, ge=1)
    """Centres that the vectors lie around."""
    neighbours: int = Field(default=100, ge=1)
    """Mean number of neighbours of an item in item-knn and transitions."""
    words: int = Field(default=20, ge=1)
    """Distinct words of an item."""
    queries: int = Field(default=1000, ge=10)
    """Queries, half of each kind."""
    kinds: tuple[Literal["flat", "hnsw", "ivf", "ivfpq"], ...] = ("flat", "hnsw", "ivf", "ivfpq")
    """Indexes to compare."""
    recall: float = Field(default=0.95, gt=0, le=1)
    """Recall@100 that the approximate ones are tuned to."""
    whole: bool = True
    """Whether to measure a whole retriever too."""
    folder: Path = Path("artifacts/benchmarks/retrieval")
    """Where vectors, indexes and the pipeline go; removed at the end."""
    out: Path = Path("artifacts/benchmarks/retrieval.md")
    """The report."""
    seed: int = Field(default=0, ge=0)
    """Of everything that is generated."""
    ask: str | None = None
    """Internal: measure what lies in this part of the folder, and print it as JSON."""


def generate(config: RetrievalBenchmark) -> None:
    """Write ``items.npy`` [I, D] and ``queries.npy`` [Q, D], both of unit length."""
    generator = np.random.default_rng(config.seed)
    dimension = config.dimension
    spectrum = (1.0 + np.arange(dimension) / 16) ** -0.5
    spectrum /= np.linalg.norm(spectrum)
    centres = generator.normal(size=(config.clusters, dimension)) * spectrum

    def draw(count: int) -> tuple[FloatArray, Any]:
        cluster = generator.integers(config.clusters, size=count)
        noise = generator.normal(size=(count, dimension)) * spectrum
        return unit(centres[cluster] + 0.7 * noise), cluster

    shape = (config.items, dimension)
    vectors = np.lib.format.open_memmap(
        config.folder / "items.npy", mode="w+", dtype=np.float32, shape=shape
    )
    with bar("generating vectors", config.items) as advance:
        for start in range(0, config.items, _BLOCK):
            block, _ = draw(min(_BLOCK, config.items - start))
            vectors[start : start + len(block)] = block
            advance(len(block))
    vectors.flush()
    half = config.queries // 2
    items, _ = draw(half)
    # A history: five items, all but one of a cluster.
    start_cluster = generator.integers(config.clusters, size=(half, 1)).repeat(5, axis=1)
    start_cluster[:, 4] = generator.integers(config.clusters, size=half)
    noise = generator.normal(size=(half, 5, dimension)) * spectrum
    histories = unit((centres[start_cluster] + 0.7 * noise).mean(axis=1))
    np.save(config.folder / "queries.npy", np.concatenate([items, histories]))


def unit(vectors: Any) -> FloatArray:
    """Rows of length 1, float32."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def truth(config: RetrievalBenchmark) -> None:
    """Write ``truth.npy`` [Q, 100]: the exact nearest items."""
    vectors = np.load(config.folder / "items.npy", mmap_mode="r")
    queries = np.load(config.folder / "queries.npy")
    codes: Any = np.empty((len(queries), 0), np.int64)
    scores: Any = np.empty((len(queries), 0), np.float32)
    with bar("exact neighbours", len(vectors)) as advance:
        for start in range(0, len(vectors), _BLOCK):
            found = queries @ vectors[start : start + _BLOCK].T
            more = np.argpartition(-found, 99, axis=1)[:, :100]
            codes = np.concatenate([codes, more + start], axis=1)
            scores = np.concatenate([scores, np.take_along_axis(found, more, 1)], axis=1)
            keep = np.argpartition(-scores, 99, axis=1)[:, :100]
            codes, scores = (np.take_along_axis(each, keep, 1) for each in (codes, scores))
            advance(found.shape[1])
    np.save(config.folder / "truth.npy", codes)


def build_index(config: RetrievalBenchmark, kind: Any, place: Path) -> None:
    """Build one index, tuned on vectors that are not among the queries."""
    vectors = np.load(config.folder / "items.npy", mmap_mode="r")
    settings = IndexConfig(kind=kind, recall=config.recall, seed=config.seed)
    indexes.build(vectors, settings, lambda count: _tuning(config, vectors, count)).save(place)


def _tuning(config: RetrievalBenchmark, vectors: FloatArray, count: int) -> FloatArray:
    """[count, D] vectors as of histories: between those of a few items."""
    generator = np.random.default_rng(config.seed + 1)
    chosen = generator.integers(config.items, size=count)
    return unit(vectors[chosen] + 0.5 * vectors[generator.permutation(chosen)])


def build_retriever(config: RetrievalBenchmark, place: Path) -> None:
    """Write a pipeline directory with every source but ease, which no large catalogue can have."""
    vectors = np.load(config.folder / "items.npy", mmap_mode="r")
    histories = _histories(config, config.items // 10, config.seed + 2)
    catalogue = range(config.items)  # of which a source asks the length alone
    data = TrainingData(
        catalogue,  # type: ignore[arg-type]
        histories,
        item_vectors=vectors,
        history_vectors=lambda count: _tuning(config, vectors, count),
    )
    factors = unit(vectors[:, : min(128, config.dimension)])
    sources: list[Source] = [
        Popularity().fit(data),
        ItemItem(ItemItemConfig(learner=ItemKNN(), recency=0.7), _neighbours(config, 3)),
        ItemItem(ItemItemConfig(learner=Transitions(), recency=0.5), _neighbours(config, 4)),
        IALS(
            IALSConfig(factors=factors.shape[1]),
            indexes.build(
                factors,
                IndexConfig(recall=config.recall),
                lambda count: _tuning(config, factors, count),
            ),
            np.asarray(factors.T @ factors, dtype=np.float64),
        ),
        _bm25(config),
        Semantic(IndexConfig(recall=config.recall)).fit(data),
    ]
    for source in sources:
        source.save(place / "sources" / source.name)
    np.save(place / "item_counts.npy", np.bincount(histories.items, minlength=config.items))
    settings = PipelineConfig(
        dataset=DatasetInfo(
            name="generated",
            format="table",
            fingerprint="0" * 64,
            num_interactions=len(histories.items),
            num_users=len(histories),
            num_items=config.items,
        ),
        protocol=Protocol.LEAVE_ONE_OUT,
        sources=tuple(source.name for source in sources),
        candidates=150,
    )
    (place / "pipeline.json").write_text(settings.model_dump_json(), encoding="utf-8")


def _popular(config: RetrievalBenchmark, generator: np.random.Generator, count: int) -> Any:
    """Codes of items, a few of which are asked for most of the time."""
    return (config.items * generator.random(count) ** 3).astype(np.int32)


def _histories(config: RetrievalBenchmark, count: int, seed: int) -> Histories:
    """Histories of 1 to 100 events, 20 in the median."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(np.log(20), 0.8, count), 1, 100).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = np.sort(generator.integers(1_500_000_000, 1_700_000_000, offsets[-1]))
    order = np.lexsort((times, np.repeat(np.arange(count), lengths)))
    return Histories(_popular(config, generator, int(offsets[-1])), times[order], offsets)


def _neighbours(config: RetrievalBenchmark, seed: int) -> SparseRows:
    """Item–item weights: popular items have more neighbours, and are so more often."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.exponential(config.neighbours, config.items), 1, 300)
    indptr = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])
    indices = _popular(config, generator, int(indptr[-1]))
    for start in range(0, config.items, _BLOCK):  # ascending within a row
        stop = min(start + _BLOCK, config.items)
        part = slice(indptr[start], indptr[stop])
        rows = np.repeat(np.arange(stop - start), np.diff(indptr[start : stop + 1]))
        indices[part] = indices[part][np.lexsort((indices[part], rows))]
    data = generator.random(len(indices), dtype=np.float32)
    return SparseRows(data, indices, indptr, config.items)


def _bm25(config: RetrievalBenchmark) -> BM25:
    """Words of Zipf's frequencies, weighted by their rarity."""
    generator = np.random.default_rng(config.seed + 5)
    num_words = max(1000, config.items // 5)
    size = config.items * config.words
    words = ((num_words + 1.0) ** generator.random(size)).astype(np.int32) - 1
    items = np.repeat(np.arange(config.items, dtype=np.int32), config.words)
    keep = np.unique(words.astype(np.int64) * config.items + items)
    words, items = (keep // config.items).astype(np.int32), (keep % config.items).astype(np.int32)
    counts = np.bincount(words, minlength=num_words)
    rarity = np.log1p((config.items - counts + 0.5) / (counts + 0.5)).astype(np.float32)
    postings = SparseRows(
        rarity[words] * generator.uniform(0.5, 1.5, len(words)).astype(np.float32),
        items,
        np.concatenate([[0], np.cumsum(counts)]),
        config.items,
    )
    order = np.lexsort((words, items))
    asked = SparseRows(
        np.ones(len(words), np.float32),
        words[order],
        np.concatenate([[0], np.cumsum(np.bincount(items, minlength=config.items))]),
        num_words,
    )
    return BM25(BM25Config(), {f"word{word}": word for word in range(num_words)}, postings, asked)


def ask_index(config: RetrievalBenchmark, place: Path) -> dict[str, Any]:
    """Time and recall of single queries."""
    index = indexes.load(place)
    queries = np.load(config.folder / "queries.npy")
    exact = np.load(config.folder / "truth.npy")
    nothing = Histories.of([[]])
    for query in queries[:20]:
        index.top_unseen(query[None], nothing, 100)
    seconds, recall = [], []
    for query, wanted in zip(queries, exact, strict=True):
        start = time.perf_counter()
        items, _ = index.top_unseen(query[None], nothing, 100)
        seconds.append(time.perf_counter() - start)
        recall.append(np.isin(wanted, items[0]).mean())
    half = len(recall) // 2
    return {
        **_times(seconds),
        "recall_items": float(np.mean(recall[:half])),
        "recall_histories": float(np.mean(recall[half:])),
        "effort": index.report.effort,
        **_memory(),
    }


def ask_retriever(config: RetrievalBenchmark, place: Path) -> dict[str, Any]:
    """Time of single histories through every source and the fusion."""
    pipeline = Pipeline.load(place, stages=frozenset({Stage.RETRIEVER}))
    queries = np.load(config.folder / "queries.npy")
    asked = _histories(config, len(queries), config.seed + 9).with_vectors(queries)
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
    return {**_times(seconds[20:]), **memory, "parts": found}


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
        "| index | build, s | on disk, GiB | effort | recall@100 of items | of histories | p50, ms "
        "| p99, ms | resident, GiB | of it mapped |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        recalls = [each.get(f"recall_{kind}") for kind in ("items", "histories")]
        cells = [
            each["name"],
            f"{each['build_s']:.0f}",
            f"{each['disk_gib']:.2f}",
            str(each.get("effort") or ""),
            *("" if recall is None else f"{recall:.3f}" for recall in recalls),
            f"{each['p50_ms']:.2f}",
            f"{each['p99_ms']:.2f}",
            f"{each['rss_gib']:.2f}",
            f"{each['mapped_gib']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for each in found:
        if "parts" in each:
            parts = ", ".join(f"{name} {ms}" for name, ms in each["parts"].items())
            holds = each["p99_ms"] < LIMIT_MS and each["rss_gib"] < LIMIT_GIB
            lines += [
                "",
                f"Of the {each['name']}, 150 candidates a source, the medians in ms: {parts}.",
                f"Under {LIMIT_MS:.0f} ms p99 and {LIMIT_GIB:.0f} GiB: {'yes' if holds else 'no'}.",
            ]
    return "\n".join(lines) + "\n"


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
