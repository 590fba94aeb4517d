"""Accuracy of a ranking, from the ranks of its targets; and of predicted ratings.

Every ranking metric is a function of ``(ranks, k)`` that returns one value in [0, 1] a case, as
float64 [B]; the mean over cases is what a report shows, and the values are what the bootstrap
resamples. ``n`` is the number of a case's targets, ``r_1 < r_2 < …`` are their ranks, and a target
counts when its rank is at most ``k``. A rank may be fractional (a tie) or infinite (not ranked):
see :mod:`fusionrec.evaluation.ranks`. A case without targets, or whose targets are all unranked,
has the value 0.

For whole ranks the values are those of trec_eval (through ``ir_measures``), but for
:func:`average_precision`, whose docstring says where it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from fusionrec.evaluation.ranks import Ranks, RealArray


def hit_rate(ranks: Ranks, k: int) -> RealArray:
    """HR@k: 1 if any target is among the first k, else 0.

    Deshpande & Karypis, Item-based top-N recommendation algorithms, TOIS 2004.
    """
    return (_hits(ranks, k) > 0).astype(np.float64)


def precision(ranks: Ranks, k: int) -> RealArray:
    """Precision@k: hits / k. With fewer than k targets the best possible value is n / k."""
    return _hits(ranks, k) / k


def recall(ranks: Ranks, k: int) -> RealArray:
    """Recall@k: hits / n. With one target it equals HR@k."""
    return _hits(ranks, k) / np.maximum(ranks.lengths, 1)


def f1(ranks: Ranks, k: int) -> RealArray:
    """F1@k: the harmonic mean of a case's precision and recall, 2 · hits / (k + n); 0 without hits.

    The mean over cases is the mean of F1 values, not the F1 of two means.
    """
    return 2 * _hits(ranks, k) / (k + ranks.lengths)


def ndcg(ranks: Ranks, k: int) -> RealArray:
    """NDCG@k with binary relevance: DCG / IDCG, DCG = Σ_{r_j ≤ k} 1 / log2(r_j + 1).

    IDCG is the DCG of min(n, k) targets at the top. With one target it is 1 / log2(r + 1).
    Järvelin & Kekäläinen, Cumulated gain-based evaluation of IR techniques, TOIS 2002.
    """
    counts = ranks.ranks <= k
    gains = _sum(ranks, np.where(counts, 1 / np.log2(ranks.ranks + 1), 0.0))
    ideal = np.concatenate([[1.0], np.cumsum(1 / np.log2(np.arange(1, k + 1) + 1))])
    at = np.minimum(ranks.lengths, k)
    return gains / np.where(at > 0, ideal[at], 1.0)


def average_precision(ranks: Ranks, k: int) -> RealArray:
    """AP@k, whose mean over cases is MAP@k: (1 / min(n, k)) Σ_{r_j ≤ k} j / r_j.

    Divided by min(n, k) as usual for recommenders, so that a perfect list of k items has 1;
    trec_eval's ``map_cut`` divides by n. With one target it is 1 / r.
    """
    rows = ranks.rows
    order = np.lexsort((ranks.ranks, rows))
    sorted_ranks = ranks.ranks[order]
    position = np.arange(len(order)) - ranks.offsets[rows] + 1
    gains = np.where(sorted_ranks <= k, position / sorted_ranks, 0.0)
    return _sum(ranks, gains) / np.maximum(np.minimum(ranks.lengths, k), 1)


def reciprocal_rank(ranks: Ranks, k: int) -> RealArray:
    """RR@k, whose mean over cases is MRR@k: 1 / r_1 if r_1 ≤ k, else 0.

    Voorhees, The TREC-8 question answering track report, 1999.
    """
    best = np.zeros(len(ranks))
    np.maximum.at(best, ranks.rows, np.where(ranks.ranks <= k, 1 / ranks.ranks, 0.0))
    return best


METRICS: Mapping[str, Callable[[Ranks, int], RealArray]] = {
    "ndcg": ndcg,
    "hr": hit_rate,
    "mrr": reciprocal_rank,
    "map": average_precision,
    "precision": precision,
    "recall": recall,
    "f1": f1,
}
"""The ranking metrics by the names under which reports list them."""


def rating_errors(predicted: npt.ArrayLike, actual: npt.ArrayLike) -> dict[str, float]:
    """MAE and RMSE of predicted ratings, in the unit of the ratings.

    ``mae`` = mean |p − a|, ``rmse`` = √ mean (p − a)². Pairs without an actual rating (NaN) are
    left out; NaN when none is left. A NaN prediction is a NaN error: a model may not skip.
    """
    error = np.asarray(predicted, dtype=np.float64) - np.asarray(actual, dtype=np.float64)
    error = error[~np.isnan(np.asarray(actual, dtype=np.float64))]
    if not len(error):
        return {"mae": float("nan"), "rmse": float("nan")}
    return {"mae": float(np.abs(error).mean()), "rmse": float(np.sqrt((error**2).mean()))}


def _sum(ranks: Ranks, values: RealArray) -> RealArray:
    sums = np.bincount(ranks.rows, weights=values, minlength=len(ranks))
    return sums.astype(np.float64)  # without a single target bincount counts in integers


def _hits(ranks: Ranks, k: int) -> RealArray:
    assert k >= 1, "k counts the items of a list"
    return _sum(ranks, (ranks.ranks <= k).astype(np.float64))
