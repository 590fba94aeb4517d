"""One worker under ZeRO-1 or ZeRO-2: its optimizer works on what the model has already.

ZeRO averages gradients over the workers and copies them into one piece, and that once more, before
each step, beside float32 weights of the optimizer's own. With nobody to share with, all of it is
the same numbers again, in memory that the system has to clear first: a tenth of a decoder's step on
a CPU, and a third of an encoder's in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch.optim.adamw import adamw

_AT_ONCE = 2**20
"""Elements that AdamW updates in one call: their float32 gradients stay in a CPU's cache, and small
parameters cost no call each."""


def work_in_place(optimizer: Any) -> None:
    """Make DeepSpeed's ZeRO-1 or ZeRO-2 ``optimizer`` of one worker do without copies.

    Its states, and so its checkpoints, are as before.
    """
    assert not optimizer.use_separate_grad_accum  # or average_tensor would have to fill those
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
        flat = optimizer.bit16_groups_flat[group]
        if flat.dtype == master.dtype:  # no other precision: the model has the weights themselves
            flat.data = master.data
            partitions = optimizer.get_data_parallel_partitions(flat, group)
            optimizer.parallel_partitioned_bit16_groups[group] = partitions
            optimizer._update_model_bit16_weights(group)
    optimizer._link_all_hp_params()  # which held the weights that were copied
    # Gradients that fit no bucket are taken as they are; DeepSpeed divides by the size.
    optimizer.reduce_bucket_size = 0.5
    optimizer.average_tensor = optimizer.copy_grads_in_partition = _nothing
    optimizer.step = MethodType(_step, optimizer)


def _nothing(*_: Any) -> None:
    """The mean over one worker, and its share of the gradients: the gradients themselves."""


@torch.no_grad()
def _step(optimizer: Any) -> None:
    """What ``DeepSpeedZeroOptimizer.step`` does, on each parameter's gradient where it is."""
    optimizer.micro_step_id = -1
    groups = range(len(optimizer.bit16_groups))
    # Of an odd number of elements, the last gradient is one that DeepSpeed adds.
    gradients = [optimizer.averaged_gradients[g][: len(optimizer.bit16_groups[g])] for g in groups]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for group in gradients for g in group]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    optimizer.overflow = not bool(norm.isfinite())
    optimizer._global_grad_norm = float("inf") if optimizer.overflow else norm
    if not optimizer.overflow:
        clip = optimizer.clip_grad
        scale = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0
        for group in groups:
            _update(optimizer, group, gradients[group], scale)
        optimizer._lazy_init_hp_params_optimizer_state()
    for group in groups:
        optimizer.free_grad_in_param_list(optimizer.params_in_partition[group])
        optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None


def _update(optimizer: Any, group: int, gradients: list[torch.Tensor], scale: float) -> None:
    """AdamW, fused, on a group's parameters: pieces of flat weights and states."""
    flat = optimizer.single_partition_of_fp32_groups[group]
    states, settings = optimizer.optimizer.state[flat], optimizer.optimizer.param_groups[group]
    if not states:  # as torch's AdamW begins
        states["step"] = torch.zeros((), device=flat.device)
        states["exp_avg"], states["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
    offsets = [int(offset) for offset in optimizer.round_robin_bit16_offsets[group]]
    whole = (flat, states["exp_avg"], states["exp_avg_sq"])
    for chunk in _chunks(list(zip(offsets, gradients, strict=True))):
        places = [(offset, gradient.numel()) for offset, gradient in chunk]
        found = [gradient.float() for _, gradient in chunk]
        weights, means, squares = (
            [tensor.narrow(0, *place) for place in places] for tensor in whole
        )
        if scale < 1:
            torch._foreach_mul_(found, scale)
        adamw(
            weights,
            found,
            means,
            squares,
            [],
            [states["step"].to(flat.device, copy=True) for _ in chunk],
            fused=True,
            amsgrad=False,
            beta1=settings["betas"][0],
            beta2=settings["betas"][1],
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            eps=settings["eps"],
            maximize=False,
        )
    states["step"] += 1
    computed = optimizer.bit16_groups_flat[group]
    if computed.dtype != flat.dtype:
        computed.copy_(flat)


def _chunks(
    gradients: list[tuple[int, torch.Tensor]],
) -> Iterator[list[tuple[int, torch.Tensor]]]:
    """Pieces of (offset, gradient), flat, of at most ``_AT_ONCE`` elements together."""
    chunk: list[tuple[int, torch.Tensor]] = []
    room = _AT_ONCE
    for offset, gradient in gradients:
        for piece in torch.split(gradient.flatten(), _AT_ONCE):
            if piece.numel() > room:
                yield chunk
                chunk, room = [], _AT_ONCE
            chunk.append((offset, piece))
            offset, room = offset + piece.numel(), room - piece.numel()
    yield chunk
