"""Tensors of all workers at once, with or without gradients; on one worker the tensor itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor

_all_gather: Any = torch.distributed.nn.functional.all_gather  # not typed


def place() -> tuple[int, int]:
    """(rank, number of workers); (0, 1) where no group was formed."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def own_first(tensor: Tensor) -> Tensor:
    """[W·N, …] the rows of all W workers, this worker's N rows in front, the others' by rank.

    Gradients flow back to the workers that the rows came from, summed over all who used them: the
    mean of all workers' losses then has the gradient that one worker with all rows would see.
    """
    rank, world = place()
    if world == 1:
        return tensor
    if tensor.requires_grad:
        everyone = list(_all_gather(tensor))
    else:
        everyone = [torch.empty_like(tensor) for _ in range(world)]
        dist.all_gather(everyone, tensor.contiguous())
    return torch.cat([everyone.pop(rank), *everyone])


def in_turns(tensor: Tensor) -> Tensor:
    """[W·N, …] rows in the order 0 of rank 0, 0 of rank 1, …, 1 of rank 0, …; no gradients."""
    _, world = place()
    if world == 1:
        return tensor
    everyone = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(everyone, tensor.contiguous())
    return torch.stack(everyone, dim=1).flatten(0, 1)
