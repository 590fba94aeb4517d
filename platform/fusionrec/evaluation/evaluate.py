"""Measure everything that a pipeline is made of on the same cases: sources, fusion, reranker.

The pipeline comes as three functions, the very ones that the endpoint calls; what they do is not
known here. Each list is made once: the reranked list from the fused one that is measured beside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from fusionrec.data.histories import CodeArray, FloatArray, Histories, IntArray
from fusionrec.data.splits import Cases
from fusionrec.evaluation.run import DEPTH
from fusionrec.evaluation.systems import BLOCK, Kind, ListMeter, Measured, measure_source
from fusionrec.progress import bar
from fusionrec.sources.protocol import Ranked, Source

FUSED, RERANKED = "fused", "fused + reranker"


class Lists(Protocol):
    """What a pipeline's stages return: B lists of C items, best first."""

    @property
    def items(self) -> CodeArray:
        """[B, C]; −1 at the ends."""
        ...

    @property
    def scores(self) -> FloatArray:
        """[B, C], descending."""
        ...

    @property
    def terms(self) -> FloatArray:
        """[B, T, C] whose sum over T is the score."""
        ...

    @property
    def term_names(self) -> tuple[str, ...]:
        """T names; those of the sources are the sources' own."""
        ...


L = TypeVar("L", bound=Lists)


class Stages(Protocol[L]):
    """The stages of a pipeline."""

    @property
    def sources(self) -> Sequence[Source]:
        """The candidate sources."""
        ...

    @property
    def reranker(self) -> object | None:
        """None where the fused list is the final one."""
        ...

    def embed(self, histories: Histories) -> Histories:
        """The histories with their text vectors, if the pipeline has an encoder."""
        ...

    def retrieve(self, histories: Histories) -> L:
        """The fused lists."""
        ...

    def rerank(self, histories: Histories, fused: L) -> L:
        """The final lists."""
        ...


def measure(
    pipeline: Stages[L],
    cases: Cases,
    item_counts: IntArray,
    k: int,
    fitted: Stages[L] | None = None,
) -> list[Measured]:
    """Each source alone, then the fused list, then the reranked one where there is a reranker.

    ``fitted`` has all sources that were fitted, where ``pipeline`` does not ask them all.
    """
    fitted = fitted or pipeline
    histories = embedded(fitted, cases.histories)
    cases = Cases(cases.users, histories, cases.targets)
    found = []
    for source in fitted.sources:
        with bar(f"ranking all items by {source.name}", len(cases)) as advance:
            found.append(measure_source(source, cases, item_counts, k, advance))
    fused = ListMeter(FUSED, Kind.FUSED, cases, DEPTH, k)
    final = ListMeter(RERANKED, Kind.RERANKED, cases, DEPTH, k) if pipeline.reranker else None
    with bar("ranking by the pipeline", len(cases)) as advance:
        for start in range(0, len(cases), BLOCK):
            block = histories.slice(start, min(start + BLOCK, len(cases)))
            before = time.perf_counter()
            lists = pipeline.retrieve(block)
            seconds = time.perf_counter() - before
            fused.add(lists.items, lists.scores, seconds, (lists.term_names, lists.terms))
            if final is not None:
                lists = pipeline.rerank(block, lists)
                seconds = time.perf_counter() - before
                final.add(lists.items, lists.scores, seconds, (lists.term_names, lists.terms))
            advance(len(block))
    found.append(fused.measured())
    return found if final is None else [*found, final.measured()]


def measure_run(name: str, lists: Ranked, cases: Cases, k: int) -> Measured:
    """A run read back with :func:`fusionrec.evaluation.run.read_run`, one list a case."""
    meter = ListMeter(name, Kind.RUN, cases, DEPTH, k)
    meter.add(lists.items, lists.scores)
    return meter.measured()


def embedded(pipeline: Stages[L], histories: Histories) -> Histories:
    """``histories`` with their text vectors, in blocks that an encoder can sort by length."""
    vectors = []
    with bar("embedding the histories", len(histories)) as advance:
        for start in range(0, len(histories), 4 * BLOCK):
            block = histories.slice(start, min(start + 4 * BLOCK, len(histories)))
            embedded = pipeline.embed(block).vectors
            if embedded is None:
                return histories
            vectors.append(embedded)
            advance(len(block))
    return histories.with_vectors(np.concatenate(vectors))
