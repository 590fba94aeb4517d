import shutil

import pytest
import torch

from fusionrec.errors import ConfigError, ModelError, TrainingError
from fusionrec.language.precision import Precision
from fusionrec.training import preflight
from fusionrec.training.config import LoraSettings, TrainingConfig
from fusionrec.training.tasks import TaskSettings


@pytest.fixture
def check(tiny_encoder, tmp_path):
    def run(settings: dict | None = None, num_workers: int = 1, **training) -> None:
        chosen = TaskSettings(**{"encoder": str(tiny_encoder)} | (settings or {}))
        preflight.check(
            chosen, TrainingConfig(**training), tmp_path / "a" / "b", num_workers=num_workers
        )

    return run


def test_all_is_well(check):
    check()


def test_model_is_missing(check):
    with pytest.raises(ModelError, match="not installed"):
        check({"encoder": "package:no_such_package_here"})


def test_too_many_tokens(check):
    with pytest.raises(ConfigError, match="--max-tokens 128"):
        check({"max_tokens": 129})


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is compiled for GPUs")
def test_no_compiler(check, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TrainingError, match=r"C\+\+ compiler"):
        check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is compiled for GPUs")
def test_no_ninja(check, monkeypatch, tmp_path):
    (tmp_path / "c++").symlink_to(shutil.which("c++"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(TrainingError, match="pip install ninja"):
        check()


def test_disk_is_too_small(check, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(TrainingError, match="keep-checkpoints"):
        check()


def test_settings_that_are_ignored(check):
    with pytest.warns(UserWarning, match="--method lora"):
        check(lora=LoraSettings(rank=2))
    with pytest.warns(UserWarning, match="nothing to shard"):
        check(zero_stage=3)
    check(zero_stage=3, num_workers=2)


def test_bf16_without_hardware(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match="--precision fp32"):
        check(precision=Precision.BF16)
