"""What a worker has, by what Ray tells of the nodes."""

import socket

import pytest
import torch

from fusionrec.errors import TrainingError
from fusionrec.training import devices

GB = 10**9


def node(address: str, *, alive: bool = True, host: str = "elsewhere", **resources) -> dict:
    place = {"Alive": alive, "NodeManagerHostname": host, "NodeManagerAddress": address}
    return place | {"Resources": {"CPU": 8.0, "memory": 64 * GB} | resources}


HEAD = node("10.0.0.1", CPU=0.0)
SMALL = node("10.0.0.2", GPU=4.0, **{"accelerator_type:T4": 1.0})
LARGE = node("10.0.0.3", GPU=8.0, **{"accelerator_type:A100": 1.0, "accelerator_type:A100-80G": 1})


def of(*nodes, num_workers=4, use_gpu=None):
    return devices.of_nodes(nodes, num_workers=num_workers, use_gpu=use_gpu)


def test_gpus_of_other_nodes():
    found = of(HEAD, LARGE)
    assert (found.kind, found.memory, found.has_bf16) == ("cuda", 80 * GB, True)
    assert found.name == "a GPU of node 10.0.0.3 (A100-80G)"
    assert found.machine == 16 * GB - devices._LIBRARIES  # of four workers there
    assert not found.is_here
    least = of(HEAD, LARGE, SMALL)
    assert (least.memory, least.has_bf16) == (16 * GB, False)
    assert of(SMALL | {"Alive": False}, LARGE) == found
    unknown = of(node("10.0.0.4", GPU=1.0))
    assert (unknown.memory, unknown.has_bf16) == (None, True)
    assert unknown.name.endswith("(of an unknown type)")


def test_cpus_of_other_nodes():
    found = of(HEAD, LARGE, use_gpu=False, num_workers=2)
    assert (found.kind, found.name) == ("cpu", "the CPUs of node 10.0.0.3")
    assert found.memory == found.machine == 32 * GB - devices._LIBRARIES
    assert of(node("10.0.0.5", CPU=2.0)).memory == 32 * GB - devices._LIBRARIES  # two fit there


def test_nodes_that_are_not_up_yet():
    found = of(HEAD, use_gpu=True)
    assert (found.kind, found.memory, found.machine) == ("cuda", None, None)
    assert of(HEAD).kind == "cpu"


def test_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_free", lambda: 10 * GB)
    alone = devices.of_this_machine(2)
    assert alone.memory == alone.machine == 5 * GB - devices._LIBRARIES
    assert alone.is_here
    assert of(node("127.0.0.1", host=socket.gethostname()), num_workers=2) == alone
    with pytest.raises(TrainingError, match="use_gpu = True is wrong"):
        devices.of_this_machine(1, use_gpu=True)


def test_a_gpu_that_is_not_wanted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.of_this_machine(1, use_gpu=False).kind == "cpu"


def test_emulated_bf16_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (15 * GB, 16 * GB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    # As torch answers for it: no instructions, but it can emulate them.
    emulates = lambda including_emulation=True: including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulates)
    found = devices.of_this_machine(1)
    assert (found.kind, found.memory, found.has_bf16) == ("cuda", 15 * GB, False)
    assert found.name == "a GPU of this machine (Tesla T4)"
