"""What ``make bench-ranking`` puts beside the sources: implicit's models, and kinds of fusion."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import implicit.als
import implicit.nearest_neighbours as nearest
import numpy as np
import scipy.sparse as sp
from implicit.utils import ParameterWarning
from threadpoolctl import threadpool_limits

from benchmarks.harness.fits import Fit
from benchmarks.harness.memory import peak_mib
from fusionrec.data.histories import Histories
from fusionrec.data.splits import Cases, Split
from fusionrec.evaluation.systems import BLOCK, Kind, ListMeter, Measured
from fusionrec.serving.pipeline import Pipeline

DEPTH = 100
ALS = {"factors": 128, "regularization": 0.05, "alpha": 10.0, "iterations": 15}
"""Settings of implicit's ALS, as its documentation suggests for data of this size."""
NEIGHBOURS = 200
"""Of implicit's item-kNN models."""
MODELS: dict[str, Callable[..., Any]] = {
    "ALS": partial(implicit.als.AlternatingLeastSquares, **ALS),
    "cosine kNN": partial(nearest.CosineRecommender, K=NEIGHBOURS),
    "TF-IDF kNN": partial(nearest.TFIDFRecommender, K=NEIGHBOURS),
    "BM25 kNN": partial(nearest.BM25Recommender, K=NEIGHBOURS),
}


def peer(name: str, parts: Split, seed: int) -> tuple[Measured, Fit]:
    """A model of implicit, on the same training histories and asked the same cases; what it took.

    It folds the whole history of a case in, as the sources here do.
    """
    train = _matrix(parts.train, parts.num_items)
    cases = parts.test
    asked = _matrix(cases.histories, parts.num_items)
    depth = min(DEPTH, parts.num_items)  # what is asked for beyond comes as item 0
    folds = name == "ALS"
    with threadpool_limits(1, user_api="blas"):  # as implicit asks for: it has threads of its own
        model = MODELS[name](**({"random_state": seed} if folds else {}))
        before, began = peak_mib(), time.perf_counter()
        with warnings.catch_warnings():  # it weights into a format that it then warns about
            warnings.simplefilter("ignore", ParameterWarning)
            model.fit(train, show_progress=False)
        fit = Fit(time.perf_counter() - began, before, peak_mib())
        began = time.perf_counter()
        users = np.arange(len(cases))
        again = {"recalculate_user": True} if folds else {}
        items, scores = model.recommend(
            users, asked, N=depth, filter_already_liked_items=True, **again
        )
    # What it cannot fill a list with has the lowest score there is, or 0.
    least = np.finfo(np.float32).min if folds else 0
    items = np.where(scores > least, items, -1).astype(np.int32)
    meter = ListMeter(f"implicit {name}", Kind.RUN, cases, DEPTH, 10)
    meter.add(items, scores.astype(np.float32), time.perf_counter() - began)
    return meter.measured(), fit


def fused(pipeline: Pipeline, cases: Cases, name: str) -> Measured:
    """The lists of the fusion that ``pipeline`` holds."""
    meter = ListMeter(name, Kind.FUSED, cases, DEPTH, 10)
    for start in range(0, len(cases), BLOCK):
        block = cases.histories.slice(start, min(start + BLOCK, len(cases)))
        began = time.perf_counter()
        lists = pipeline.retrieve(pipeline.embed(block))
        meter.add(lists.items, lists.scores, time.perf_counter() - began)
    return meter.measured()


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
