"""Linear layers in 8 bits for inference on a CPU.

Weights have a scale for each output, w ≈ s_o · q with q from −127 to 127; what comes in gets a
scale and a zero point in every call (dynamic quantisation), so that nothing has to be calibrated.
An erf GELU behind a layer is computed with it, and so is the sum with a residual.
``benchmarks.models`` measures what that gains and costs.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch

from fusionrec.language.packing import Activation

_WEIGHT_LEVELS = 127
_LEAST = 1e-8
"""Scale of what is 0 throughout."""


class Int8Linear(torch.nn.Module):
    """A linear layer and its activation, for inference in 8 bits on a CPU; can't be saved."""

    def __init__(self, linear: torch.nn.Linear, activation: Activation = "none") -> None:
        super().__init__()
        weight = linear.weight.detach()
        # Without memory: there are models that ask their layers' weights for a dtype or shape.
        self.weight = torch.empty_like(weight, device="meta")
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._scales = (weight.abs().amax(dim=1) / _WEIGHT_LEVELS).clamp(min=_LEAST)
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        levels = torch.round(weight / self._scales[:, None]).to(torch.int8)
        self._packed: Any = torch.ops.onednn.qlinear_prepack(levels, None)
        self._activation: tuple[Any, ...] = (activation, [], "none" if activation == "gelu" else "")
        # Without these instructions two products of 8 bits are added up in 16, and may not fit.
        has_vnni = torch.cpu.get_capabilities().get("avx512_vnni", False)
        # One level less than there are, so that nothing is rounded beyond the last.
        self._steps = 254 if has_vnni else 126

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[…, out] of ``inputs`` […, in]."""
        found: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            *self._in_levels(inputs),
            *(self._packed, self._scales, self._zeros, self._bias),
            *(1.0, 0, torch.float32, *self._activation),
        )
        return found.view(*inputs.shape[:-1], -1)

    def plus(self, inputs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """[…, out] of ``inputs`` […, in], with ``other`` […, out] added."""
        found: torch.Tensor = torch.ops.onednn.qlinear_pointwise.binary(
            *self._in_levels(inputs),
            *(self._packed, self._scales, self._zeros, other.flatten(0, -2), self._bias),
            *(1.0, 0, torch.float32, 1.0, 0, "add", 1.0, "none", [], ""),
        )
        return found.view(other.shape)

    def _in_levels(self, inputs: torch.Tensor) -> tuple[torch.Tensor, float, int]:
        """[N, in] levels from 0, their distance, and the level of 0."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        low, high = (float(bound) for bound in torch.aminmax(rows))
        low, high = min(low, 0.0), max(high, 0.0)  # so that 0 is a level
        step = max((high - low) / self._steps, _LEAST)
        zero = round(-low / step)
        # The half makes rounding of what cuts off. By way of int16 it takes a quarter of the time.
        levels = torch.add(torch.tensor(zero + 0.5), rows, alpha=1 / step)
        return levels.to(torch.int16).to(torch.uint8), step, zero


def has_int8() -> bool:
    """Whether torch can multiply in 8 bits on this CPU."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def quantisable(module: Any) -> TypeGuard[torch.nn.Linear]:
    """Whether this is a linear layer that :class:`Int8Linear` may stand for."""
    return (
        type(module) is torch.nn.Linear
        and module.out_features > 1
        and module.weight.dtype is torch.float32
        and module.weight.device.type == "cpu"
    )
