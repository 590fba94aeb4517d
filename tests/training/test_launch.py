"""Processes that come, that do not, and that wait."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from benchmarks.harness.processes import free_port
from fusionrec.errors import TrainingError
from fusionrec.training import launch
from fusionrec.training.config import TrainingConfig
from fusionrec.training.process import prepare_process


def test_who_does_not_come_is_named(monkeypatch):
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "RANK": "0"}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in (place | {"WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    store, _, _ = next(dist.rendezvous("env://"))
    store.set("here/2", "")
    with pytest.raises(TrainingError, match=r"^workers \[1, 3\] of 4 did not come within 0.2 s"):
        launch.join(0.2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=r"^worker 1 of 2 did not come"):
        launch.join(0.2)
    assert not dist.is_initialized()


PATIENT = """
import os, time
from datetime import timedelta
import torch.distributed as dist
from fusionrec.training.launch import first_alone
dist.init_process_group("gloo", timeout=timedelta(seconds=1))
first_alone(lambda: (time.sleep(2.5), print("acted")))
print("went on")
"""


def test_others_wait_longer_than_for_a_step():
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PATIENT],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert printed == ["acted\nwent on\n", "went on\n"]


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("PATH", "TORCH_EXTENSIONS_DIR"):  # may be changed
        monkeypatch.setenv(name, os.environ.get(name, "anywhere"))
    config = TrainingConfig(num_threads=torch.get_num_threads())
    monkeypatch.setenv("LOCAL_RANK", "1")
    prepare_process(config)
    assert taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(TrainingError, match=r"worker 2 .* there are 2; .* --no-use-gpu"):
        prepare_process(config)
