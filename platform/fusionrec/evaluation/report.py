"""The report: what every system is worth, how sure that is, and for whom it holds.

A :class:`Report` is data: it round-trips through JSON, and :mod:`fusionrec.evaluation.render` makes
the pages that people read from it and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, ValidationError

from fusionrec.config import Config
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.dataset import DatasetInfo
from fusionrec.data.histories import BoolArray, CodeArray, FloatArray, IntArray
from fusionrec.data.splits import Cases, Protocol
from fusionrec.errors import DataError
from fusionrec.evaluation import beyond
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.orders import OrderSensitivity
from fusionrec.evaluation.ranks import RealArray
from fusionrec.evaluation.significance import (
    BootstrapConfig,
    Comparison,
    Estimate,
    bootstrap_means,
    compare,
    estimate,
)
from fusionrec.evaluation.slices import slices
from fusionrec.evaluation.systems import Kind, Measured

PRIMARY = "ndcg"
"""The metric that picks the best source, is sliced and is drawn."""
CURVE_AT = (1, 2, 3, 5, 10, 20, 50, 100)
"""Where recall is drawn over the length of the list."""


class EvaluationConfig(Config):
    """What is measured, besides the cases."""

    k: int = Field(10, ge=1, le=100)
    """Length of the lists that metrics look at."""
    bootstrap: BootstrapConfig = BootstrapConfig()


class SliceInfo(Config):
    """A part of the targets."""

    group: str
    name: str
    num_cases: int
    """Cases with at least one target in it."""
    num_targets: int


class SystemReport(Config):
    """One system: a source alone, the fused list, the reranked list or a run."""

    name: str
    kind: Kind
    metrics: dict[str, Estimate]
    """By the names of ``fusionrec.evaluation.metrics.METRICS``, at k."""
    beyond: dict[str, float | None]
    """coverage, diversity, novelty (bits) and gini of the lists of k; null where undefined."""
    curve: tuple[float, ...]
    """Recall at each of ``CURVE_AT``."""
    ranked: float
    """Share of the targets that have a rank at all: for a fused list, the ceiling of its recall."""
    slices: tuple[Estimate, ...]
    """The primary metric on each of the report's slices."""
    share: float | None
    """Of a source: its part of the scores of the items that the last fused list recommends."""
    seen_items: int
    """Items of the case's own history that were recommended: 0 unless something is broken."""
    seconds: float
    """Spent scoring and ranking all cases."""


