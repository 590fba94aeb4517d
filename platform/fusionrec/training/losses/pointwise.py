r"""Pointwise logistic loss, for rerankers.

Every candidate is a question of its own, whether it came next: with σ(s) = 1 / (1 + e^−s),

    loss = −1/C Σ_c  y_c · log σ(s_c) + (1 − y_c) · log(1 − σ(s_c)).

Nogueira & Cho: Passage re-ranking with BERT (2019). The scores are calibrated log odds where the
share of relevant candidates is that of the training lists, which no other ranking loss gives.

Shape legend: B histories, C candidates of the longest list.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def pointwise_logistic(scores: Tensor, relevance: Tensor, present: Tensor) -> Tensor:
    """The loss averaged over the candidates of a history, then over histories: nats.

    Args:
        scores: [B, C] logits of the candidates.
        relevance: [B, C] in 0 … 1.
        present: bool [B, C], False where a list is padded.

    A history without a candidate does not count; without any the loss is 0.
    """
    scores = scores.float()
    costs = binary_cross_entropy_with_logits(scores, relevance.to(scores), reduction="none")
    counts = present.sum(dim=1)
    losses = (costs * present).sum(dim=1) / counts.clamp(min=1)
    return losses.sum() / (counts > 0).sum().clamp(min=1)
