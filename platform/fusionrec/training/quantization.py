"""Weights under adapters in 4 bits: QLoRA, Dettmers et al. (2023, arXiv:2305.14314).

A weight is one of the 16 values of NormalFloat (NF4), scaled by the largest of its block of 64;
these scales are quantised, too, to 8 bits by blocks of 256. It is written out again, in the
precision of the computation, each time that its layer computes, in the backward pass as well.
Gradients go through it into the adapters; it is never trained.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from fusionrec.errors import ConfigError

BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Of one weight, with its part of the scales."""


def require() -> None:
    """See that this can be done here.

    Raises:
        ConfigError: a package is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "setting method = qlora needs the Python package bitsandbytes, which is not installed: "
            "run pip install 'fusionrec[qlora]', or set --method lora"
        )


def adapted_layers(model: torch.nn.Module) -> list[Any]:
    """The layers of peft in ``model`` whose weights are put in 4 bits.

    Raises:
        ConfigError: some of them cannot be.
    """
    from peft.tuners.lora import LoraLayer

    found: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in found:
        if not isinstance(layer.get_base_layer(), torch.nn.Linear):
            raise ConfigError(
                "setting method = qlora is wrong: this model's architecture has layers "
                f"({type(layer.get_base_layer()).__name__}) that cannot be put in 4 bits; set "
                "--method lora"
            )
    return found


def quantize(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Put the weights that have adapters in 4 bits on ``device``, one layer after another.

    Args:
        model: Of peft, on the CPU.
        device: Of this worker.
        dtype: That is computed in.

    Raises:
        ConfigError: see :func:`require` and :func:`adapted_layers`.
    """
    require()
    import bitsandbytes

    for layer in adapted_layers(model):
        plain = layer.get_base_layer()
        packed = bitsandbytes.nn.LinearNF4(
            plain.in_features,
            plain.out_features,
            bias=plain.bias is not None,
            compute_dtype=dtype,
            device="meta",
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            plain.weight.detach().to(dtype), quant_type="nf4", module=packed
        )
        packed.bias = plain.bias
        # Evaluated on a CPU with AVX-512 BF16, a layer would go over to a format that has no
        # gradients, and stay with it when training goes on.
        packed.support_avx512bf16_for_cpu = False
        packed.register_state_dict_post_hook(_without_scales)
        layer.base_layer = packed.to(device)


def _without_scales(_: torch.nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    """Leave them out of checkpoints, as the weights are: a run puts them in 4 bits anew."""
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def values(parameter: torch.Tensor) -> torch.Tensor:
    """What ``parameter`` stands for: the weights themselves, unless they are in 4 bits."""
    scales = getattr(parameter, "quant_state", None)
    if scales is None:
        return parameter
    from bitsandbytes.functional import dequantize_4bit

    written_out: torch.Tensor = dequantize_4bit(parameter.detach(), scales)
    return written_out
