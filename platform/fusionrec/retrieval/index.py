"""Vector index: the nearest items of a query vector, by inner product.

Small catalogues are searched exactly (FAISS flat). Larger ones by an approximate index of FAISS
(:mod:`fusionrec.retrieval.approximate`), whose recall is measured when it is built. Which, is
chosen by size and memory budget unless the settings say so.

Either way scores do not depend on who else is in the batch, because the endpoint and the offline
evaluation batch differently and must agree: what FAISS finds is scored once more, one query at a
time, by the same arithmetic that scores the candidates of other sources.

Shape legend: B queries, I items, C candidates, K items returned, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeAlias

import faiss
import numpy as np
from pydantic import Field, ValidationError

from fusionrec.config import Config
from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.errors import BundleError
from fusionrec.retrieval.halves import Stored, single
from fusionrec.retrieval.lists import empty, fill

_FAISS: Any = faiss  # its type stubs are of an older version
Kind: TypeAlias = Literal["flat", "hnsw", "ivf", "ivfpq"]

RECALL_AT = 100
"""Length of the lists whose recall is measured."""
REPORT = "index.json"
VECTORS = "vectors.npy"

_GEMM_FROM = 4
"""Queries from which FAISS multiplies matrices instead of vectors."""
_ROUNDING = 4e-6
"""Bound on how far two float32 orders of summation are apart, in units of ‖query‖ · ‖vector‖."""
_SPARE = 32
"""Places beyond those asked for that are looked at, in case of ties."""


class IndexConfig(Config):
    """How the items nearest to a vector are found."""

    kind: Literal["auto", "flat", "hnsw", "ivf", "ivfpq"] = "auto"
    """flat: exact; hnsw, ivf, ivfpq: approximate, each smaller and slower than the one before;
    auto: flat up to flat_up_to items, beyond that the first of the others that fits max_bytes."""
    flat_up_to: int = Field(default=20_000, ge=1)
    """Items up to which auto searches exactly."""
    max_bytes: int = Field(default=1 << 30, ge=1)
    """What auto lets an approximate index take in memory, its vectors on disk not counted."""
    recall: float = Field(default=0.95, gt=0, le=1)
    """Share of the exact nearest 100 that an approximate index must find: the least search effort
    that does is chosen when it is built."""
    seed: int = Field(default=0, ge=0)
    """Of the clusters, and of the sample that recall is measured on."""


class IndexReport(Config):
    """What is known of an index that was built; ``index.json`` beside it."""

    kind: Kind
    num_items: int
    """Items that can be found: those with a vector other than zero."""
    dimension: int
    """D."""
    num_bytes: int
    """Of what a search reads, the vectors of approximate kinds not counted."""
    effort: int | None = None
    """Nodes kept in sight (hnsw: efSearch) or clusters visited (ivf, ivfpq: nprobe)."""
    recall: dict[str, float]
    """Recall of the nearest 100, by kind of query: the vectors of histories, those of items."""
    num_queries: int = 0
    """Of each kind."""


class VectorIndex(Protocol):
    """Inner-product search over [I, D] vectors."""

    @property
    def report(self) -> IndexReport:
        """What was built."""
        ...

    @property
    def vectors(self) -> Stored:
        """[I, D] what is searched, as it is stored."""
        ...

    def top_unseen(
        self, queries: FloatArray, histories: Histories, k: int
    ) -> tuple[CodeArray, FloatArray]:
        """[B, K] codes and scores of the best items of each of [B, D] queries.

        Only positive scores, without the items of each history; ties to the lower code, −1 behind.
        """
        ...

    def score(self, query: FloatArray, codes: CodeArray) -> FloatArray:
        """[C] inner products of one [D] query with the items ``codes``; 0 where a code is −1."""
        ...

    def save(self, directory: Path) -> None:
        """Write vectors, index and report into ``directory``."""
        ...


def build(
    vectors: FloatArray,
    config: IndexConfig,
    queries: Callable[[int], FloatArray | None] = lambda _: None,
) -> VectorIndex:
    """Index [I, D] ``vectors`` as ``config`` says.

    Args:
        vectors: may be memory-mapped; a row of zeros is an item that is never found.
        config: the settings.
        queries: given a number, so many vectors that will be asked about, or fewer; what an
            approximate index is tuned on, besides vectors of items. Only called for such an index.
    """
    kind = choose(config, *vectors.shape)
    if kind == "flat":
        return FlatIndex(vectors)
    from fusionrec.retrieval.approximate import ApproximateIndex

    return ApproximateIndex.build(vectors, kind, config, queries)


def choose(config: IndexConfig, num_items: int, dimension: int) -> Kind:
    """The kind of index for so many vectors."""
    if config.kind != "auto":
        return config.kind
    if num_items <= config.flat_up_to:
        return "flat"
    from fusionrec.retrieval.approximate import expected_bytes

    kinds: tuple[Kind, ...] = ("hnsw", "ivf")
    for kind in kinds:
        if expected_bytes(kind, num_items, dimension) <= config.max_bytes:
            return kind
    return "ivfpq"


def load(directory: Path) -> VectorIndex:
    """What :meth:`VectorIndex.save` wrote, memory-mapped.

    Raises:
        BundleError: the report cannot be read.
    """
    path = directory / REPORT
    try:
        report = IndexReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise BundleError(f"{path} cannot be read: fit the pipeline again") from error
    if report.kind == "flat":
        return FlatIndex.load(directory)
    from fusionrec.retrieval.approximate import ApproximateIndex

    return ApproximateIndex.load(directory, report)


class FlatIndex:
    """Exact search. Memory: 4 · I · D bytes, which a query reads and a batch reads once."""

    def __init__(self, vectors: FloatArray) -> None:
        self.vectors = vectors
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(np.ascontiguousarray(vectors))
        faiss.cvar.distance_compute_blas_threshold = _GEMM_FROM
        self._longest = float(np.sqrt(np.einsum("id,id->i", vectors, vectors).max(initial=0)))

    @property
    def report(self) -> IndexReport:
        """Recall is 1 by construction."""
        return IndexReport(
            kind="flat",
            num_items=int(self.vectors.any(axis=1).sum()),
            dimension=self.vectors.shape[1],
            num_bytes=self.vectors.nbytes,
            recall={"histories": 1.0, "items": 1.0},
        )

    def top_unseen(
        self, queries: FloatArray, histories: Histories, k: int
    ) -> tuple[CodeArray, FloatArray]:
        """See :class:`VectorIndex`.

        FAISS rounds differently for larger batches. So its scores only say which items may be among
        the best; as many as are needed to be sure of that are scored again.
        """
        # The history's own items are found too, and dropped: ask for so many more.
        needed = np.minimum(k + histories.lengths, len(self.vectors))
        slack = _ROUNDING * self._longest * np.linalg.norm(queries, axis=1)
        scores, codes = self._search(queries, needed, slack)
        items, values = empty(len(histories), k)
        for row, query in enumerate(queries):
            edge = scores[row, needed[row] - 1] - 2 * slack[row]
            found = codes[row][scores[row] >= max(edge, -slack[row])]
            found = found[~np.isin(found, histories.row(row))]
            fill(items[row], values[row], found.astype(np.int32), self.score(query, found))
        return items, values

    def _search(self, queries: FloatArray, needed: Any, slack: Any) -> tuple[Any, Any]:
        """[B, depth] scores and codes, deep enough to hold whatever may be among ``needed`` [B]."""
        num_items, rows = len(self.vectors), np.arange(len(queries))
        depth = min(int(needed.max(initial=1)) + _SPARE, num_items)
        while True:
            with one_thread():
                scores, codes = self._index.search(np.ascontiguousarray(queries), depth)
            last, edge = scores[:, -1], scores[rows, needed - 1]
            # Sure once the last found is below what is wanted, negative, or of a zero query.
            sure = (last < edge - 2 * slack) | (last < -slack) | (slack == 0)
            if depth == num_items or sure.all():
                return scores, codes
            depth = min(2 * depth, num_items)

    def score(self, query: FloatArray, codes: CodeArray) -> FloatArray:
        """See :class:`VectorIndex`."""
        return products(self.vectors, query, codes)

    def save(self, directory: Path) -> None:
        """Write ``vectors.npy`` and ``index.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / VECTORS, self.vectors, allow_pickle=False)
        write_report(directory, self.report)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Memory-map the vectors and index them."""
        vectors = np.load(directory / VECTORS, mmap_mode="r", allow_pickle=False)
        return cls(vectors.view(np.ndarray))  # to pick rows of a np.memmap takes ten times as long


@contextmanager
def one_thread() -> Iterator[None]:
    """While it is open, FAISS computes on the thread that calls it.

    A search is milliseconds, in which its threads wait for each other several times: where another
    process has one of the cores, they wait for as long as that is let run.
    """
    threads = _FAISS.omp_get_max_threads()
    _FAISS.omp_set_num_threads(1)
    try:
        yield
    finally:
        _FAISS.omp_set_num_threads(threads)


def write_report(directory: Path, report: IndexReport) -> None:
    """Write ``index.json``."""
    (directory / REPORT).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")


def products(vectors: Stored, query: FloatArray, codes: CodeArray) -> FloatArray:
    """[C] inner products of one query with the vectors of ``codes``; 0 where a code is −1."""
    rows = single(vectors[np.maximum(codes, 0)])
    # Not @: BLAS adds in an order that depends on how many rows there are.
    return np.where(codes >= 0, np.einsum("cd,d->c", rows, query), np.float32(0))
