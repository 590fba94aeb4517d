"""A generated catalogue for the benchmark of retrieval, and what is built of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fusionrec.config import JobConfig
from fusionrec.data.dataset import DatasetInfo
from fusionrec.data.histories import FloatArray, Histories
from fusionrec.data.splits import Protocol
from fusionrec.progress import bar
from fusionrec.retrieval import index as indexes
from fusionrec.retrieval.index import IndexConfig
from fusionrec.retrieval.rows import SparseRows
from fusionrec.serving.pipeline import PipelineConfig
from fusionrec.sources.bm25 import BM25, BM25Config
from fusionrec.sources.ials import IALS, IALSConfig
from fusionrec.sources.item_item import ItemItem, ItemItemConfig
from fusionrec.sources.item_knn import ItemKNN
from fusionrec.sources.popularity import Popularity
from fusionrec.sources.protocol import Source, TrainingData
from fusionrec.sources.semantic import Semantic
from fusionrec.sources.transitions import Transitions

RETRIEVER = "whole retriever"
_BLOCK = 50_000


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
    """Indexes to compare; [] for none."""
    index: Literal["auto", "flat", "hnsw", "ivf", "ivfpq"] = "auto"
    """Index of the vectors in the whole retriever: what the sources' settings call kind."""
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
    """Write a pipeline directory with every source that searches in a way of its own."""
    vectors = np.load(config.folder / "items.npy", mmap_mode="r")
    histories = histories_like_people(config, config.items // 10, config.seed + 2)
    catalogue = range(config.items)  # of which a source asks the length alone
    data = TrainingData(
        catalogue,  # type: ignore[arg-type]
        histories,
        item_vectors=vectors,
        history_vectors=lambda count: _tuning(config, vectors, count),
    )
    factors = unit(vectors[:, : min(128, config.dimension)])
    settings = IndexConfig(kind=config.index, recall=config.recall, seed=config.seed)
    sources: list[Source] = [
        Popularity().fit(data),
        ItemItem(ItemItemConfig(learner=ItemKNN(), recency=0.7), _neighbours(config, 3)),
        ItemItem(ItemItemConfig(learner=Transitions(), recency=0.5), _neighbours(config, 4)),
        IALS(
            IALSConfig(factors=factors.shape[1]),
            indexes.build(factors, settings, lambda count: _tuning(config, factors, count)),
            np.asarray(factors.T @ factors, dtype=np.float64),
        ),
        _bm25(config),
        Semantic(settings).fit(data),
    ]
    for source in sources:
        source.save(place / "sources" / source.name)
    np.save(place / "item_counts.npy", np.bincount(histories.items, minlength=config.items))
    described = PipelineConfig(
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
    (place / "pipeline.json").write_text(described.model_dump_json(), encoding="utf-8")


def _popular(config: RetrievalBenchmark, generator: np.random.Generator, count: int) -> Any:
    """Codes of items, a few of which are asked for most of the time."""
    return (config.items * generator.random(count) ** 3).astype(np.int32)


def histories_like_people(config: RetrievalBenchmark, count: int, seed: int) -> Histories:
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
    return SparseRows(data, indices, indptr, config.items).compact()


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
    return BM25(
        BM25Config(),
        {f"word{word}": word for word in range(num_words)},
        postings.compact(),
        asked.compact(),
    )
