"""What Ray is asked for, and what its workers are told; training itself is in test_finetune."""

import io
import os
import re
import time
from pathlib import Path

import pytest
import ray
import ray.train
import ray.train.torch
from rich.console import Console

from fusionrec import progress
from fusionrec.errors import TrainingError
from fusionrec.training import worker
from fusionrec.training.config import TrainingConfig
from fusionrec.training.tracking import Report


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


@pytest.fixture
def terminal(monkeypatch):
    """What a person at a terminal sees."""
    seen = io.StringIO()
    console = Console(file=seen, force_terminal=True, color_system=None, width=200)
    monkeypatch.setattr(progress, "console", console)
    return seen


def tell(path: Path, step: int, **rest) -> None:
    """What rank 0 writes for the driver after ``step`` of 8 steps."""
    rates = {"examples_per_s": 12.34, "tokens_per_s": 5678.9}
    report = {"epoch": 0, "step": step, "total": 8, "loss": 0.5, "learning_rate": 1e-3}
    report |= {"grad_norm": 1.0, "skipped": 0, "spikes": 0, "memory_bytes": (1,)}
    worker._write(Report.model_validate(report | rates | rest), path)


def wait_for(text: str, seen: io.StringIO) -> None:
    end = time.monotonic() + 60
    while text not in seen.getvalue():
        assert time.monotonic() < end, f"{text} is not in {seen.getvalue()[-500:]}"
        time.sleep(0.05)


def test_the_bar_tells_steps_rates_and_time_left(terminal, tmp_path):
    path = tmp_path / "progress.json"
    with worker._followed(path, "Fine-tune (run)"):
        wait_for("Start the workers", terminal)
        tell(path, 2)
        wait_for("2/8", terminal)
        tell(path, 4, loss=0.25)
        wait_for("4/8", terminal)
        wait_for("loss 0.2500 · 12.3 examples/s · 5,679 tokens/s", terminal)
        # Estimated from the pace of the steps that were seen.
        [left] = re.findall(r"0:\d\d:\d\d (\S+) loss 0.2500", terminal.getvalue())[-1:]
        assert re.fullmatch(r"0:\d\d:\d\d", left)
        tell(path, 8, skipped=1, spikes=2)
    shown = terminal.getvalue()
    assert "Fine-tune (run)" in shown
    assert shown.rindex("8/8") > shown.rindex("4/8")  # the last report is shown at the end
    assert "tokens/s · 1 left out · 2 spikes" in shown


def test_a_run_that_ends_before_its_first_report_leaves_no_bar_behind(terminal, tmp_path):
    with worker._followed(tmp_path / "progress.json", "Fine-tune"):
        wait_for("Start the workers", terminal)
    assert "Fine-tune" not in terminal.getvalue()
