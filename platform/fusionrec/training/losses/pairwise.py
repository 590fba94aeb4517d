r"""Pairwise logistic loss, for rerankers.

For one history with candidates of scores s and relevances y, over all pairs of which one is more
relevant than the other,

    loss = 1/|{(i, k): y_i > y_k}| Σ_{y_i > y_k} log(1 + exp(s_k − s_i)).

It is RankNet of Burges et al., Learning to rank using gradient descent (ICML 2005), and with one
relevant candidate BPR of Rendle et al., BPR: Bayesian personalized ranking from implicit feedback
(UAI 2009), both without their regularisation: the weight decay of the optimizer does that.

Shape legend: B histories, C candidates of the longest list.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def pairwise_logistic(scores: Tensor, relevance: Tensor, present: Tensor) -> Tensor:
    """The loss averaged over the histories that have a pair: a scalar in nats.

    Args:
        scores: [B, C] logits of the candidates.
        relevance: [B, C]; only its order within a history matters.
        present: bool [B, C], False where a list is padded.

    Without any pair the loss is 0.
    """
    scores = scores.float()
    pairs = (relevance[:, :, None] > relevance[:, None, :]) & (
        present[:, :, None] & present[:, None, :]
    )  # [B, C, C]
    costs = softplus(scores[:, None, :] - scores[:, :, None])
    counts = pairs.sum(dim=(1, 2))
    losses = (costs * pairs).sum(dim=(1, 2)) / counts.clamp(min=1)
    return losses.sum() / (counts > 0).sum().clamp(min=1)
