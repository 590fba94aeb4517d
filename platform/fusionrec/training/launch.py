"""The processes of a launcher such as torchrun: who came, the group that they form, who waits.

Under Ray Train nothing of this is needed: Ray forms the group, and says which worker is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fusionrec.errors import TrainingError

_HOWEVER_LONG = timedelta(days=7)


def join(wait_s: float = 600) -> None:
    """Form the group of all processes, over nccl where they have GPUs and gloo elsewhere.

    Args:
        wait_s: Seconds that the first one to come waits for the last one.

    Raises:
        TrainingError: names the ranks that did not come. A group that is formed without asking
            waits for half an hour, and does not know for whom.
    """
    torch_dist: Any = dist  # which exports less to a type checker than it has
    store, rank, world = next(torch_dist.rendezvous("env://", timeout=timedelta(seconds=wait_s)))
    _await_all(store, rank, world, wait_s)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=torch_dist.PrefixStore("group", store),
        rank=rank,
        world_size=world,
    )


def _await_all(store: Any, rank: int, world: int, wait_s: float) -> None:
    ranks = {f"here/{each}": each for each in range(world)}
    store.set(f"here/{rank}", "")
    try:
        store.wait(list(ranks), timedelta(seconds=wait_s))
    except dist.DistStoreError as error:
        missing = [each for name, each in ranks.items() if not store.check([name])]
        named = f"worker {missing[0]}" if len(missing) == 1 else f"workers {missing}"
        raise TrainingError(
            f"{named} of {world} did not come within {wait_s:g} s: look at what they printed, and "
            "run the same command again"
        ) from error


def first_alone(action: Callable[[], None]) -> None:
    """Have rank 0 act while the others wait, however long it takes.

    In a group of its own: in that of the steps who waits for long is taken for lost.
    """
    patient = dist.new_group(backend="gloo", timeout=_HOWEVER_LONG)
    if dist.get_rank() == 0:
        action()
    dist.barrier(group=patient)
    dist.destroy_process_group(patient)
