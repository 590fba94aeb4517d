"""The layers of BERT and its relatives for inference on a CPU, and nothing around them.

Transformers calls some twenty Python functions for each layer. Here a layer is seven kernels, in
bf16 or, between the steps that make 8 bits of what comes in, in int8: query, key and value are one
product, GELU and residual sums are made with the product before them. ``benchmarks.models``
measures what that gains.

Shape legend: B texts, L tokens, H heads, D the width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, TypeGuard

import torch
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from fusionrec.errors import ModelError
from fusionrec.language.packing import Activation, PackedLinear, has_gelu, packable
from fusionrec.language.quantized import Int8FeedForward, Int8Linear, has_vnni, quantisable

_ENCODERS = ("BertEncoder", "RobertaEncoder", "XLMRobertaEncoder")


class FastLinear(Protocol):
    """A linear layer, its activation, and the sum after it: :class:`PackedLinear` or another."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[…, out] of ``inputs`` […, in]."""

    def plus(self, inputs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """[…, out] of ``inputs`` […, in], with ``other`` […, out] added."""


_Make: TypeAlias = Callable[[torch.nn.Linear, Activation], FastLinear]
_Fits: TypeAlias = Callable[[Any], bool]


@torch.inference_mode()
def pack(module: torch.nn.Module) -> None:
    """Replace, in place, what is faster here: linear layers in bf16 on a CPU, and all of BERT's."""
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        _replace(module, packable, PackedLinear)


@torch.inference_mode()
def quantise(module: torch.nn.Module, peaks: Sequence[float] = ()) -> None:
    """Replace, in place, linear layers in float32 on a CPU by ones in 8 bits, and all of BERT's.

    Those of no more than one output stay: a score in 8 bits would tie with others.

    Args:
        module: the model.
        peaks: what :func:`~.quantized.watched` has seen of each of BERT's layers; they are faster
            then. Without instructions that need it, and in other models, nothing is made of them.

    Raises:
        ModelError: BERT has another number of layers.
    """
    _replace(module, quantisable, Int8Linear, peaks if has_vnni() else ())


def _replace(
    module: torch.nn.Module, fits: _Fits, make: _Make, peaks: Sequence[float] = ()
) -> None:
    fused = has_gelu(module) and fits(module.dense)
    for name, child in module.named_children():
        if replaceable(child, fits):
            setattr(module, name, Layers(child, make, peaks))
        elif fits(child):
            assert isinstance(child, torch.nn.Linear)
            activation: Activation = "gelu" if fused and name == "dense" else "none"
            setattr(module, name, make(child, activation))
        else:
            _replace(child, fits, make, peaks)
    if fused:
        module.intermediate_act_fn = torch.nn.Identity()


def replaceable(module: Any, fits: _Fits) -> TypeGuard[torch.nn.Module]:
    """Whether :class:`Layers` computes what ``module`` does, if its linear layers ``fits``."""
    kind = type(module)
    if kind.__name__ not in _ENCODERS or not kind.__module__.startswith("transformers."):
        return False
    config = module.config
    plain = not (config.is_decoder or config.add_cross_attention)
    return (
        plain
        and config._attn_implementation == "sdpa"
        and len(module.layer) > 0
        and all(fits(layer.output.dense) and has_gelu(layer.intermediate) for layer in module.layer)
    )


class Layers(torch.nn.Module):
    """Takes the place of the ``encoder`` inside a model of Transformers."""

    def __init__(self, encoder: Any, make: _Make, peaks: Sequence[float] = ()) -> None:
        """Take over the layers of an encoder that is :func:`replaceable`."""
        super().__init__()
        layers = encoder.layer
        if peaks and len(peaks) != len(layers):
            raise ModelError(
                f"peaks of {len(peaks)} layers are known, and the model has {len(layers)}; "
                "remove inference.json, then choose again with `python -m jobs.optimise`"
            )
        heads = encoder.config.num_attention_heads
        known: Sequence[float | None] = peaks or [None] * len(layers)
        self._layers = [
            _Layer(layer, heads, make, peak) for layer, peak in zip(layers, known, strict=True)
        ]

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """[B, L, D] of [B, L, D]; the mask, where there is one, as Transformers makes it."""
        if attention_mask is not None and attention_mask.dtype is torch.bool:
            # [B, 1, L, L], but the same for all queries; each layer would make numbers of it again.
            keys = attention_mask[:, :, :1]
            attention_mask = hidden_states.new_zeros(keys.shape).masked_fill_(~keys, float("-inf"))
        for layer in self._layers:
            hidden_states = layer(hidden_states, attention_mask)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


class _Layer:
    """Attention (Vaswani et al., 2017) and feed-forward network, each with its normalisation."""

    def __init__(self, layer: Any, heads: int, make: _Make, peak: float | None) -> None:
        own, given = layer.attention.self, layer.attention.output
        self._heads = heads
        self._asked = make(_stacked(own.query, own.key, own.value), "none")
        self._mixed = make(given.dense, "none")
        self._norm = given.LayerNorm
        wide, narrow = layer.intermediate.dense, layer.output.dense
        self._feed_forward = (
            _FeedForward(make(wide, "gelu"), make(narrow, "none"))
            if peak is None
            else Int8FeedForward(wide, narrow, peak)
        )
        self._last_norm = layer.output.LayerNorm

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch, length, width = hidden.shape
        parts = self._asked(hidden).view(batch, length, 3, self._heads, width // self._heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        found = found.transpose(1, 2).reshape(batch, length, width)
        hidden = _normal(self._mixed.plus(found, hidden), self._norm)
        return _normal(self._feed_forward(hidden), self._last_norm)


class _FeedForward:
    """Two linear layers, the first of them with its GELU, and the sum with what came in."""

    def __init__(self, wide: FastLinear, narrow: FastLinear) -> None:
        self._wide, self._narrow = wide, narrow

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._narrow.plus(self._wide(hidden), hidden)


def _normal(hidden: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    return layer_norm(hidden, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _stacked(*linears: torch.nn.Linear) -> torch.nn.Linear:
    """One layer whose output is those of ``linears``, one after the other."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    stacked = torch.nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    stacked.weight = torch.nn.Parameter(weight, requires_grad=False)
    bias = torch.cat([linear.bias.detach() for linear in linears])
    stacked.bias = torch.nn.Parameter(bias, requires_grad=False)
    return stacked
