"""What a worker computes on, and what memory it can have: on this machine, or on a cluster's nodes.

Of this machine it is what is free now. Of other nodes it is what Ray tells of them: the type of
their GPUs, whose memory is a manufacturer's round number, and the memory that Ray hands out, which
leaves 30% of a node to its object store.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fusionrec.errors import TrainingError
from fusionrec.language.inference import has_bf16

_LIBRARIES = 700_000_000
"""About the bytes of a process that has imported torch, DeepSpeed and transformers."""
_GPUS = {
    "K80": (12, False),
    "P4": (8, False),
    "P100": (16, False),
    "T4": (16, False),
    "V100": (16, False),
    "A10G": (24, True),
    "L4": (24, True),
    "L40S": (48, True),
    "A100": (40, True),
    "A100-40G": (40, True),
    "A100-80G": (80, True),
    "H20": (96, True),
    "H100": (80, True),
    "H200": (141, True),
    "B200": (180, True),
}
"""By the name that Ray gives a type: GB of the smallest one, and whether it has bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Of one worker."""

    kind: Literal["cpu", "cuda"]
    name: str
    """For the person who starts a run."""
    memory: int | None
    """Bytes that a worker can have: of its GPU, or its part of its machine's memory. None where
    nobody knows yet."""
    machine: int | None
    """Bytes that are its part of its machine's memory, for what is offloaded from a GPU."""
    has_bf16: bool
    """Or may have, where nobody knows."""
    is_here: bool
    """Whether this machine has it, so that its disk and its compiler can be looked at."""


def hide_gpus() -> None:
    """Have torch, DeepSpeed and what this process starts see no GPU; before torch looks for one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def of_this_machine(workers_here: int, *, use_gpu: bool | None = None) -> Device:
    """What one of ``workers_here`` workers has; a GPU by default where there is one.

    Raises:
        TrainingError: a GPU is asked for and there is none.
    """
    machine = max(0, _free() // workers_here - _LIBRARIES)
    found = torch.cuda.is_available()
    if use_gpu and not found:
        raise TrainingError(
            "setting use_gpu = True is wrong: torch finds no GPU on this machine; leave it out"
        )
    if found and use_gpu is not False:
        free, _ = torch.cuda.mem_get_info()
        name, kind = torch.cuda.get_device_name(), torch.device("cuda")
        return Device(
            kind="cuda",
            name=f"a GPU of this machine ({name})",
            memory=free,
            machine=machine,
            has_bf16=has_bf16(kind),
            is_here=True,
        )
    return Device(
        kind="cpu",
        name="the CPUs of this machine",
        memory=machine,
        machine=machine,
        has_bf16=has_bf16(torch.device("cpu")),
        is_here=True,
    )


def of_nodes(
    nodes: Iterable[Mapping[str, Any]], *, num_workers: int, use_gpu: bool | None
) -> Device:
    """What the worker has that gets the least, wherever on a cluster the workers are put.

    Args:
        nodes: As ``ray.nodes()`` tells of them.
        num_workers: In all; as many as there is room for may be on one node.
        use_gpu: By default, whether a node has any now.

    Raises:
        TrainingError: see :func:`of_this_machine`, where that is all of the cluster.
    """
    alive = [node for node in nodes if node["Alive"]]
    if {node["NodeManagerHostname"] for node in alive} == {socket.gethostname()}:
        return of_this_machine(num_workers, use_gpu=use_gpu)  # which is told more precisely
    with_gpus = [node for node in alive if node["Resources"].get("GPU", 0) >= 1]
    on_gpu = bool(with_gpus) if use_gpu is None else use_gpu
    able = with_gpus if on_gpu else [n for n in alive if n["Resources"].get("CPU", 0) > 0]
    if not able:  # yet: a cluster may scale up from none
        return Device(
            kind="cuda" if on_gpu else "cpu",
            name=f"a {'GPU' if on_gpu else 'CPU'} of a node that is not up yet",
            memory=None,
            machine=None,
            has_bf16=True,
            is_here=False,
        )
    found = [_of_node(node, num_workers, on_gpu=on_gpu) for node in able]
    return min(found, key=lambda d: (d.memory is None, d.memory or 0, d.machine or 0))


def _of_node(node: Mapping[str, Any], num_workers: int, *, on_gpu: bool) -> Device:
    resources = node["Resources"]
    places = int(resources["GPU"] if on_gpu else max(1, resources["CPU"]))
    share = int(resources.get("memory", 0)) // min(num_workers, places)
    machine = max(0, share - _LIBRARIES)
    address = node["NodeManagerAddress"]
    if not on_gpu:
        return Device(
            kind="cpu",
            name=f"the CPUs of node {address}",
            memory=machine,
            machine=machine,
            has_bf16=True,
            is_here=False,
        )
    types = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
    known = [_GPUS[kind] for kind in types if kind in _GPUS]
    # The name of a size comes with that of its family.
    gigabytes, bf16 = max(known, default=(None, True))
    return Device(
        kind="cuda",
        name=f"a GPU of node {address} ({max(types, key=len, default='of an unknown type')})",
        memory=None if gigabytes is None else gigabytes * 10**9,
        machine=machine,
        has_bf16=bf16,
        is_here=False,
    )


def _free() -> int:
    """Bytes of this machine's memory that are free."""
    known = Path("/proc/meminfo")
    if known.is_file():
        lines = known.read_text(encoding="ascii").splitlines()
        [line] = [line for line in lines if line.startswith("MemAvailable:")]
        free = int(line.split()[1]) * 1024
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup")  # the container's own limit
    if (group / "memory.max").is_file():
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int((group / "memory.current").read_text(encoding="ascii"))
            free = min(free, int(limit) - used)
    return free
