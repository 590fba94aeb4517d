"""Measure one system on cases: a single source over the whole catalogue, or ready-made lists.

A system is anything that ranks: a candidate source alone, the fused list, the fused list after the
reranker, a run that another program exported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fusionrec.data.histories import CodeArray, FloatArray, Histories, IntArray
from fusionrec.data.splits import Cases
from fusionrec.evaluation.ranks import Ranks, RealArray, full_ranks, list_ranks, seen_items
from fusionrec.sources.protocol import Source

T = TypeVar("T", bound=np.generic)

BLOCK = 256
"""Histories that travel through a source or a pipeline together."""


class Kind(StrEnum):
    """What a system is."""

    SOURCE = "source"
    FUSED = "fused"
    RERANKED = "reranked"
    RUN = "run"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a system did on B cases."""

    name: str
    kind: Kind
    ranks: Ranks
    """Where the targets stand."""
    items: CodeArray
    """[B, C] the beginning of each list, best first; −1 where it is short."""
    scores: FloatArray
    """[B, C]"""
    seen_items: int
    """Recommended items of the case's own history: always 0 unless the system is broken."""
    seconds: float
    """Spent scoring and ranking."""
    shares: dict[str, float] | None = None
    """Of a fused list: the share of each term in the scores of the items recommended."""


def measure_source(
    source: Source,
    cases: Cases,
    item_counts: IntArray,
    k: int,
    advance: Callable[[int], object] = lambda _: None,
) -> Measured:
    """Rank the whole catalogue by ``source`` alone; ``item_counts`` [I] only says how large it is.

    The lists beyond accuracy is measured on are those of ``source.top``.
    """
    start = time.perf_counter()
    ranks = full_ranks(source, cases.histories, cases.targets, len(item_counts), advance=advance)
    seconds = time.perf_counter() - start
    meter = ListMeter(source.name, Kind.SOURCE, cases, k, k)
    for first in range(0, len(cases), BLOCK):
        block = cases.histories.slice(first, min(first + BLOCK, len(cases)))
        top = source.top(block, k)
        meter.add(top.items, top.scores)
    return replace(meter.measured(), ranks=ranks, seconds=seconds)


class ListMeter:
    """Measures lists that arrive in blocks of cases, in the order of the cases.

    Only the first ``depth`` places of each list are kept; ranks are taken on the whole lists.
    """

    def __init__(self, name: str, kind: Kind, cases: Cases, depth: int, k: int) -> None:
        self._name, self._kind, self._cases = name, kind, cases
        self._depth, self._k = depth, k
        self._done, self._seen, self._seconds = 0, 0, 0.0
        self._ranks: list[RealArray] = []
        self._items: list[CodeArray] = []
        self._scores: list[FloatArray] = []
        self._terms: dict[str, float] = {}

    def add(
        self,
        items: CodeArray,
        scores: FloatArray,
        seconds: float = 0.0,
        terms: tuple[tuple[str, ...], FloatArray] | None = None,
    ) -> None:
        """The lists of the next cases: ``items`` and ``scores`` [B, C], best first, −1 at the ends.

        ``terms`` are the names of T terms and their values [B, T, C], whose sum is the score.
        """
        stop = self._done + len(items)
        targets: Histories = self._cases.targets.slice(self._done, stop)
        self._seen += seen_items(items, self._cases.histories.slice(self._done, stop))
        self._ranks.append(list_ranks(items, scores, targets).ranks)
        self._items.append(_fit(items, self._depth, -1))
        self._scores.append(_fit(scores, self._depth, 0))
        self._seconds += seconds
        self._done = stop
        if terms is not None:
            names, values = terms
            used = np.where(items[:, None, : self._k] >= 0, values[:, :, : self._k], 0)
            sizes = np.abs(used).sum(axis=(0, 2), dtype=np.float64)
            for name, size in zip(names, sizes, strict=True):
                self._terms[name] = self._terms.get(name, 0.0) + float(size)

    def measured(self) -> Measured:
        """The result, once every case has had its list."""
        assert self._done == len(self._cases), f"{self._done} of {len(self._cases)} lists came"
        total = sum(self._terms.values())
        return Measured(
            self._name,
            self._kind,
            Ranks(np.concatenate(self._ranks), self._cases.targets.offsets),
            np.concatenate(self._items),
            np.concatenate(self._scores),
            self._seen,
            self._seconds,
            {name: size / total for name, size in self._terms.items()} if total else None,
        )


def _fit(lists: npt.NDArray[T], depth: int, empty: int) -> npt.NDArray[T]:
    """[B, depth] ``lists`` cut or padded."""
    fitted = np.full((len(lists), depth), empty, dtype=lists.dtype)
    fitted[:, : lists.shape[1]] = lists[:, :depth]
    return fitted
