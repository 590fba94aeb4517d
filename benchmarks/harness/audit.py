"""How much of a result may be an artefact of the data: ties, repetitions, works with two ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from benchmarks.harness.ranking import fused
from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import BoolArray, CodeArray, IntArray
from fusionrec.data.releases import stated
from fusionrec.data.splits import Protocol, Split, split
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.ranks import Ranks
from fusionrec.evaluation.systems import measure_source
from fusionrec.fusion.features import ItemStatistics
from fusionrec.fusion.lambdarank import LambdaRank
from fusionrec.serving.pipeline import Pipeline
from jobs.fit import FitConfig, training_data


@dataclass(frozen=True, slots=True)
class Audit:
    """How much of a result may be an artefact of the data."""

    tied_events: float
    """Share of events that share user and timestamp with another: their order is the file's."""
    tied_targets: float
    """Share of test targets that are as old as the event before them."""
    repeated_targets: float
    """Share of test targets that the user had met before: nobody can find them."""
    cold_targets: float
    """Share of test targets without a training event."""
    cold_held_out: float
    """Share of the items without a training event that are a target of validation or of test."""
    met_before: int
    """Events of the test window that are no targets since their user had met the item before it."""
    met_again: int
    """Events of the test window that are no targets since they repeat one of it."""
    twin_items: float
    """Share of the items that have a twin: the same work under another id."""
    twin_targets: float
    """Share of test targets that have a twin."""
    twins_met: float
    """Share of test targets a twin of which the user had met before: a repetition in disguise."""


