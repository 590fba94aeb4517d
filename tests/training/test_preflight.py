import dataclasses
import importlib.util
import shutil

import pytest
from transformers import BertConfig

from fusionrec.errors import ConfigError, ModelError, TrainingError
from fusionrec.language.precision import Precision
from fusionrec.training import preflight
from fusionrec.training.config import LoraSettings, TrainingConfig
from fusionrec.training.devices import Device
from fusionrec.training.loads import load_of
from fusionrec.training.objectives.encoder import EncoderSettings
from fusionrec.training.preflight import check_shares


def device(memory: int | None = 10**12, **other) -> Device:
    plain = {"kind": "cpu", "name": "the CPUs of this machine", "machine": memory}
    plain |= {"has_bf16": True, "is_here": True}
    return Device(**{"memory": memory} | plain | other)


@pytest.fixture
def check(tiny_encoder, tmp_path):
    def run(
        settings: dict | None = None,
        num_workers: int = 1,
        fewest: int | None = None,
        on: Device | None = None,
        **training,
    ) -> preflight.Plan:
        chosen = EncoderSettings(**{"encoder": str(tiny_encoder)} | (settings or {}))
        return preflight.check(
            chosen,
            TrainingConfig(**training),
            tmp_path / "a" / "b",
            lambda task, size: load_of("encoder", task, size, 7),
            num_workers=num_workers,
            fewest=fewest or num_workers,
            workers_here=num_workers,
            device=on or device(),
        )

    return run


def test_all_is_well(check):
    plan = check()
    assert 0 < plan.estimate.peak < plan.device.memory
    assert "million parameters are trained" in plan.sentence
    assert " of the 1000.00 GB of the CPUs of this machine; a checkpoint" in plan.sentence


def test_what_is_not_known_is_not_refused(check):
    plan = check(on=device(None, name="a GPU of a node that is not up yet", kind="cuda"))
    assert "of the unknown memory of a GPU of a node that is not up yet" in plan.sentence


@pytest.mark.parametrize(
    ("share", "remedy"),
    [
        (0.8, ": --activation-checkpointing fits"),
        (0.15, r": --grad-cache \d+ fits"),
        (0.001, "take a smaller model"),
    ],
)
def test_memory_is_too_small(check, share, remedy):
    need = check(batch_size=256).estimate.peak
    with pytest.raises(TrainingError, match=remedy):
        check(batch_size=256, on=device(int(need * share)))


def test_sharding_comes_before_smaller_batches(check, monkeypatch, tmp_path):
    """Two billion parameters, of which ZeRO-3 gathers one; the weights are an empty file."""
    shape = {"hidden_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 32}
    BertConfig(**shape, intermediate_size=16384, vocab_size=1000).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**15))
    large = {"settings": {"encoder": str(tmp_path)}, "num_workers": 8, "batch_size": 2}
    large |= {"activation_checkpointing": True}
    first, third = (check(**large, zero_stage=stage).estimate for stage in (1, 3))
    assert first.parameters == pytest.approx(2.4e9, rel=0.02)
    assert third.peak < first.peak
    small = device(int(1.1 * (first.peak + third.peak) / 2))
    with pytest.raises(TrainingError, match=": --zero-stage 3 fits"):
        check(**large, on=small)


def test_the_fewest_workers_hold_the_most(check):
    two, four = check(num_workers=2).estimate, check(num_workers=4).estimate
    least = check(num_workers=4, fewest=2).estimate
    assert least.peak > two.peak > four.peak  # with gradients of the batches before
    assert least == check(num_workers=2, accumulation=2).estimate


def test_tracker_is_not_installed(check, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"fusionrec\[mlflow\]"):
        check(trackers=("mlflow",))


def test_model_is_missing(check):
    with pytest.raises(ModelError, match="not installed"):
        check({"encoder": "package:no_such_package_here"})


def test_too_many_tokens(check):
    with pytest.raises(ConfigError, match="--max-tokens 128"):
        check({"max_tokens": 129})


def test_no_compiler(check, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TrainingError, match=r"C\+\+ compiler"):
        check()


