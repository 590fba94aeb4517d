"""Hard negatives that the current encoder finds: the unseen items nearest to a history.

Xiong et al.: Approximate nearest neighbor negative contrastive learning for dense text retrieval
(ANCE, ICLR 2021). The search is exact, by blocks. It costs a forward pass over every item and every
example's history, shared among the workers, and P·I·D multiplications.

Shape legend: P examples, I items, D dimensions, M negatives, T texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fusionrec.data.histories import BoolArray, CodeArray
from fusionrec.training.examples import Examples
from fusionrec.training.gather import in_turns, place
from fusionrec.training.task import Batch, Forward

_TEXTS, _QUERIES = 64, 256
"""Texts and histories of a block."""


def encode_all(
    forward: Forward,
    encode: Callable[[torch.nn.Module, Batch], Tensor],
    tokens: Callable[[list[str]], Batch],
    texts: Sequence[str],
) -> Tensor:
    """[T, D] vectors of ``texts`` on the CPU, the same on every worker; each encodes its share.

    All workers run equally many passes, which ZeRO-3 needs.
    """
    rank, world = place()
    share = -(-len(texts) // world)
    own = [texts[min(world * row + rank, len(texts) - 1)] for row in range(share)]
    found = [
        forward(encode, tokens(own[start : start + _TEXTS])) for start in range(0, share, _TEXTS)
    ]
    return in_turns(torch.cat(found))[: len(texts)].float().cpu()


def mine(
    queries: Tensor,
    items: Tensor,
    examples: Examples,
    with_text: BoolArray,
    *,
    count: int,
    nearest: int,
    seed: int,
) -> CodeArray:
    """[P, M] codes of unseen items, drawn from each history's ``nearest``; −1 where there are none.

    Args:
        queries: [P, D] vectors of the examples' histories.
        items: [I, D] vectors.
        examples: P of them.
        with_text: [I] items that have text; others are no negatives.
        count: M.
        nearest: Items to draw from; M where that is more.
        seed: Of the draw.
    """
    generator = np.random.default_rng(seed)
    nearest = min(max(nearest, count), len(items))
    mined = np.full((len(queries), count), -1, dtype=np.int32)
    for start in range(0, len(queries), _QUERIES):
        scores = queries[start : start + _QUERIES] @ items.T
        scores[:, torch.from_numpy(~with_text)] = -torch.inf
        for row, user in enumerate(examples.users[start : start + _QUERIES]):
            scores[row, torch.from_numpy(examples.seen.row(int(user))).long()] = -torch.inf
        best = scores.topk(nearest, dim=1)
        codes = torch.where(best.values.isfinite(), best.indices, -1).numpy()
        # Existing ones first, in random order.
        order = np.argsort(generator.random(codes.shape) + (codes < 0), axis=1)[:, :count]
        mined[start : start + len(codes), : order.shape[1]] = np.take_along_axis(codes, order, 1)
    return mined
