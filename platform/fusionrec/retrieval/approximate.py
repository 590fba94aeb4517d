"""Approximate indexes: a graph (HNSW) or clusters (IVF) of compressed vectors.

FAISS proposes from the compressed vectors; what it proposes is scored with the vectors themselves,
kept as float16 in a memory-mapped file. So ``top_unseen`` and ``score`` agree to the last bit,
compression costs recall only, and a node holds one copy of everything. float16 takes half the space
of float32 and moves a cosine in the fifth digit; 8 bits would move it in the third, and neighbours
past each other.

    hnsw    8 bits a dimension, and a graph of 16 links an item: fastest, and slowest to build
    ivf     8 bits a dimension, in 2√I clusters: about a quarter smaller
    ivfpq   1 bit a dimension (product quantisation): for what else would not fit

The least search effort that reaches the wanted recall is found when an index is built, on vectors
of histories and of items, against exact search. Building is single-threaded, because FAISS's graph
otherwise depends on which thread came first.

Shape legend: I items, Q queries, D dimensions, C candidates, K items returned.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np

from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.errors import DataError
from fusionrec.progress import bar
from fusionrec.retrieval.halves import Stored
from fusionrec.retrieval.index import (
    RECALL_AT,
    VECTORS,
    IndexConfig,
    IndexReport,
    Kind,
    one_thread,
    products,
    write_report,
)
from fusionrec.retrieval.lists import empty, fill

_FAISS: Any = faiss  # its type stubs are of an older version
INDEX = "index.faiss"
NUM_QUERIES = 256
"""Queries of each kind that recall is measured on."""
_LINKS = 16
"""Neighbours of an item in HNSW's graph; twice as many on its lowest level."""
_BUILD_EFFORT = 80
"""HNSW's efConstruction."""
_SAMPLE_PER_CLUSTER = 64
"""Vectors that a centroid is learned from."""
_QUANTISER_SAMPLE = 65_536
"""Vectors that a quantiser is learned from."""
_BLOCK = 16_384
"""Vectors handled at a time while building."""
_PROPOSED = {"hnsw": 1.25, "ivf": 1.25, "ivfpq": 8.0}
"""Items that FAISS proposes for each one wanted: the coarser the compression, the more."""
_SAME = 1e-5
"""Scores that are this close, relatively, are the same but for rounding."""
_EFFORTS = sorted({round(2 ** (step / 2)) for step in range(23)})
"""1, 2, 3, 4, 6, 8, 11, 16 … 2048: candidates for the search effort."""


def expected_bytes(kind: Kind, num_items: int, dimension: int) -> int:
    """Memory that an approximate index of this kind will take."""
    per_item = {
        "hnsw": dimension + 4 * 2 * _LINKS + 24,  # codes, links, and their bookkeeping
        "ivf": dimension + 8,
        "ivfpq": _subvectors(dimension) + 8,
    }[kind]
    clusters = 0 if kind == "hnsw" else _clusters(num_items)
    codebook = 256 if kind == "ivfpq" else 0
    return per_item * num_items + 4 * dimension * (clusters + codebook)


