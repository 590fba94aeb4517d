r"""Listwise softmax, for the reranker.

For one history with candidates of scores s and relevances y ≥ 0,

    loss = −Σ_c  y_c / Σ_k y_k · log  exp(s_c) / Σ_k exp(s_k),

the cross-entropy between the two distributions of which candidate comes first: the top-one ListNet
of Cao et al., Learning to rank: from pairwise approach to listwise approach (ICML 2007), with the
relevances normalised by their sum. With a single relevant candidate it is the softmax loss, a bound
on the reciprocal rank (Bruch et al., An analysis of the softmax cross entropy loss for
learning-to-rank with binary relevance, ICTIR 2019).

Shape legend: B histories, C candidates of the longest list.
"""

from __future__ import annotations

import torch
from torch import Tensor


def listwise_softmax(scores: Tensor, relevance: Tensor, present: Tensor | None = None) -> Tensor:
    """The loss averaged over the histories that have a relevant candidate: a scalar in nats.

    Args:
        scores: [B, C] logits of the candidates.
        relevance: [B, C] ≥ 0; 1 for the item that came next and 0 for the others, usually.
        present: bool [B, C], False where a list is padded; by default all candidates count.

    A history without a relevant candidate, and a list of one candidate, contribute no gradient;
    where no history has a relevant candidate the loss is 0.
    """
    scores = scores.float()
    relevance = relevance.to(scores)
    if present is not None:
        # A finite floor: −inf of a fully padded list would turn its gradient into NaN.
        scores = scores.masked_fill(~present, torch.finfo(scores.dtype).min)
        relevance = relevance * present
    total = relevance.sum(dim=1)
    log_share = torch.log_softmax(scores, dim=1)
    losses = -(relevance * log_share).sum(dim=1) / total.clamp(min=1e-12)
    counted = total > 0
    return (losses * counted).sum() / counted.sum().clamp(min=1)
