r"""Losses that bring a student's scores of a list near a teacher's.

Margin-MSE compares the differences between the relevant candidate (the first) and each other one,
so that teacher and student need no common zero, but a common unit:

    loss = 1/(C−1) Σ_{c>0} ((s_0 − s_c) − (t_0 − t_c))².

Hofstätter et al.: Improving efficient neural ranking models with cross-architecture knowledge
distillation (2020), eq. 7.

The KL divergence compares the distributions of which candidate comes first, with T > 0 flattening
both; T² keeps the gradient's size independent of T, as in Hinton, Vinyals & Dean: Distilling the
knowledge in a neural network (2015):

    loss = T² Σ_c p_c · log(p_c / q_c),  p = softmax(t / T),  q = softmax(s / T).

Shape legend: B histories, C candidates of the longest list.
"""

from __future__ import annotations

import torch
from torch import Tensor


def margin_mse(student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
    """The mean squared difference of margins over the pairs of a history, then over histories.

    Args:
        student: [B, C] scores.
        teacher: [B, C] scores; no gradient reaches them.
        present: bool [B, C], False where a list is padded; the first candidate is always there.

    A history of one candidate does not count; without any pair the loss is 0.
    """
    student, teacher = student.float(), teacher.detach().float()
    apart = (student[:, :1] - student[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])
    pairs = present[:, 1:]
    counts = pairs.sum(dim=1)
    losses = (apart.square() * pairs).sum(dim=1) / counts.clamp(min=1)
    return losses.sum() / (counts > 0).sum().clamp(min=1)


def list_kl(
    student: Tensor, teacher: Tensor, present: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """The divergence of the student's from the teacher's order, mean of histories: nats.

    Args:
        student: [B, C] scores.
        teacher: [B, C] scores; no gradient reaches them.
        present: bool [B, C], False where a list is padded; the first candidate is always there.
        temperature: T.

    No histories at all give 0.
    """
    assert temperature > 0
    # A finite floor: −inf − −inf would be NaN.
    floor = torch.finfo(torch.float32).min
    q, p = (
        torch.log_softmax((scores.float() / temperature).masked_fill(~present, floor), dim=1)
        for scores in (student, teacher.detach())
    )
    losses = (p.exp() * (p - q) * present).sum(dim=1)
    return temperature**2 * losses.sum() / max(1, len(losses))