def test_no_ninja(check, monkeypatch, tmp_path):
    (tmp_path / "c++").symlink_to(shutil.which("c++"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(TrainingError, match="pip install ninja"):
        check()


@pytest.mark.parametrize("other", [{"zero_stage": 3}, {"method": "qlora"}])
def test_whole_weights_are_compiled_alone(check, monkeypatch, other):
    monkeypatch.setattr(preflight.quantization, "require", lambda: None)
    with pytest.raises(ConfigError, match="setting compile = True is wrong: with "):
        check(compile=True, num_workers=2, **other)


def test_layers_want_a_compiler_and_headers(check, monkeypatch, tmp_path):
    check(compile=True)
    monkeypatch.setattr(preflight.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(TrainingError, match=r"--compile needs g\+\+ and .*Python.h"):
        check(compile=True)
    check(compile=True, on=device(is_here=False))


def test_layers_want_triton_on_a_gpu(check, monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TrainingError, match="pip install triton"):
        check(compile=True, trackers=(), on=device(kind="cuda"))


def test_a_cluster_compiles_for_itself(check, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    check(on=device(is_here=False))
    check(on=device(kind="cuda"))


def test_a_finished_run_needs_nothing(check, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "result.json").touch()
    assert not check(on=device(1000)).fits


def test_settings_that_are_ignored(check):
    with pytest.warns(UserWarning, match="--method lora"):
        check(lora=LoraSettings(rank=2))
    with pytest.warns(UserWarning, match="nothing to shard"):
        check(zero_stage=3)
    check(zero_stage=3, num_workers=2)
    with pytest.warns(UserWarning, match="nothing to move where there is no GPU"):
        check(offload_optimizer=True)


def test_four_bits_need_a_package_and_whole_weights(check, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"method = qlora .*fusionrec\[qlora\]"):
        check(method="qlora")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    with pytest.raises(ConfigError, match=r"zero_stage = 3 .* set --zero-stage 2"):
        check(method="qlora", zero_stage=3, num_workers=2)


def test_weights_are_offloaded_where_they_are_sharded(check):
    with pytest.raises(ConfigError, match=r"offload_parameters = True .* set --zero-stage 3"):
        check(offload_parameters=True, zero_stage=2)


def test_machine_is_too_small_for_what_is_offloaded(check):
    plan = check()
    assert plan.offloaded == ""
    estimate = dataclasses.replace(plan.estimate, peak=10**9, host=10**10)
    plan = preflight.Plan(estimate, device(12 * 10**8, machine=12 * 10**9))
    assert plan.fits
    assert ", and offloads 10.00 GB of its machine's 12.00 GB; a checkpoint" in plan.sentence
    assert not preflight.Plan(estimate, device(12 * 10**8, machine=10**10)).fits


def test_a_tower_would_be_lost(check, tiny_encoder, tmp_path):
    folder = shutil.copytree(tiny_encoder, tmp_path / "two")
    (folder / "item").mkdir()
    (folder / "item" / "encoder.json").touch()
    with pytest.raises(ConfigError, match=r"--towers 2, or --encoder \S*/two/item"):
        check({"encoder": str(folder)})


def test_every_number_of_workers_shares_the_batches_of_a_step():
    check_shares(1, 2, 1)
    check_shares(3, 4, 3)
    with pytest.raises(ConfigError, match=r"the 4 batches .* from 2 to 4; set accumulation = 3"):
        check_shares(2, 4, 1)
    check_shares(2, 4, 3)
    with pytest.raises(ConfigError, match="min_workers = 3 is wrong: it is above num_workers = 2"):
        check_shares(3, 2, 1)


def test_bf16_without_hardware(check):
    with pytest.raises(ConfigError, match="--precision fp32"):
        check(precision=Precision.BF16, on=device(kind="cuda", has_bf16=False))
    with pytest.warns(UserWarning, match="neither AMX nor AVX-512 BF16"):
        check(precision=Precision.BF16, on=device(has_bf16=False))
    check(precision=Precision.BF16)