@dataclass(frozen=True, slots=True)
class ApproximateIndex:
    """See the module. A query reads a small part of the index; queries do not share the reading."""

    vectors: Stored
    """[I, D] float16."""
    index: Any
    """FAISS's, over the items that have a vector; its ids are codes."""
    report: IndexReport

    @classmethod
    def build(
        cls,
        vectors: FloatArray,
        kind: Kind,
        config: IndexConfig,
        queries: Callable[[int], FloatArray | None],
    ) -> Self:
        """Index [I, D] ``vectors``, measure its recall, choose its effort.

        Warns where the wanted recall is out of reach.

        Raises:
            DataError: there are fewer than two vectors.
        """
        half = vectors.astype(np.float16)
        (codes,) = np.nonzero(np.concatenate([block.any(axis=1) for block in _blocks(half)]))
        if len(codes) < 2:
            raise DataError(
                f"a {kind} index needs at least two items with a vector, and there are "
                f"{len(codes)}: leave its kind at auto"
            )
        generator = np.random.default_rng(config.seed)
        with one_thread():
            index = _trained(kind, half, codes, generator, config.seed)
            with bar(f"building the {kind} index", len(codes)) as advance:
                for part in np.array_split(codes, max(1, len(codes) // _BLOCK)):
                    index.add_with_ids(half[part].astype(np.float32), part)
                    advance(len(part))
        dimension = vectors.shape[1]
        report = IndexReport(
            kind=kind,
            num_items=len(codes),
            dimension=dimension,
            num_bytes=expected_bytes(kind, len(codes), dimension),
            recall={},
        )
        asked = _sample(half, codes, generator, queries)
        return cls(half, index, report)._tuned(asked, config.recall)

    def top_unseen(
        self, queries: FloatArray, histories: Histories, k: int
    ) -> tuple[CodeArray, FloatArray]:
        """See :class:`~fusionrec.retrieval.index.VectorIndex`. One query at a time."""
        assert self.report.effort is not None
        items, values = empty(len(queries), k)
        for row, query in enumerate(queries):
            if query.any():
                found = self._propose(query, histories.row(row), k, self.report.effort)
                fill(items[row], values[row], found, self.score(query, found))
        return items, values

    def score(self, query: FloatArray, codes: CodeArray) -> FloatArray:
        """See :class:`~fusionrec.retrieval.index.VectorIndex`."""
        return products(self.vectors, query, codes)

    def save(self, directory: Path) -> None:
        """Write ``vectors.npy``, ``index.faiss`` and ``index.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / VECTORS, self.vectors, allow_pickle=False)
        _FAISS.write_index(self.index, str(directory / INDEX))
        write_report(directory, self.report)

    @classmethod
    def load(cls, directory: Path, report: IndexReport) -> Self:
        """Memory-map all of it."""
        vectors = np.load(directory / VECTORS, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        # FAISS maps graphs and flat codes by one flag, inverted lists by another.
        flag = _FAISS.IO_FLAG_MMAP_IFC if report.kind == "hnsw" else _FAISS.IO_FLAG_MMAP
        index = _FAISS.read_index(str(directory / INDEX), flag)
        if report.kind != "hnsw":
            # Else every search starts threads that read ahead, which takes longer than the search.
            _FAISS.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
        return cls(vectors, index, report)

    def _propose(self, query: FloatArray, without: CodeArray, k: int, effort: int) -> CodeArray:
        """The codes that FAISS puts first, in no order that matters."""
        depth = min(_depth(self.report.kind, k), self.report.num_items)
        settings: dict[str, Any] = {}
        if len(without):
            batch = _FAISS.IDSelectorBatch(without.astype(np.int64))
            settings["sel"] = _FAISS.IDSelectorNot(batch)
        if self.report.kind == "hnsw":
            parameters = _FAISS.SearchParametersHNSW(efSearch=max(effort, depth), **settings)
        else:
            parameters = _FAISS.SearchParametersIVF(nprobe=effort, **settings)
        _, codes = self.index.search(query[None], depth, params=parameters)
        return np.asarray(codes[0][codes[0] >= 0], dtype=np.int32)

    def _tuned(self, asked: dict[str, FloatArray], wanted: float) -> Self:
        """The same index with the least effort whose recall is ``wanted`` for every kind of query.

        By bisection: more effort finds more. What counts is the recall less two standard errors, so
        that other queries than the sample's find as much.
        """
        k = min(RECALL_AT, self.report.num_items)
        edges = {name: edge_scores(self.vectors, queries, k) for name, queries in asked.items()}
        if self.report.kind == "hnsw":
            least, limit = _depth("hnsw", k), _EFFORTS[-1]  # no search takes less than its depth
        else:
            least, limit = 1, _clusters(self.report.num_items)
        efforts = sorted({min(max(effort, least), limit) for effort in _EFFORTS})

        def recalls(effort: int) -> dict[str, FloatArray]:
            return {n: self._recalls(found, edges[n], k, effort) for n, found in asked.items()}

        def enough(found: dict[str, FloatArray]) -> bool:
            return all(
                float(r.mean() - 2 * r.std() / len(r) ** 0.5) >= wanted for r in found.values()
            )

        low, high = 0, len(efforts) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(recalls(efforts[middle])) else (middle + 1, high)
        found = recalls(efforts[low])
        means = {name: round(float(each.mean()), 4) for name, each in found.items()}
        if min(means.values()) < wanted:
            warnings.warn(
                f"a {self.report.kind} index of these vectors finds {min(means.values()):.3f} of "
                f"the nearest {k} at best, and recall = {wanted} is wanted: allow a larger index "
                "(max_bytes), or name another kind",
                stacklevel=2,
            )
        changes = {
            "effort": efforts[low],
            "recall": means,
            "num_queries": min(len(queries) for queries in asked.values()),
        }
        return type(self)(self.vectors, self.index, self.report.model_copy(update=changes))

    def _recalls(self, queries: FloatArray, edges: FloatArray, k: int, effort: int) -> FloatArray:
        """[Q] share of the ``k`` places that a search fills with an item of at least ``edges`` [Q].

        By score and not by code, so that of equal items any may be found.
        """
        nothing = np.empty(0, np.int32)
        found = np.empty(len(queries), dtype=np.float32)
        for row, (query, edge) in enumerate(zip(queries, edges, strict=True)):
            scores = self.score(query, self._propose(query, nothing, k, effort))
            found[row] = min(int((scores >= edge - _SAME * abs(edge)).sum()), k) / k
        return found


def _depth(kind: Kind, k: int) -> int:
    """Items that FAISS proposes for lists of ``k``."""
    return round(k * _PROPOSED[kind])


def edge_scores(vectors: Stored, queries: FloatArray, k: int) -> FloatArray:
    """[Q] the k-th largest inner product of each query with a vector other than zero.

    Cost: Q · I · D multiplications.
    """
    scores = np.empty((len(queries), 0), dtype=np.float32)
    for block in _blocks(vectors):
        block = block[block.any(axis=1)]
        scores = np.concatenate([scores, queries @ block.astype(np.float32).T], axis=1)
        scores = -np.partition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k]
    return np.asarray(scores.min(axis=1))


def _trained(
    kind: Kind, vectors: Stored, codes: Any, generator: np.random.Generator, seed: int
) -> Any:
    """An empty index of ``kind``, its quantisers learned from a sample of the vectors."""
    dimension, metric = vectors.shape[1], _FAISS.METRIC_INNER_PRODUCT
    clusters, eight = _clusters(len(codes)), _FAISS.ScalarQuantizer.QT_8bit
    if kind == "hnsw":
        index = _FAISS.IndexHNSWSQ(dimension, eight, _LINKS, metric)
        index.hnsw.efConstruction = _BUILD_EFFORT
        index.keep_max_size_level0 = True  # else copies of an item cannot be reached
        size = _QUANTISER_SAMPLE
    else:
        centroids = _FAISS.IndexFlatIP(dimension)
        if kind == "ivf":
            index = _FAISS.IndexIVFScalarQuantizer(centroids, dimension, clusters, eight, metric)
        else:
            bits, parts = min(8, int(math.log2(len(codes)))), _subvectors(dimension)
            index = _FAISS.IndexIVFPQ(centroids, dimension, clusters, parts, bits, metric)
            index.pq.cp.seed = seed
            index.pq.cp.min_points_per_centroid = 1
        index.cp.seed = seed
        index.cp.min_points_per_centroid = 1  # it would print its opinion of small catalogues
        size = max(_SAMPLE_PER_CLUSTER * clusters, _QUANTISER_SAMPLE)
    sample = np.sort(generator.choice(codes, min(size, len(codes)), replace=False))
    index.train(vectors[sample].astype(np.float32))
    return _FAISS.IndexIDMap(index) if kind == "hnsw" else index


def _sample(
    vectors: Stored,
    codes: Any,
    generator: np.random.Generator,
    queries: Callable[[int], FloatArray | None],
) -> dict[str, FloatArray]:
    """Kind of query → [Q, D] vectors to measure recall with."""
    chosen = generator.choice(codes, min(NUM_QUERIES, len(codes)), replace=False)
    found = {"items": vectors[chosen].astype(np.float32)}
    histories = queries(NUM_QUERIES)
    if histories is not None:
        histories = histories[histories.any(axis=1)]
    if histories is not None and len(histories):
        found["histories"] = histories
    return found


def _clusters(num_items: int) -> int:
    """2√I, as a power of two."""
    return min(1 << round(math.log2(2 * math.sqrt(num_items))), num_items)


def _subvectors(dimension: int) -> int:
    """Bytes of a product-quantised vector: the largest divisor of D that is at most D / 8."""
    return max(n for n in range(1, max(dimension // 8, 1) + 1) if dimension % n == 0)


def _blocks(vectors: Stored) -> Sequence[Stored]:
    return [vectors[start : start + _BLOCK] for start in range(0, len(vectors), _BLOCK)]