def audit(dataset: Dataset, parts: Split) -> Audit:
    """Count. Without timestamps nothing is tied: the order is all that there is."""
    events, cases = dataset.events, parts.test
    order = np.lexsort((np.arange(len(events.items)), events.timestamps, events.users))
    users, times = events.users[order], events.timestamps[order]
    same = (np.diff(users) == 0) & (np.diff(times) == 0)
    tied = np.zeros(len(order), dtype=np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    has_past = np.repeat(cases.histories.lengths > 0, cases.targets.lengths)
    newest = np.full(len(cases), np.iinfo(np.int64).min)
    past = cases.histories.lengths > 0
    newest[past] = cases.histories.timestamps[cases.histories.offsets[1:][past] - 1]
    targets, histories = cases.targets, cases.histories
    repeated = _met(targets.rows, targets.items, histories.rows, histories.items)
    distinct, window = _window(dataset, parts)
    work = works(dataset)
    has_twin = np.bincount(work)[work] > 1
    cold = parts.item_counts == 0
    held_out = np.zeros(parts.num_items, dtype=np.bool_)
    for part in (parts.validation, parts.test):
        held_out[part.targets.items] = True
    met = _met(targets.rows, work[targets.items], histories.rows, work[histories.items])
    return Audit(
        tied_events=float(tied.mean()),
        tied_targets=float((has_past & (targets.timestamps == newest[targets.rows])).mean()),
        repeated_targets=float(repeated.mean()),
        cold_targets=float(cold[targets.items].mean()),
        cold_held_out=float(held_out[cold].mean()) if cold.any() else 0.0,
        met_before=distinct - len(targets.items),
        met_again=window - distinct,
        twin_items=float(has_twin.mean()),
        twin_targets=float(has_twin[targets.items].mean()),
        twins_met=float((met & ~repeated).mean()),
    )


def works(dataset: Dataset) -> IntArray:
    """[I] which work each item is: equal for items of one title and year, or of one description.

    Case and spaces do not count. An item without title and description is a work of its own.
    """
    catalogue, years = dataset.catalogue, stated(dataset).astype("datetime64[s]")
    first: dict[tuple[object, ...], int] = {}
    found = np.empty(len(catalogue), dtype=np.int64)
    for code, (title, text) in enumerate(zip(catalogue.titles, catalogue.texts, strict=True)):
        key: tuple[object, ...] = ("", _plain(text)) if text.strip() else (code,)
        if title.strip():
            key = (_plain(title), str(years[code].astype("datetime64[Y]")))
        found[code] = first.setdefault(key, code)
    return found


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _met(
    rows: IntArray,
    items: CodeArray | IntArray,
    past_rows: IntArray,
    past_items: CodeArray | IntArray,
) -> BoolArray:
    """Whether each of ``items`` is in the past of its row."""
    stride = int(max(items.max(initial=0), past_items.max(initial=0))) + 1
    return np.isin(rows * stride + items, past_rows * stride + past_items)


def _window(dataset: Dataset, parts: Split) -> tuple[int, int]:
    """Distinct pairs of user and item among the newest events, those not known; and all of them."""
    events = dataset.events
    count = len(events.items) - len(parts.known.items)
    if parts.protocol is Protocol.LEAVE_ONE_OUT:
        return count, count
    order = np.lexsort((np.arange(len(events.items)), events.timestamps))[-count:]
    pairs = events.users[order].astype(np.int64) * parts.num_items + events.items[order]
    return len(np.unique(pairs)), count


def with_ties_reversed(dataset: Dataset, protocol: Protocol) -> Split:
    """The split of the same events where those of one user and moment come in the other order."""
    events = dataset.events
    backwards = replace(
        events,
        users=events.users[::-1],
        items=events.items[::-1],
        timestamps=events.timestamps[::-1],
        values=events.values[::-1],
    )
    return split(dataset, protocol, backwards)


@dataclass(frozen=True, slots=True)
class Systems:
    """What is audited: every source that was fitted, asked or not, and the list that is served."""

    fitted: Pipeline
    """Asks every source."""
    served: Pipeline

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Those of a pipeline directory."""
        return cls(Pipeline.load(directory, weighed=False), Pipeline.load(directory))

    def fitted_again(self, dataset: Dataset, turned: Split, config: FitConfig) -> Self:
        """With sources fitted to ``turned``; the fusion keeps its weights or trees."""
        data = training_data(config, dataset, turned)
        sources = {s.name: config.build(s.name).fit(data) for s in self.fitted.sources}
        learned = self.served.learned
        if learned is not None:
            items = ItemStatistics.of(
                turned.train, turned.num_items, has_timestamps=dataset.info.has_timestamps
            )
            learned = replace(learned, items=items)

        def again(pipeline: Pipeline, learned: LambdaRank | None) -> Pipeline:
            return Pipeline(
                pipeline.config,
                pipeline.catalogue,
                turned.item_counts,
                [sources[source.name] for source in pipeline.sources],
                pipeline.fusion,
                encoder=pipeline.encoder,
                learned=learned,
                diversity=pipeline.diversity,
                rules=pipeline.rules,
            )

        return replace(self, fitted=again(self.fitted, None), served=again(self.served, learned))

    def ndcg(self, parts: Split) -> dict[str, tuple[float, float]]:
        """NDCG@10 of each on test: as it is, and with cold targets counted as missed.

        Where the catalogue holds what somebody met and nothing else, an item without a training
        event mostly has a held-out one. What is found through that, nobody would find among new
        items.
        """
        targets = parts.test.targets
        cold = parts.item_counts[targets.items] == 0
        return {
            name: (_ndcg(ranks), _ndcg(Ranks(np.where(cold, np.inf, ranks.ranks), targets.offsets)))
            for name, ranks in self._ranks(parts)
        }

    def _ranks(self, parts: Split) -> Iterator[tuple[str, Ranks]]:
        cases = replace(parts.test, histories=self.fitted.embed(parts.test.histories))
        for source in self.fitted.sources:
            yield source.name, measure_source(source, cases, parts.item_counts, 10).ranks
        yield "fused", fused(self.served, parts.test, "fused").ranks


def _ndcg(ranks: Ranks) -> float:
    return float(METRICS["ndcg"](ranks, 10).mean())
