r"""InfoNCE with in-batch negatives, for the encoder.

Each history's positive is the item that came next; the other rows' items are its negatives. Some of
them are not negative at all, and are masked: the same item as the row's own target, and others that
the row's user had. For B histories q and items d of unit length,

    loss = −1/B Σ_i log  exp(s_ii) / (exp(s_ii) + Σ_{j negative for i} exp(s_ij)),
    s_ij = q_i·d_j / τ − log p_j.

The correction log p_j undoes the bias of in-batch sampling, which draws an item as a negative as
often as it is popular, so that popular items are pushed away too hard.

van den Oord, Li & Vinyals: Representation learning with contrastive predictive coding (2018);
Yi et al.: Sampling-bias-corrected neural modeling for large corpus item recommendations (RecSys
2019), eq. 4–6, where p_j is estimated as a share of the training events, as here.

Shape legend: B histories, M ≥ B items, D dimensions, H items of the longest history.
"""

from __future__ import annotations

import torch
from torch import Tensor


def info_nce(
    histories: Tensor,
    items: Tensor,
    false_negatives: Tensor,
    *,
    temperature: float = 0.05,
    log_popularity: Tensor | None = None,
) -> Tensor:
    """The loss, a scalar in nats.

    Args:
        histories: [B, D] L2-normalised vectors.
        items: [M, D] L2-normalised vectors; row i < B is the target of history i. Rows beyond B
            are further negatives: gathered from other workers, or mined.
        false_negatives: bool [B, M], which items are no negatives of which history; the targets'
            own places count as positives whatever it says.
        temperature: τ > 0; the smaller, the more the hardest negatives decide.
        log_popularity: [M] natural logarithm of each item's share of the training events; without
            it no correction.

    A row with no negative left contributes 0 and no gradient; no rows at all give 0.
    """
    assert temperature > 0
    if not len(histories):
        return histories.sum() * 0.0
    scores = histories.float() @ items.float().T / temperature
    if log_popularity is not None:
        scores = scores - log_popularity.to(scores)
    rows = torch.arange(len(histories), device=scores.device)
    masked = false_negatives.clone()
    masked[rows, rows] = False
    return torch.nn.functional.cross_entropy(scores.masked_fill(masked, -torch.inf), rows)