class Report(Config):
    """Everything that an evaluation found."""

    dataset: DatasetInfo
    protocol: Protocol
    part: str
    """test or validation."""
    config: EvaluationConfig
    num_cases: int
    num_targets: int
    diversity_over: str
    """What intra-list diversity compares: text vectors or categories."""
    systems: tuple[SystemReport, ...]
    slices: tuple[SliceInfo, ...]
    comparisons: tuple[Comparison, ...]
    """Pairs of systems, each in every metric; the first is served list against best source."""
    weights: dict[str, dict[str, float]]
    """Segment → term → weight of the fusion."""
    off: dict[str, float | None] = Field(default_factory=dict)
    """Source that is not asked, or only as the fallback → the share of the samples of the
    validation cases in which the search gave it no weight; null where no search turned it off."""
    fallback: str | None = None
    """The source that is asked only where the others propose too few."""
    orders: OrderSensitivity | None = None
    """Of a reranker that reads its candidates together; null of any other."""
    seconds: float
    """Wall clock of the whole evaluation."""

    @property
    def served(self) -> SystemReport:
        """The list that the endpoint would answer with: reranked, else fused, else the best."""
        for kind in (Kind.RERANKED, Kind.FUSED):
            for system in self.systems:
                if system.kind is kind:
                    return system
        return self.best_source

    @property
    def best_source(self) -> SystemReport:
        """The best single source by the primary metric, chosen on these very cases."""
        sources = [system for system in self.systems if system.kind is Kind.SOURCE]
        return max(sources, key=lambda system: system.metrics[PRIMARY].mean)

    def comparison(self, a: str, b: str, metric: str = PRIMARY) -> Comparison | None:
        """System ``a`` against ``b``, if the report compares them."""
        for found in self.comparisons:
            if (found.a, found.b, found.metric) == (a, b, metric):
                return found
        return None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a report.

        Raises:
            DataError: ``path`` is not a report of this version.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise DataError(f"report {path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            reason = error.errors()[0]["msg"]
            raise DataError(f"report {path}: {where or 'it'} is wrong ({reason})") from error

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def build(
    measured: Sequence[Measured],
    cases: Cases,
    *,
    dataset: DatasetInfo,
    protocol: Protocol,
    part: str,
    catalogue: Catalogue,
    item_counts: IntArray,
    vectors: FloatArray | None = None,
    weights: Mapping[str, Mapping[str, float]] | None = None,
    off: Mapping[str, float | None] | None = None,
    fallback: str | None = None,
    orders: OrderSensitivity | None = None,
    seconds: float = 0.0,
    config: EvaluationConfig | None = None,
) -> Report:
    """Summarise ``measured`` systems, all of them on the same ``cases``.

    ``item_counts`` [I] are the training events of the items, ``vectors`` [I, D] their text vectors
    where there are any. At least one system is a single source.
    """
    config = config or EvaluationConfig()
    names = [system.name for system in measured]
    assert len(set(names)) == len(names), "two systems have one name"
    values = np.stack(
        [metric(system.ranks, config.k) for system in measured for metric in METRICS.values()], 1
    ).reshape(len(cases), len(measured), len(METRICS))
    draws = bootstrap_means(values.reshape(len(cases), -1), config.bootstrap)
    draws = draws.reshape(-1, len(measured), len(METRICS))
    parts = slices(cases, item_counts)
    sliced = [_slice(measured, part.mask, config) for part in parts]
    shares: dict[str, float] = {}
    for system in measured:
        shares = system.shares or shares
    return Report(
        dataset=dataset,
        protocol=protocol,
        part=part,
        config=config,
        num_cases=len(cases),
        num_targets=len(cases.targets.items),
        diversity_over="categories" if vectors is None else "text vectors",
        systems=tuple(
            SystemReport(
                name=system.name,
                kind=system.kind,
                metrics={
                    metric: estimate(values[:, s, m].mean(), draws[:, s, m], config.bootstrap.level)
                    for m, metric in enumerate(METRICS)
                },
                beyond=_beyond(system.items[:, : config.k], catalogue, item_counts, vectors),
                curve=tuple(float(METRICS["recall"](system.ranks, at).mean()) for at in CURVE_AT),
                ranked=float(np.isfinite(system.ranks.ranks).mean()),
                slices=tuple(row[s] for _, row in sliced),
                share=shares.get(system.name) if system.kind is Kind.SOURCE else None,
                seen_items=system.seen_items,
                seconds=system.seconds,
            )
            for s, system in enumerate(measured)
        ),
        slices=tuple(
            SliceInfo(
                group=part.group,
                name=part.name,
                num_cases=num_cases,
                num_targets=int(part.mask.sum()),
            )
            for part, (num_cases, _) in zip(parts, sliced, strict=True)
        ),
        comparisons=tuple(
            compare(
                metric,
                (names[a], names[b]),
                values[:, [a, b], m],
                config.bootstrap,
                draws[:, [a, b], m],
            )
            for a, b in _pairs(measured, values[:, :, list(METRICS).index(PRIMARY)].mean(axis=0))
            for m, metric in enumerate(METRICS)
        ),
        weights={segment: dict(row) for segment, row in (weights or {}).items()},
        off=dict(off or {}),
        fallback=fallback,
        orders=orders,
        seconds=seconds,
    )


def _pairs(measured: Sequence[Measured], primary: RealArray) -> list[tuple[int, int]]:
    """Which systems to compare: (served, best source) first, then each step and each run."""
    of = {kind: [s for s, system in enumerate(measured) if system.kind is kind] for kind in Kind}
    assert of[Kind.SOURCE], "a report needs a single source to compare with"
    best = max(of[Kind.SOURCE], key=lambda s: primary[s])
    lists = of[Kind.RERANKED] + of[Kind.FUSED]
    served = (lists or [best])[0]
    pairs = [(s, best) for s in lists]
    pairs += [(served, s) for s in lists if s != served]
    return pairs + [(served, s) for s in of[Kind.RUN]]


def _slice(
    measured: Sequence[Measured], mask: BoolArray, config: EvaluationConfig
) -> tuple[int, list[Estimate]]:
    """The primary metric of each system on the targets of ``mask``, and the number of cases."""
    ranks = [system.ranks.where(mask) for system in measured]
    values = np.stack([METRICS[PRIMARY](r, config.k) for r in ranks], axis=1)
    draws = bootstrap_means(values, config.bootstrap)
    level = config.bootstrap.level
    return len(values), [
        estimate(values[:, s].mean(), draws[:, s], level) for s in range(len(measured))
    ]


def _beyond(
    lists: CodeArray, catalogue: Catalogue, item_counts: IntArray, vectors: FloatArray | None
) -> dict[str, float | None]:
    if vectors is None:
        diversity = beyond.category_diversity(lists, catalogue.categories)
    else:
        diversity = beyond.text_diversity(lists, vectors)
    return {
        "coverage": beyond.coverage(lists, len(catalogue)),
        "diversity": diversity,
        "novelty": beyond.novelty(lists, item_counts),
        "gini": beyond.gini(lists, len(catalogue)),
    }
