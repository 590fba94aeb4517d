"""One worker that computes in float32: its optimizer works on what the model has already.

ZeRO keeps weights of the optimizer's own, averages gradients over the workers, and copies them into
one piece, and that once more, before each step. With nobody to share with and no other precision to
round to, all of it is the same numbers again, in memory that the system has to clear first: a tenth
of a decoder's step on a CPU.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.optim.adamw import adamw


def work_in_place(optimizer: Any) -> None:
    """Make DeepSpeed's ZeRO-1 or ZeRO-2 ``optimizer`` of one worker do without copies.

    Its states, and so its checkpoints, are as before.
    """
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
        flat = optimizer.bit16_groups_flat[group]
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


def _step(optimizer: Any) -> None:
    """What ``DeepSpeedZeroOptimizer.step`` does, on each parameter's gradient where it is."""
    optimizer.micro_step_id = -1
    gradients = [
        gradient
        for group in optimizer.averaged_gradients.values()
        for gradient in group
        if not getattr(gradient, "_zero_padding", False)
    ]
    norm = torch.nn.utils.get_total_norm(gradients)
    optimizer.overflow = not bool(norm.isfinite())
    optimizer._global_grad_norm = float("inf") if optimizer.overflow else norm
    if not optimizer.overflow:
        scale = optimizer.clip_grad / (norm + 1e-6)
        if optimizer.clip_grad and scale < 1:
            torch._foreach_mul_(gradients, scale)
        for group in range(len(optimizer.bit16_groups)):
            _update(optimizer, group)
        optimizer._lazy_init_hp_params_optimizer_state()
    optimizer.zero_grad(set_to_none=True)
    for group in optimizer.averaged_gradients:
        optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None


def _update(optimizer: Any, group: int) -> None:
    """AdamW, fused, on a group's parameters: pieces of flat weights and states."""
    flat = optimizer.single_partition_of_fp32_groups[group]
    states, settings = optimizer.optimizer.state[flat], optimizer.optimizer.param_groups[group]
    if not states:  # as torch's AdamW begins
        states["step"] = torch.zeros((), device=flat.device)
        states["exp_avg"], states["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
    gradients = [
        gradient.flatten()
        for gradient in optimizer.averaged_gradients[group]
        if not getattr(gradient, "_zero_padding", False)
    ]
    sizes = [gradient.numel() for gradient in gradients]
    offsets = [int(offset) for offset in optimizer.round_robin_bit16_offsets[group]]

    def pieces(whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole.narrow(0, *piece) for piece in zip(offsets, sizes, strict=True)]

    steps = [states["step"].clone() for _ in gradients]
    with torch.no_grad():
        adamw(
            pieces(flat.detach()),
            gradients,
            pieces(states["exp_avg"]),
            pieces(states["exp_avg_sq"]),
            [],
            steps,
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
