"""Beyond accuracy: what the lists of K recommendations look like as lists.

None of these numbers says whether a list is right; together they say what a gain in accuracy was
bought with. Lists are item codes [B, K], −1 where a list is short. Empty input has the value None:
there is nothing to describe.

Shape legend: B lists, K places, I items, D dimensions of a text vector, G categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy import sparse

from fusionrec.data.histories import CodeArray, FloatArray, IntArray
from fusionrec.evaluation.ranks import RealArray


def coverage(lists: CodeArray, num_items: int) -> float | None:
    """Catalogue coverage: the share of the I items that at least one list recommends.

    Herlocker et al., Evaluating collaborative filtering recommender systems, TOIS 2004.
    """
    if not num_items or not len(lists):
        return None
    return len(np.unique(lists[lists >= 0])) / num_items


def gini(lists: CodeArray, num_items: int) -> float | None:
    """Gini coefficient of exposure over all items of the catalogue, recommended or not.

    Σ_i (2i − I − 1) x_i / (I Σ x) with the numbers of recommendations x ascending, i from 1: 0 when
    every item is recommended equally often, (I − 1) / I when one item has every place.
    Fleder & Hosanagar, Blockbuster culture's next rise or fall, Management Science 2009.
    """
    exposure = np.sort(np.bincount(lists[lists >= 0], minlength=num_items)).astype(np.float64)
    if not exposure.sum():
        return None
    weights = 2 * np.arange(1, num_items + 1) - num_items - 1
    return float(weights @ exposure / (num_items * exposure.sum()))


def novelty(lists: CodeArray, item_counts: IntArray) -> float | None:
    """Mean self-information of a recommendation in bits: −log2 p, p an item's share of the events.

    p = (count + 1) / (Σ count + I): with add-one smoothing an item without events is very novel
    instead of infinitely so. The mean of list means. Zhou et al., Solving the apparent
    diversity–accuracy dilemma, PNAS 2010; Vargas & Castells, RecSys 2011.
    """
    bits = -np.log2((item_counts + 1) / (item_counts.sum() + len(item_counts)))
    return _mean_of_lists(np.where(lists >= 0, bits[lists], 0.0), (lists >= 0).astype(np.float64))


def text_diversity(lists: CodeArray, vectors: FloatArray) -> float | None:
    """Intra-list diversity: the mean of 1 − cosine over the pairs of a list, then over lists.

    ``vectors`` [I, D] are L2-normalised; an item without text (a row of zeros) belongs to no pair,
    a list without a pair to no mean. With s the sum of a list's m vectors the mean cosine of its
    pairs is (|s|² − m) / (m (m − 1)). Ziegler et al., Improving recommendation lists through topic
    diversification, WWW 2005; Smyth & McClave, ICCBR 2001.
    """
    has_text = np.abs(vectors).max(axis=1, initial=0) > 0
    counts, squares = np.zeros(len(lists)), np.zeros(len(lists))
    for start in range(0, len(lists), 4096):
        block = lists[start : start + 4096]
        used = (block >= 0) & has_text[block]
        rows = np.where(used[..., None], vectors[block], 0).astype(np.float64)
        counts[start : start + 4096] = used.sum(axis=1)
        squares[start : start + 4096] = (rows.sum(axis=1) ** 2).sum(axis=1)
    paired = counts > 1
    if not paired.any():
        return None
    m = counts[paired]
    return float((1 - (squares[paired] - m) / (m * (m - 1))).mean())


def category_diversity(lists: CodeArray, categories: Sequence[Sequence[str]]) -> float | None:
    """Intra-list diversity where there are no vectors: 1 − Jaccard of two items' category sets.

    An item without categories belongs to no pair, a list without a pair to no mean.
    """
    names = {name: code for code, name in enumerate(sorted({c for row in categories for c in row}))}
    columns = [sorted({names[name] for name in row}) for row in categories]
    sizes = np.array([len(row) for row in columns], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    codes = np.array([code for row in columns for code in row], dtype=np.int64)
    member = sparse.csr_array(
        (np.ones(len(codes), np.float32), codes, offsets), shape=(len(sizes), max(len(names), 1))
    )
    distance, pairs = np.zeros(len(lists)), np.zeros(len(lists))
    for p, q in combinations(range(lists.shape[1]), 2):
        a, b = lists[:, p], lists[:, q]
        (rows,) = np.nonzero((a >= 0) & (b >= 0) & (sizes[a] > 0) & (sizes[b] > 0))
        if not len(rows):
            continue
        a, b = a[rows], b[rows]
        shared = np.asarray(member[a].multiply(member[b]).sum(axis=1)).ravel()
        distance[rows] += 1 - shared / (sizes[a] + sizes[b] - shared)
        pairs[rows] += 1
    return _mean_of_lists(distance[:, None], pairs[:, None])


def _mean_of_lists(values: RealArray, counts: RealArray) -> float | None:
    """Mean over lists of Σ values / Σ counts, lists without a count left out."""
    number = counts.sum(axis=1)
    if not (number > 0).any():
        return None
    return float((values.sum(axis=1)[number > 0] / number[number > 0]).mean())
