"""Linear layers in 8 bits for inference on a CPU.

Weights have a scale for each output, w ≈ s_o · q with q from −127 to 127; what comes in gets a
scale and a zero point in every call (dynamic quantisation). An erf GELU behind a layer is computed
with it, and so is the sum with a residual.

To find the levels of what comes in takes time, most of it inside of a feed-forward network, which
is four times as wide there. Where the peak of that was seen before (:func:`watched`) it has one
scale (static quantisation), and is never written in more than 8 bits.
``benchmarks.models`` measures what that gains and costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeGuard

import torch

from fusionrec.language.packing import Activation, has_gelu

_WEIGHT_LEVELS = 127
_STEPS = 254
"""One level less than there are, so that nothing is rounded beyond the last."""
_LEAST = 1e-8
"""Scale of what is 0 throughout."""
_GELU_LEAST = -0.17
"""The least value of an erf GELU, at −0.75."""


@dataclass(frozen=True, slots=True)
class Levels:
    """What 8 bits stand for: step · (level − zero)."""

    step: float
    zero: int

    @classmethod
    def over(cls, low: float, high: float, steps: int) -> Self:
        """``low`` to ``high``, and 0 in any case, in so many steps."""
        low, high = min(low, 0.0), max(high, 0.0)
        step = max((high - low) / steps, _LEAST)
        return cls(step, round(-low / step))


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
        self._steps = _STEPS if has_vnni() else _STEPS // 2 - 1

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[…, out] of ``inputs`` […, in]."""
        return self._product(inputs, 1.0, 0, torch.float32).view(*inputs.shape[:-1], -1)

    def in_levels(self, inputs: torch.Tensor, levels: Levels) -> torch.Tensor:
        """[N, out] of ``inputs`` […, in], in ``levels``; what is beyond them is cut off."""
        return self._product(inputs, levels.step, levels.zero, torch.uint8)

    def plus(self, inputs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """[…, out] of ``inputs`` […, in], with ``other`` […, out] added."""
        return self.plus_levels(*self._levels_of(inputs), other)

    def plus_levels(
        self, inputs: torch.Tensor, levels: Levels, other: torch.Tensor
    ) -> torch.Tensor:
        """As :meth:`plus`, of ``inputs`` [N, in] that are in ``levels``."""
        found: torch.Tensor = torch.ops.onednn.qlinear_pointwise.binary(
            *(inputs, levels.step, levels.zero),
            *(self._packed, self._scales, self._zeros, other.flatten(0, -2), self._bias),
            *(1.0, 0, torch.float32, 1.0, 0, "add", 1.0, "none", [], ""),
        )
        return found.view(other.shape)

    def _product(
        self, inputs: torch.Tensor, step: float, zero: int, dtype: torch.dtype
    ) -> torch.Tensor:
        rows, levels = self._levels_of(inputs)
        found: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            *(rows, levels.step, levels.zero),
            *(self._packed, self._scales, self._zeros, self._bias),
            *(step, zero, dtype, *self._activation),
        )
        return found

    def _levels_of(self, inputs: torch.Tensor) -> tuple[torch.Tensor, Levels]:
        """[N, in] levels of inputs […, in], over all that these are."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        low, high = (float(bound) for bound in torch.aminmax(rows))
        levels = Levels.over(low, high, self._steps)
        # The half makes rounding of what cuts off. By way of int16 it takes a quarter of the time.
        found = torch.add(torch.tensor(levels.zero + 0.5), rows, alpha=1 / levels.step)
        return found.to(torch.int16).to(torch.uint8), levels


class Int8FeedForward:
    """Two linear layers with an erf GELU between them, and the sum with what came in.

    For a CPU that :func:`has_vnni`.
    """

    def __init__(self, wide: torch.nn.Linear, narrow: torch.nn.Linear, peak: float) -> None:
        """Between the layers, what is above ``peak`` is cut off."""
        self._wide, self._narrow = Int8Linear(wide, "gelu"), Int8Linear(narrow)
        self._levels = Levels.over(_GELU_LEAST, peak, _STEPS)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[…, D] of ``hidden`` […, D]."""
        inner = self._wide.in_levels(hidden, self._levels)
        return self._narrow.plus_levels(inner, self._levels, hidden)


@contextmanager
def watched(module: torch.nn.Module) -> Iterator[list[float]]:
    """While texts are read: the largest output of each erf GELU so far, in the layers' order."""
    layers = [each for each in module.modules() if has_gelu(each)]
    peaks = [0.0] * len(layers)

    def look(layer: int, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        peaks[layer] = max(peaks[layer], output.max().item())

    handles = [
        each.register_forward_hook(partial(look, layer)) for layer, each in enumerate(layers)
    ]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


def has_vnni() -> bool:
    """Whether this CPU adds up products of 8 bits in 32."""
    return bool(torch.cpu.get_capabilities().get("avx512_vnni", False))


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
