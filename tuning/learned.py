"""The choice between the linear fusion and trees over it, on validation cases.

Trees have seen nothing of the cases that they are measured on: the cases are cut into folds, and
each fold is ranked by trees that were grown on the others. The linear weights were searched on all
of the cases, so that what they gain by chance counts for the linear fusion on both sides: for it
alone, and as the list that the trees start from. Trees are kept where the paired bootstrap's 95%
interval of the difference in NDCG lies above 0. Those that are kept are grown on all cases.
"""

from __future__ import annotations

import shutil
import sys
from enum import StrEnum
from pathlib import Path

import numpy as np

from fusionrec.data.histories import BoolArray, Histories
from fusionrec.data.splits import Cases
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.ranks import RealArray, list_ranks
from fusionrec.evaluation.render import sentence
from fusionrec.evaluation.significance import BootstrapConfig, compare
from fusionrec.fusion.candidates import Candidates
from fusionrec.fusion.features import ItemStatistics, newest_times
from fusionrec.fusion.lambdarank import LambdaRank, LambdaRankConfig, NothingToLearn
from fusionrec.fusion.model import LAMBDARANK, Fused, Fusion, fuse
from fusionrec.progress import bar

FOLDS = 4
_BLOCK = 512
"""Cases whose lists are held at a time."""


class FusionModel(StrEnum):
    """Which fusion a campaign leaves."""

    AUTO = "auto"
    LINEAR = "linear"
    LAMBDARANK = "lambdarank"


def cross_fitted(
    linear: Fusion,
    candidates: Candidates,
    cases: Cases,
    items: ItemStatistics,
    config: LambdaRankConfig,
    k: int,
    seed: int,
) -> RealArray:
    """[B, 2] NDCG@k of trees on cases that did not teach them, and of the linear fusion.

    Raises:
        NothingToLearn: the trees of a fold have no target to learn from.
    """
    newest, cold = newest_times(cases.histories), items.counts == 0
    fold_of = np.random.default_rng(seed).permutation(len(cases)) % FOLDS
    values = np.zeros((len(cases), 2))
    with bar("growing trees on folds of the cases", FOLDS) as advance:
        for fold in range(FOLDS):
            (others,), (own,) = np.nonzero(fold_of != fold), np.nonzero(fold_of == fold)
            trees = LambdaRank.fit(
                linear,
                candidates.take(others),
                cases.targets.take(others),
                newest[others],
                items,
                config,
                seed,
            )
            for start in range(0, len(own), _BLOCK):
                rows = own[start : start + _BLOCK]
                block, targets = candidates.take(rows), cases.targets.take(rows)
                values[rows, 0] = _ndcg(trees.fuse(block, newest[rows], cold), targets, k)
                values[rows, 1] = _ndcg(fuse(linear, block, cold), targets, k)
            advance()
    return values


def choose(
    model: FusionModel,
    linear: Fusion,
    candidates: Candidates,
    cases: Cases,
    items: ItemStatistics,
    config: LambdaRankConfig,
    k: int,
    seed: int,
    deciding: BoolArray | None = None,
) -> LambdaRank | None:
    """Trees grown on all cases, where they are asked for or, under ``auto``, better; else None.

    ``deciding`` [B]: the cases that they must be better on, those that did not choose ``config``;
    all, where nothing did.

    Raises:
        NothingToLearn: trees are asked for, and there is too little to learn from.
    """
    if model is FusionModel.LINEAR:
        return None
    if model is FusionModel.AUTO:
        try:
            values = cross_fitted(linear, candidates, cases, items, config, k, seed)
        except NothingToLearn as error:
            sys.stdout.write(f"the fusion stays linear: {error}\n")
            return None
        values = values if deciding is None else values[deciding]
        found = compare("ndcg", (LAMBDARANK, "linear"), values, BootstrapConfig(seed=seed))
        sys.stdout.write(sentence(found, k).replace("**", "") + "\n")
        if found.difference.low <= 0:
            return None
    with bar("growing trees on all cases", None):
        newest = newest_times(cases.histories)
        return LambdaRank.fit(linear, candidates, cases.targets, newest, items, config, seed)


def leave(learned: LambdaRank | None, linear: Fusion, pipeline: Path) -> None:
    """Write the fusion into a pipeline directory.

    The trees go first and come last: a writer that is killed leaves a linear fusion.
    """
    shutil.rmtree(pipeline / LAMBDARANK, ignore_errors=True)
    linear.save(pipeline / "fusion.json")
    if learned is not None:
        learned.save(pipeline / LAMBDARANK)


def _ndcg(lists: Fused, targets: Histories, k: int) -> RealArray:
    return METRICS["ndcg"](list_ranks(lists.items, lists.scores, targets), k)
