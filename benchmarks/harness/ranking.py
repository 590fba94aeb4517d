"""What ``make bench-ranking`` puts beside a pipeline: peers, what each source adds, an audit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import implicit.als
import implicit.nearest_neighbours
import numpy as np
import scipy.sparse as sp
from implicit.utils import ParameterWarning
from threadpoolctl import threadpool_limits

from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import BoolArray, Histories, IntArray
from fusionrec.data.splits import Cases, Protocol, Split, split
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.ranks import RealArray
from fusionrec.evaluation.significance import BootstrapConfig, Comparison, compare
from fusionrec.evaluation.systems import BLOCK, Kind, ListMeter, Measured, measure_source
from fusionrec.fusion.objective import Objective
from fusionrec.fusion.refine import Setting, bagged
from fusionrec.serving.pipeline import Pipeline
from fusionrec.sources.protocol import Source, TrainingData
from tuning.fusion import collect

DEPTH = 100
ALS = {"factors": 128, "regularization": 0.05, "alpha": 10.0, "iterations": 15}
"""Settings of implicit's ALS, as its documentation suggests for data of this size."""
NEIGHBOURS = 200
"""Of implicit's item-kNN models."""
_SMALL = 1e-9


def peers(parts: Split, seed: int) -> Iterator[tuple[Measured, float]]:
    """Models of implicit, on the same training histories and asked the same cases; seconds to fit.

    They fold the whole history of a case in, as the sources here do.
    """
    train = _matrix(parts.train, parts.num_items)
    cases = parts.test
    asked = _matrix(cases.histories, parts.num_items)
    nearest = implicit.nearest_neighbours
    depth = min(DEPTH, parts.num_items)  # what is asked for beyond comes as item 0
    with threadpool_limits(1, user_api="blas"):  # as implicit asks for: it has threads of its own
        models = {
            "implicit ALS": implicit.als.AlternatingLeastSquares(**ALS, random_state=seed),
            "implicit cosine kNN": nearest.CosineRecommender(K=NEIGHBOURS),
            "implicit TF-IDF kNN": nearest.TFIDFRecommender(K=NEIGHBOURS),
            "implicit BM25 kNN": nearest.BM25Recommender(K=NEIGHBOURS),
        }
        for name, model in models.items():
            began = time.perf_counter()
            with warnings.catch_warnings():  # it weights into a format that it then warns about
                warnings.simplefilter("ignore", ParameterWarning)
                model.fit(train, show_progress=False)
            fit_s = time.perf_counter() - began
            began = time.perf_counter()
            again = {"recalculate_user": True} if "ALS" in name else {}
            users = np.arange(len(cases))
            items, scores = model.recommend(
                users, asked, N=depth, filter_already_liked_items=True, **again
            )
            # What it cannot fill a list with has the lowest score there is, or 0.
            least = np.finfo(np.float32).min if again else 0
            items = np.where(scores > least, items, -1).astype(np.int32)
            meter = ListMeter(name, Kind.RUN, cases, DEPTH, 10)
            meter.add(items, scores.astype(np.float32), time.perf_counter() - began)
            yield meter.measured(), fit_s


