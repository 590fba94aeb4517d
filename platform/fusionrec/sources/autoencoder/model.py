"""The model in torch: a history becomes a normal distribution, a draw from it scores all items.

Shape legend: B histories, E their distinct items, I items, H the hidden width, D the factors.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusionrec.sources.autoencoder.config import RecVAEConfig
from fusionrec.sources.autoencoder.forward import EPSILON

_SHARES = (3 / 20, 15 / 20, 2 / 20)
"""Of the standard normal, the former posterior and the wide normal in the prior: the paper's."""
_WIDE = 10.0
"""Logarithm of the variance of the wide one."""


@dataclass(frozen=True, slots=True)
class Bags:
    """The distinct items of B histories."""

    items: Tensor
    """[E]"""
    weights: Tensor
    """[E] recency, of length 1 in each history."""
    offsets: Tensor
    """[B] where each begins."""
    rows: Tensor
    """[E] the history of each."""

    def kept(self, dropout: float) -> Bags:
        """The bags with a random share of the items at weight 0, the others scaled up."""
        mask = (torch.rand(len(self.items)) >= dropout) / (1 - dropout)
        return Bags(self.items, self.weights * mask, self.offsets, self.rows)


class Encoder(nn.Module):
    """Mean and log-variance [B, D] of each history; layers read the sum of all before them."""

    def __init__(self, config: RecVAEConfig, num_items: int) -> None:
        super().__init__()
        hidden = config.hidden
        self.first = nn.EmbeddingBag(num_items, hidden, mode="sum", include_last_offset=False)
        nn.init.xavier_uniform_(self.first.weight)
        self.first_bias = nn.Parameter(torch.zeros(hidden))
        self.linears = nn.ModuleList(
            nn.Linear(hidden, hidden) for _ in range(config.num_layers - 1)
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(hidden, eps=EPSILON) for _ in range(config.num_layers)
        )
        self.mean = nn.Linear(hidden, config.factors)
        self.log_variance = nn.Linear(hidden, config.factors)

    def forward(self, bags: Bags) -> tuple[Tensor, Tensor]:
        """The distributions of B histories."""
        summed = self.first(bags.items, bags.offsets, per_sample_weights=bags.weights)
        last = self.norms[0](nn.functional.silu(summed + self.first_bias))
        read = last
        for linear, norm in zip(self.linears, list(self.norms)[1:], strict=True):
            last = norm(nn.functional.silu(linear(last) + read))
            read = read + last
        return self.mean(last), self.log_variance(last)


class Autoencoder(nn.Module):
    """Encoder, linear decoder, and the encoder as it was before, for the prior."""

    def __init__(self, config: RecVAEConfig, num_items: int) -> None:
        super().__init__()
        self.encoder = Encoder(config, num_items)
        self.decoder = nn.Linear(config.factors, num_items)
        nn.init.xavier_normal_(self.decoder.weight)
        self.former = copy.deepcopy(self.encoder).requires_grad_(requires_grad=False)
        self._config = config

    def loss(self, bags: Bags, *, dropout: float) -> Tensor:
        """Mean of −log p(items | z) + γ · |items| · (log q(z) − log p(z)), z drawn once each."""
        mean, log_variance = self.encoder(bags.kept(dropout))
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        logs = torch.log_softmax(self.decoder(z), dim=1)
        found = logs[bags.rows, bags.items].sum() / len(bags.offsets)
        with torch.no_grad():
            former_mean, former_log_variance = self.former(bags)
        zero = torch.zeros_like(mean)
        prior = torch.stack(
            [
                math.log(share) + log_normal(z, *of)
                for share, of in zip(
                    _SHARES,
                    ((zero, zero), (former_mean, former_log_variance), (zero, zero + _WIDE)),
                    strict=True,
                )
            ]
        ).logsumexp(dim=0)
        divergence = (log_normal(z, mean, log_variance) - prior).sum(dim=1)
        sizes = torch.bincount(bags.rows, minlength=len(bags.offsets))
        return (self._config.gamma * sizes * divergence).mean() - found

    def remember(self) -> None:
        """Make the encoder of now the former one."""
        self.former.load_state_dict(self.encoder.state_dict())


def log_normal(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Logarithm of the normal density, number by number."""
    spread = log_variance + math.log(2 * math.pi) + (x - mean).square() / log_variance.exp()
    return -0.5 * spread
