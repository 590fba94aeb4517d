"""Floating-point operations of training a decoder, and what a GPU can do at its peak.

Model FLOPs as PaLM counts them (Chowdhery et al., 2022, arXiv:2204.02311, appendix B): what forward
and backward pass need by the architecture, whatever an implementation computes twice or leaves out.
Of one token

    6 N + 12 · L · H · Q · T,

with N the weights that tokens are multiplied with (2 forward, 2 for the gradient of what goes in,
2 for their own), L layers, H heads of Q dimensions, T tokens of a text; attention is counted whole,
not by its causal half. The table of tokens is looked up, not multiplied with: it counts as the head
where the two are tied, and not at all where they are not. Weights that are frozen have no gradient
of their own: 4 for each of them. A utilisation is of the peak of dense matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

PEAKS = {
    "B200": 2_250e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 FLOPs a second, without sparsity, by what the name of a GPU contains; from the makers'
data sheets. The first that fits counts."""


@dataclass(frozen=True, slots=True)
class Counted:
    """Weights that tokens are multiplied with."""

    frozen: int
    trained: int
    attention: int
    """12 · L · H · Q: FLOPs of a token for each token that it attends to."""

    def a_token(self, length: int) -> int:
        """FLOPs of a token of a text of ``length``."""
        return 4 * self.frozen + 6 * self.trained + self.attention * length


def count(model: torch.nn.Module) -> Counted:
    """Of a causal language model of transformers, with or without adapters."""
    whole: Any = getattr(model, "get_base_model", lambda: model)()  # inside of adapters
    described = whole.config
    heads = described.num_attention_heads
    size = getattr(described, "head_dim", None) or described.hidden_size // heads
    # Matrices only: of norms and biases there is one operation a weight.
    weights = {
        id(each.weight): each.weight
        for each in model.modules()
        if isinstance(each, torch.nn.Linear)
    }.values()
    return Counted(
        frozen=sum(weight.numel() for weight in weights if not weight.requires_grad),
        trained=sum(weight.numel() for weight in weights if weight.requires_grad),
        attention=12 * described.num_hidden_layers * heads * size,
    )


def peak_of(name: str) -> float | None:
    """bf16 FLOPs a second of the GPU that is called so; nothing where it is not known."""
    return next((peak for known, peak in PEAKS.items() if _contains(name, known)), None)


def _contains(name: str, known: str) -> bool:
    """Whether the words of ``known`` are among those of ``name``: an L4 is no L40."""
    words = name.replace("-", " ").split()
    return all(word in words for word in known.split())