def fused(pipeline: Pipeline, cases: Cases, name: str) -> Measured:
    """The lists of the fusion that ``pipeline`` holds."""
    meter = ListMeter(name, Kind.FUSED, cases, DEPTH, 10)
    for start in range(0, len(cases), BLOCK):
        block = cases.histories.slice(start, min(start + BLOCK, len(cases)))
        began = time.perf_counter()
        lists = pipeline.retrieve(pipeline.embed(block))
        meter.add(lists.items, lists.scores, time.perf_counter() - began)
    return meter.measured()


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What is lost without a source."""

    source: str
    weight: float
    """Its weight as it is served, the mean over the test cases, relative to the largest."""
    lost: Comparison
    """NDCG@k on the test cases: with it against without it."""


def ablation(
    pipeline: Pipeline, parts: Split, config: BootstrapConfig, k: int = 10
) -> list[LeftOut]:
    """Leave each source out, weigh the others anew on validation, compare on test.

    What is compared are linear weights: the served ones, against the same without the source, then
    polished as :mod:`tuning.fusion` polished the served ones. What only the source left out
    proposed stays among the candidates, with the others' scores.
    """
    fusion, cold = pipeline.fusion, pipeline.item_counts == 0
    validation, test = (
        Objective.of(
            collect(pipeline, cases),
            cases.targets,
            fusion.normalisation,
            fusion.scale_vector(),
            cold,
            k,
        )
        for cases in (parts.validation, parts.test)
    )
    # Segments without weights of their own have the same: what is found for one holds for all.
    factors = np.array([segment.cold_factor for segment in fusion.segments], dtype=np.float32)
    points = np.column_stack([fusion.weight_matrix(), factors])
    points, point_of = np.unique(points, axis=0, return_inverse=True)
    polished_on, measured_on = (
        point_of[fusion.segment_of(cases.histories.lengths)]
        for cases in (parts.validation, parts.test)
    )
    served = [Setting(point[:-1], float(point[-1])) for point in points]
    whole = _every(test, served, measured_on)
    weights = np.bincount(measured_on, minlength=len(points)) @ points[:, :-1]
    weights /= max(float(weights.max()), _SMALL)
    left_out = []
    for column, source in enumerate(fusion.sources):
        keep = np.arange(len(fusion.sources)) != column
        others = validation.of_sources(keep)
        settings = [
            bagged(others.take(polished_on == number), _without(setting, keep), config.seed)
            for number, setting in enumerate(served)
        ]
        found = _every(test.of_sources(keep), settings, measured_on)
        values = np.stack([whole, found], axis=1)
        lost = compare("ndcg", ("all sources", f"without {source}"), values, config)
        left_out.append(LeftOut(source, float(weights[column]), lost))
    return left_out


def _without(setting: Setting, keep: BoolArray) -> Setting:
    """Of the sources ``keep`` [S] alone; equal weights where all of theirs are 0."""
    weights = setting.weights[keep]
    return replace(setting, weights=weights if weights.any() else np.ones_like(weights))


def _every(objective: Objective, settings: Sequence[Setting], setting_of: IntArray) -> RealArray:
    """[B] NDCG of every case under the setting that it has; 0 where no source proposed a target."""
    every = np.zeros(objective.num_cases)
    for number, setting in enumerate(settings):
        part = objective.take(setting_of == number)
        every[part.rows] = setting.gains(part)
    return every


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


def audit(dataset: Dataset, parts: Split) -> Audit:
    """Count. Without timestamps nothing is tied: the order is all that there is."""
    events = dataset.events
    order = np.lexsort((np.arange(len(events.items)), events.timestamps, events.users))
    users, times = events.users[order], events.timestamps[order]
    same = (np.diff(users) == 0) & (np.diff(times) == 0)
    tied = np.zeros(len(order), dtype=np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    cases = parts.test
    has_past = np.repeat(cases.histories.lengths > 0, cases.targets.lengths)
    newest = np.full(len(cases), np.iinfo(np.int64).min)
    past = cases.histories.lengths > 0
    newest[past] = cases.histories.timestamps[cases.histories.offsets[1:][past] - 1]
    targets = cases.targets
    keys = cases.histories.rows * parts.num_items + cases.histories.items
    repeated = np.isin(targets.rows * parts.num_items + targets.items, keys)
    return Audit(
        tied_events=float(tied.mean()),
        tied_targets=float((has_past & (targets.timestamps == newest[targets.rows])).mean()),
        repeated_targets=float(repeated.mean()),
        cold_targets=float((parts.item_counts[targets.items] == 0).mean()),
    )


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


def ndcg_of(source: Source, data: TrainingData, cases: Cases) -> float:
    """NDCG@10 of ``source``, fitted on ``data``."""
    counts = np.bincount(data.histories.items, minlength=data.num_items)
    found = measure_source(source.fit(data), cases, counts, 10)
    return float(METRICS["ndcg"](found.ranks, 10).mean())


def _matrix(histories: Histories, num_items: int) -> sp.csr_matrix:
    """[B, I] 1 where the history has the item."""
    # Copied, since scipy sorts what it is given in place: the histories would lose their order.
    parts = (
        np.ones(len(histories.items), dtype=np.float32),
        histories.items.copy(),
        histories.offsets.copy(),
    )
    matrix = sp.csr_matrix(parts, shape=(len(histories), num_items))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix
