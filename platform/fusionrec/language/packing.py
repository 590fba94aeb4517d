"""Weights laid out once as the CPU's matrix instructions want them, instead of in every call.

In bf16 oneDNN copies the weights of a linear layer into blocks before it multiplies, whenever the
layer is called, which is dear where there is little to multiply. The results are the same to the
bit. An erf GELU behind a linear layer is computed with it, before its result is rounded to bf16,
instead of in a pass of its own. ``benchmarks.models`` measures what both gain.
"""

from __future__ import annotations

from typing import Any, Literal, TypeGuard

import torch
from transformers.activations import GELUActivation

Activation = Literal["none", "gelu"]


class PackedLinear(torch.nn.Module):
    """A linear layer and its activation, for inference in bf16 on a CPU; can't be saved."""

    def __init__(self, linear: torch.nn.Linear, activation: Activation = "none") -> None:
        super().__init__()
        weight = linear.weight.detach()
        # Without memory: there are models that ask their layers' weights for a dtype or shape.
        self.weight = torch.empty_like(weight, device="meta")
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._activation = activation

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[…, out] of ``inputs`` […, in]."""
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self._packed, self._bias, self._activation, [], "none"
        )
        return found

    def plus(self, inputs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """[…, out] of ``inputs`` […, in], with ``other`` […, out] added before it is rounded."""
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            inputs, other, self._packed, self._bias, "add"
        )
        return found


def has_gelu(module: Any) -> bool:
    """Whether this is the feed-forward layer of BERT or a relative: ``dense``, then an erf GELU."""
    activation = getattr(module, "intermediate_act_fn", None)
    return (
        isinstance(activation, GELUActivation)
        and activation.act is torch.nn.functional.gelu
        and isinstance(getattr(module, "dense", None), torch.nn.Linear)
    )


def packable(module: Any) -> TypeGuard[torch.nn.Linear]:
    """Whether this is a linear layer that :class:`PackedLinear` makes faster."""
    return (
        type(module) is torch.nn.Linear
        and module.weight.dtype is torch.bfloat16
        and module.weight.device.type == "cpu"
    )
