r"""Sampled softmax: which item came next, among many drawn ones instead of the whole catalogue.

For the vector h of an event, the vector y of the item that came next and M negatives with vectors
n, drawn with replacement from a distribution Q and shared by all events of a batch,

    loss = −log  exp⟨h, y⟩ / (exp⟨h, y⟩ + Σ_{m: n_m ≠ y} exp(⟨h, n_m⟩ − log(M · Q(m))))

The correction makes the sum an unbiased estimate of the sum over all items: without it, an item
would be pushed away as often as it is drawn. Q mixes the items of the training events (popular ones
are the hard negatives) with items drawn uniformly (which bounds the correction of rare ones):

    Q(i) = share · events(i) / events + (1 − share) / items with events

Items without events are never drawn: nothing says that they were passed over.

Bengio & Senécal, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic
Language Model" (2008); on the positive, which is no part of the sample and not corrected:
Khrylchenko et al., "Correcting the LogQ Correction" (RecSys 2025).

Shape legend: N events of a batch, D the width, M negatives, I items.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fusionrec.data.histories import CodeArray


class Negatives:
    """Draws negatives; every item with events once, if M allows."""

    def __init__(self, items: CodeArray, num_items: int, num_negatives: int, share: float) -> None:
        """``items``: those of all training events; ``share``: of the draws that follow them."""
        self._events = torch.from_numpy(items.astype("int64"))
        counts = torch.bincount(self._events, minlength=num_items)
        (self._warm,) = torch.nonzero(counts, as_tuple=True)
        self._num_popular = round(num_negatives * share)
        self._num_uniform = num_negatives - self._num_popular
        self._all = num_negatives >= len(self._warm)
        if self._all:
            self._log_expected = torch.zeros(num_items)
        else:
            popular = counts / len(self._events) * self._num_popular
            uniform = (counts > 0) / len(self._warm) * self._num_uniform
            self._log_expected = torch.log(popular + uniform)

    def draw(self, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """[M] item codes, and the logarithm of how often each was expected."""
        if self._all:
            return self._warm, self._log_expected[self._warm]
        popular = self._events[generator.integers(len(self._events), size=self._num_popular)]
        uniform = self._warm[generator.integers(len(self._warm), size=self._num_uniform)]
        codes = torch.cat([popular, uniform])
        return codes, self._log_expected[codes]


def sampled_softmax(
    events: Tensor,
    next_codes: Tensor,
    next_vectors: Tensor,
    negative_codes: Tensor,
    negative_vectors: Tensor,
    log_expected: Tensor,
) -> Tensor:
    """The mean loss, a scalar in nats.

    Args:
        events: [N, D] vectors of events, N ≥ 1.
        next_codes: [N] the items that came next.
        next_vectors: [N, D] their vectors.
        negative_codes: [M] drawn items; a row's own next item does not count.
        negative_vectors: [M, D] their vectors.
        log_expected: [M] logarithm of how often each was expected in the draw.

    A row with no negative left contributes 0 and no gradient.
    """
    positive = (events * next_vectors).sum(dim=-1)
    negative = events @ negative_vectors.T - log_expected
    negative = negative.masked_fill(next_codes[:, None] == negative_codes, -torch.inf)
    return (torch.logaddexp(positive, negative.logsumexp(dim=1)) - positive).mean()
