r"""How much a reranker's ranking depends on the order in which it is shown the candidates.

A model that reads its candidates together may like a place in the prompt instead of the item that
stands there (Hou et al., Large language models are zero-shot rankers, ECIR 2024). So the same
candidates are shown in several orders, and the rankings that come of them compared in pairs, by
Kendall's tau-b over the candidates i < j with scores a in one order and b in the other,

    tau = Σ sgn(a_i − a_j)·sgn(b_i − b_j) / √(Σ sgn²(a_i − a_j) · Σ sgn²(b_i − b_j)),

1 where no order changes anything and 0 where the ranking is the order's alone, and by whether the
same candidate comes first.

Shape legend: B histories, R candidates of each, N orders.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
from pydantic import Field

from fusionrec.config import Config
from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.evaluation.ranks import RealArray

BLOCK = 64
"""Histories that are scored together."""


class OrderSensitivity(Config):
    """What other orders of the candidates do to a ranking; means over cases and pairs of orders."""

    num_cases: int = Field(ge=1)
    """Cases with two candidates or more whose scores differ in every order."""
    num_orders: int = Field(ge=2)
    """In which each case's candidates were shown: as they came, and random ones."""
    tau: float = Field(ge=-1, le=1)
    """Kendall's tau-b."""
    same_first: float = Field(ge=0, le=1)
    """Share in which the same candidate comes first; of equals, the one that came first."""


def order_sensitivity(
    score: Callable[[Histories, CodeArray], FloatArray],
    histories: Histories,
    items: CodeArray,
    *,
    num_orders: int = 4,
    seed: int = 0,
) -> OrderSensitivity | None:
    """Show the candidates of B histories in ``num_orders`` orders each.

    Args:
        score: [B, R] scores of the [B, R] candidates of B histories, padded behind with −1.
        histories: B of them.
        items: [B, R] the candidates, best first, padded behind with −1.
        num_orders: N; the first is the one of ``items``.
        seed: Of the others.

    Returns:
        None where no case has two candidates with different scores in every order.
    """
    generator = np.random.default_rng(seed)
    lengths = (items >= 0).sum(axis=1)
    found = []
    for number in range(num_orders):
        places = np.tile(np.arange(items.shape[1]), (len(items), 1))
        for row, length in enumerate(lengths):
            if number:
                places[row, :length] = generator.permutation(length)
        shown = np.take_along_axis(items, places, axis=1)
        scores = np.concatenate(
            [
                score(histories.slice(s, min(s + BLOCK, len(items))), shown[s : s + BLOCK])
                for s in range(0, len(items), BLOCK)
            ]
        )
        back = np.empty_like(scores)
        np.put_along_axis(back, places, scores, axis=1)
        found.append(np.where(items >= 0, back, -np.inf))
    of_each = np.stack(found)  # [N, B, R]
    signs = [_signs(scores) for scores in of_each]
    told = np.all([each.any(axis=1) for each in signs], axis=0) & (lengths > 1)
    if not told.any():
        return None
    firsts = of_each[:, told].argmax(axis=2)  # [N, B]
    pairs = list(combinations(range(num_orders), 2))
    return OrderSensitivity(
        num_cases=int(told.sum()),
        num_orders=num_orders,
        tau=float(np.mean([_tau(signs[a][told], signs[b][told]) for a, b in pairs])),
        same_first=float(np.mean([firsts[a] == firsts[b] for a, b in pairs])),
    )


def _signs(scores: RealArray) -> RealArray:
    """[B, R·(R − 1)/2] which of each pair of candidates is better; 0 for equals and padding."""
    first, second = np.triu_indices(scores.shape[1], k=1)
    exists = np.isfinite(scores[:, second])
    # What is not there must not be subtracted: ∞ − ∞ is no number.
    finite = np.where(np.isfinite(scores), scores, 0)
    return np.where(exists, np.sign(finite[:, first] - finite[:, second]), 0)


def _tau(a: RealArray, b: RealArray) -> RealArray:
    """[B] tau-b of the pairs' signs."""
    found: RealArray = (a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return found.clip(-1, 1)
