"""Linear layers in 8 bits for inference on a CPU without instructions for bf16.

Weights have a scale for each output, w ≈ s_o · q with q from −127 to 127; what comes in gets a
scale and a zero point in every call (dynamic quantisation), so that nothing has to be calibrated.
``benchmarks.models`` measures what that gains and costs.
"""

from __future__ import annotations

from typing import Any

import torch

_WEIGHT_LEVELS = 127
_LEAST = 1e-8
"""Scale of what is 0 throughout."""


class Int8Linear(torch.nn.Module):
    """A linear layer for inference in 8 bits on a CPU; can't be saved."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        # Without memory: there are models that ask their layers' weights for a dtype or shape.
        self.weight = torch.empty_like(weight, device="meta")
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._scales = (weight.abs().amax(dim=1) / _WEIGHT_LEVELS).clamp(min=_LEAST)
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        levels = torch.round(weight / self._scales[:, None]).to(torch.int8)
        self._packed: Any = torch.ops.onednn.qlinear_prepack(levels, None)
        # Without these instructions two products of 8 bits are added up in 16, and may not fit.
        has_vnni = torch.cpu.get_capabilities().get("avx512_vnni", False)
        self._levels = 255 if has_vnni else 127

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[…, out] of ``inputs`` […, in]."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        low, high = (float(bound) for bound in torch.aminmax(rows))
        low, high = min(low, 0.0), max(high, 0.0)  # so that 0 is a level
        scale = max((high - low) / self._levels, _LEAST)
        zero = round(-low / scale)
        levels = (rows * (1 / scale)).add_(zero + 0.5).clamp_(0, self._levels).to(torch.uint8)
        found: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            *(levels, scale, zero),
            *(self._packed, self._scales, self._zeros, self._bias),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return found.view(*inputs.shape[:-1], -1)


def has_int8() -> bool:
    """Whether torch can multiply in 8 bits on this CPU."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@torch.inference_mode()
def quantise(model: torch.nn.Module) -> None:
    """Replace the linear layers of ``model``, in place.

    Those of no more than one output stay: a score in 8 bits would tie with others.
    """
    for name, child in model.named_children():
        if type(child) is torch.nn.Linear:
            if child.out_features > 1:
                setattr(model, name, Int8Linear(child))
        else:
            quantise(child)
