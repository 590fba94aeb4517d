"""How much memory a fine-tuning run takes, from the model's ``config.json`` alone.

What one forward and backward pass of the largest batch make and free is traced (see
:mod:`fusionrec.training.traced`); on a CPU, what glibc's allocator takes for it is followed, too
(:mod:`fusionrec.training.heap`). What DeepSpeed holds besides is added up from its ZeRO stage
(Rajbhandari et al., 2020, arXiv:1910.02054, and what its implementation buffers).

Bytes are of one worker: its device where it has one, its process otherwise; what is offloaded from
a device is counted apart. Not counted are what the libraries themselves take (half a GB of a
process, or a CUDA context), the tokenizer, and what a device's allocator keeps for later.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fusionrec.allocator import SMALL_BYTES
from fusionrec.training import quantization
from fusionrec.training.config import TrainingConfig
from fusionrec.training.devices import Device, of_this_machine
from fusionrec.training.heap import peak_of_steps
from fusionrec.training.traced import Load, Traced, traced
from fusionrec.training.weights import use_bf16

_WHOLE = 4
"""Bytes of a float32: master weights, gradients and both moments of AdamW."""
_GATHERED = 10**9
"""Weights that ZeRO-3 keeps gathered at most: DeepSpeed's stage3_max_live_parameters."""
_BUCKET = 5 * 10**8
"""Gradients that are reduced at once: DeepSpeed's reduce_bucket_size. A device gives the buffer its
memory when it is made; a process gets it page by page, as far as there are gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes of one worker, and parameters of the model."""

    parameters: int
    trained: int
    """Parameters that are trained."""
    weights: int
    """In the precision of the computation, with what ZeRO-3 gathers, and float32 masters
    where they are not the same."""
    gradients: int
    optimizer: int
    """Both moments of AdamW. Without a device, with all that would be offloaded from it."""
    host: int
    """What a worker with a device offloads to its machine's memory."""
    activations: int
    """What a forward pass keeps for the backward pass, and what the latter needs on its way."""
    peak: int
    """Less than the sum: gradients grow while activations go."""
    checkpoint: int
    """On disk, over all workers."""


def estimate(
    folder: Path,
    load: Load,
    config: TrainingConfig,
    *,
    num_workers: int,
    device: Device | None = None,
) -> Estimate:
    """Memory of one of ``num_workers`` workers that train the model of ``folder``.

    Args:
        folder: With ``config.json``; nothing else of it is read.
        load: The largest batch.
        config: Of the engine.
        num_workers: That share what ZeRO shards.
        device: Of a worker; by default this machine's.

    Raises:
        ModelError: the architecture is not known.
        ConfigError: it cannot compute its layers again, or not in 4 bits, and is told to.
    """
    device = device or of_this_machine(1)
    on_gpu = device.kind == "cuda"
    bf16 = use_bf16(config.precision, on_gpu=on_gpu, has=device.has_bf16)
    asked = (
        folder,
        (folder / "config.json").read_bytes(),
        load,
        TrainingConfig(
            method=config.method,
            lora=config.lora,
            activation_checkpointing=config.activation_checkpointing,
        ),
        torch.bfloat16 if bf16 else torch.float32,
        # torch goes no backward pass through fake tensors of a device that it has no driver of.
        device.kind if torch.cuda.is_available() else "cpu",
    )
    found = traced(*asked)
    if not on_gpu:
        found = found._replace(peak=_resident(*asked, sparing=config.is_sparing))
    return _with_states(found, config, bf16=bf16, shards=num_workers, device=device.kind)


@lru_cache(maxsize=128)
def _resident(*asked: Any, sparing: bool) -> int:
    """Bytes that glibc takes for what is traced; see :func:`fusionrec.allocator.return_memory`."""
    return peak_of_steps(traced(*asked).events, SMALL_BYTES if sparing else None)


def _with_states(
    found: Traced, config: TrainingConfig, *, bf16: bool, shards: int, device: str
) -> Estimate:
    """What is traced, with what DeepSpeed holds of it in each of ``shards`` workers."""
    parameters, trained = found.parameters, found.trained
    size = 2 if bf16 else _WHOLE
    share = -(-trained // shards)
    in_place = config.works_in_place(shards)
    masters = 0 if in_place and not bf16 else share * _WHOLE
    weights = (parameters - found.packed) * size + round(found.packed * quantization.BYTES)
    gathered = found.written * size
    gradients, optimizer = trained * size, 2 * share * _WHOLE
    # Of several workers' gradients DeepSpeed sends copies, in a bucket. Then it copies its shard
    # out of the others, and once more into one piece for AdamW, which is fused and adds nothing.
    buckets = shards > 1 or config.zero_stage == 3  # as TrainingConfig.deepspeed has it
    bucket = (_BUCKET * size if device == "cuda" else trained * size) if buckets else 0
    stepping = 0 if in_place else 2 * share * _WHOLE
    reducing = 0
    if config.zero_stage == 3:
        if not config.offload_optimizer:
            bucket += share * size  # reduced gradients have a place of their own
        if shards > 1 or config.offload_parameters:
            gathered = min(parameters, _GATHERED) * size
            weights = -(-parameters // shards) * size
        if shards > 1:  # a bucket's gradients in the order of their shards, and gloo's copy of them
            reducing = min(trained, _BUCKET) * size * (2 if device == "cpu" else 1)
    held = 0 if config.accumulation == 1 else gradients  # of the passes before
    host = 0
    if config.offload_optimizer:
        # Gradients in float32 stay there. ZeRO 3 has those of the pass beside them; 1 and 2 have
        # new weights on their way back, what earlier passes left, and room for a gradient.
        passing = share * size
        if config.zero_stage < 3:
            passing += found.largest * size + (share * size if held else 0)
            bucket += found.largest * size
        host = masters + optimizer + share * _WHOLE + passing
        masters = optimizer = stepping = 0
    if config.offload_parameters:
        host += weights
        weights = 0
    # A worker without a device has its machine's memory only.
    optimizer, host = (optimizer + host, 0) if device == "cpu" else (optimizer, host)
    weights += masters
    peak = max(gathered + held + max(found.peak, reducing), gradients + stepping)
    return Estimate(
        parameters=parameters,
        trained=trained,
        weights=weights + gathered,
        gradients=gradients + bucket,
        optimizer=optimizer,
        host=host,
        activations=found.activations,
        peak=weights + optimizer + bucket + peak,
        checkpoint=(trained * size if config.zero_stage < 3 else 0) + 3 * trained * _WHOLE,
    )
