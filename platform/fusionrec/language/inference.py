"""What the encoder and the reranker share: tokens, precision, and batches of similar length.

Texts are sorted by their number of tokens before they are batched: a batch is padded to its longest
text, and without the order most of the work would be on padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fusionrec.data.histories import FloatArray, IntArray
from fusionrec.errors import ModelError
from fusionrec.language.precision import Precision
from fusionrec.language.quantized import has_int8
from fusionrec.language.tokens import Row

_CPU_TOKENS = 3072
"""Of a batch on a CPU, padding included. What the layers of a larger one leave, the allocator gives
back to the system and asks for again: 20 pairs of 96 tokens took 93 ms 64 at a time, 85 ms 32
at a time."""


def pick_device(device: torch.device | str | None) -> torch.device:
    """``device``, or by default the GPU where there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def usable(precision: Precision, device: torch.device, *, frozen: bool = False) -> Precision:
    """``precision``, but fp32 for bf16 where it would be slower: on a device that only emulates it.

    A CPU has bf16 with AMX or AVX-512 BF16, a GPU from NVIDIA's compute capability 8.0 on. In int8
    are ``frozen`` models on a CPU only, others in fp32. ``auto`` is, of a frozen model, fp32 on any
    device: what is served is chosen by measuring what it costs, never by the machine.
    """
    if precision is Precision.AUTO and frozen:
        return Precision.FP32
    if precision is Precision.INT8:
        fits = frozen and device.type == "cpu" and has_int8()
        return precision if fits else Precision.FP32
    if precision is not Precision.BF16 or has_bf16(device):
        return precision
    return Precision.FP32


def has_bf16(device: torch.device) -> bool:
    """Whether ``device`` has instructions for bf16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def weights_dtype(precision: Precision) -> torch.dtype:
    """What a model's weights are loaded as."""
    return torch.bfloat16 if precision is Precision.BF16 else torch.float32


def check_max_tokens(model: Any, max_tokens: int, name: str) -> None:
    """Refuse texts that are longer than what the model has positions for.

    Raises:
        ModelError: ``max_tokens`` is too large.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise ModelError(
            f"max_tokens = {max_tokens} is more than the {positions} positions of model {name}; "
            f"set it to {positions} or less"
        )


def pad(tokenizer: Any, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """[B, L] tensors of B rows, padded to the longest."""
    shape = len(rows), max(len(row["input_ids"]) for row in rows)
    padded = {name: np.empty(shape, dtype=np.int64) for name in rows[0]}
    fill(tokenizer, rows, padded)
    return {name: torch.from_numpy(table) for name, table in padded.items()}


def fill(tokenizer: Any, rows: Sequence[Row], tables: Mapping[str, IntArray]) -> None:
    """Write B rows into the tables [B, L] of their inputs, and padding beside them."""
    right = tokenizer.padding_side == "right"
    for name, table in tables.items():
        table.fill(_padding(tokenizer, name))
        for place, row in zip(table, rows, strict=True):
            length = len(row[name])
            place[slice(length) if right else slice(len(place) - length, None)] = row[name]


def _padding(tokenizer: Any, name: str) -> int:
    """What a row of the input ``name`` is filled up with."""
    values: dict[str, int] = {
        "input_ids": tokenizer.pad_token_id,
        "token_type_ids": tokenizer.pad_token_type_id,
    }
    return values.get(name, 0)


def infer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    forward: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    batch_size: int,
    precision: Precision,
) -> FloatArray:
    """``forward`` of one row or more in batches of similar length; results in the rows' order.

    Args:
        model: on whose device ``forward`` works.
        tokenizer: the one that made the rows.
        rows: of :func:`~.tokens.tokenize`.
        forward: from padded inputs of B rows to a tensor [B, …].
        batch_size: rows at a time; on a CPU fewer, where they are long.
        precision: what the model was loaded in.
    """
    # Longest first: a batch that does not fit into memory fails at once.
    order = np.argsort([-len(row["input_ids"]) for row in rows], kind="stable")
    results, start = [], 0
    with inference(model, precision):
        while start < len(order):
            longest, left = len(rows[order[start]]["input_ids"]), len(order) - start
            most = _CPU_TOKENS // longest if model.device.type == "cpu" else batch_size
            # Equal parts: a small one at the end would cost more a row.
            stop = start + math.ceil(left / math.ceil(left / max(1, min(most, batch_size))))
            inputs = pad(tokenizer, [rows[row] for row in order[start:stop]])
            start = stop
            on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            results.append(forward(on_device).float().cpu().numpy())
    out: FloatArray = np.empty((len(rows), *results[0].shape[1:]), dtype=np.float32)
    out[order] = np.concatenate(results)
    return out


@contextmanager
def inference(model: Any, precision: Precision) -> Iterator[None]:
    """No gradients, no dropout; with ``auto``, autocast to bf16 on a GPU that has it.

    The weights stay as they are, so that a model is saved in the precision it was loaded in.
    """
    training = model.training
    if training:
        model.eval()
    kind = model.device.type
    auto = precision is Precision.AUTO
    half = auto and kind == "cuda" and has_bf16(model.device)
    try:
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=half):
            yield
    finally:
        if training:
            model.train()
