"""What Ray is asked for, and what its workers are told; training itself is in test_finetune."""

import os

import pytest
import ray
import ray.train
import ray.train.torch

from fusionrec.errors import TrainingError
from fusionrec.training import worker
from fusionrec.training.config import TrainingConfig


def test_notice_is_told_once(monkeypatch):
    told = iter([None, None, "first", "first", "second", "second"])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(told))
    noticed = worker.notices()
    assert [noticed() for _ in range(6)] == [False, False, True, False, True, False]


def test_shares_of_cpus(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    assert [worker.share_of_cpus(count) for count in (1, 2, 8)] == [1.0, 0.8, 0.2]
    shares = [worker.share_of_cpus(count, elastic=True) for count in (1, 2, 8)]
    assert shares == [1.0, 0.5, 0.125]
    assert all(count * share // share == count for share in shares for count in range(99))


def test_what_workers_are_told(monkeypatch, tmp_path):
    """Keys, but not where Ray shows them; interfaces before the group is formed; no PATH."""
    made = {}

    def trainer(loop, **settings):
        made.update(settings, loop=loop)
        raise InterruptedError

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", trainer)
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, f"value of {name}")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(InterruptedError):
        worker.fit(lambda: None, TrainingConfig(), tmp_path)
    assert "value of" not in str(made["train_loop_config"])
    interfaces = {"NCCL_SOCKET_IFNAME": "value of NCCL_SOCKET_IFNAME"}
    assert made["run_config"].worker_runtime_env == {"env_vars": interfaces}
    # On the worker.
    monkeypatch.setattr(worker, "_loop", lambda _: dict(os.environ))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("PATH", "of the worker")
    monkeypatch.delenv("WANDB_API_KEY")
    found = made["loop"]({})
    assert found["WANDB_API_KEY"] == "value of WANDB_API_KEY"
    assert found["PATH"] == "of the worker"
    assert found["CUDA_VISIBLE_DEVICES"] == ""  # of one that was given no GPU


def test_too_few_gpus_for_the_fewest_workers(monkeypatch, tmp_path):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    config = TrainingConfig(accumulation=3)
    for fewest, flag in ((None, "--num-workers 4"), (2, "--min-workers 2")):
        with pytest.raises(TrainingError, match=f"^{flag} needs as many GPUs"):
            worker.fit(lambda: None, config, tmp_path, num_workers=4, min_workers=fewest)
