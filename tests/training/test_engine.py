"""The engine with two gloo workers: every ZeRO stage, full and LoRA; kills, faults, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

SETTINGS = {"batch_size": 2, "epochs": 2, "learning_rate": 5e-3, "num_threads": 1}
SETTINGS |= {"checkpoint_every": 4, "report_every": 1}
VARIANTS = [(stage, method) for stage in (1, 2, 3) for method in ("full", "lora")]


def scenario(directory: Path, model: Path, config: dict | None = None, **rest) -> dict:
    task = {"model": str(model)} | rest.pop("task", {})
    return {
        "task": task,
        "config": SETTINGS | (config or {}),
        "directory": str(directory),
    } | rest


@pytest.fixture(scope="module")
def runs(workers, tiny_encoder):
    """{variant: (uninterrupted answer, answer of the run that was interrupted and resumed)}."""
    first, second = [], []
    for stage, method in VARIANTS:
        config = {"zero_stage": stage, "method": method, "accumulation": 1 + (stage == 2)}
        whole = workers.directory / f"{stage}-{method}-whole"
        broken = workers.directory / f"{stage}-{method}-broken"
        leave_at = 5 if stage == 2 else 7
        first.append(scenario(whole, tiny_encoder, config))
        first.append(scenario(broken, tiny_encoder, config, leave_at=leave_at))
        second.append(scenario(broken, tiny_encoder, config))
    # The answers of `second` come from fresh processes, as after a crash.
    uninterrupted = workers.run(*first)[::2]
    return dict(zip(VARIANTS, zip(uninterrupted, workers.run(*second), strict=True), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(runs, variant):
    whole, resumed = runs[variant]
    assert len(resumed["losses"]) < len(whole["losses"])
    assert resumed["losses"] == whole["losses"][-len(resumed["losses"]) :]
    assert resumed["result"]["loss"] == whole["result"]["loss"]
    assert resumed["result"]["weights_sha256"] == whole["result"]["weights_sha256"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_loss_and_moves_the_weights(runs, variant, tiny_encoder):
    whole, _ = runs[variant]
    assert np.mean(whole["losses"][-3:]) < np.mean(whole["losses"][:3])
    before = load_file(tiny_encoder / "model.safetensors")
    after = load_file(Path(whole["result"]["model"]) / "model.safetensors")
    assert set(after) == {name for name in before if not name.startswith("pooler")}
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before[name], after[name])
    if variant[1] == "lora":  # what has no adapter stays as it was
        name = "embeddings.word_embeddings.weight"
        assert torch.equal(before[name], after[name])


def test_zero_stages_agree(runs):
    first, third = runs[1, "full"][0], runs[3, "full"][0]
    assert first["losses"] == pytest.approx(third["losses"], rel=1e-5)


def test_killed_worker(workers, runs, tiny_encoder):
    """SIGKILL of one worker at step 10 of 12; the same command then ends as if it never was."""
    directory = workers.directory / "killed"
    config = {"zero_stage": 3, "method": "full"}
    killed = scenario(directory, tiny_encoder, config, kill_at=10)
    workers.run(killed, may_die=True)
    assert not (directory / "result.json").exists()
    assert (directory / "checkpoints" / "step-00000008" / "manifest.json").is_file()
    (resumed,) = workers.run(scenario(directory, tiny_encoder, config))
    whole, _ = runs[3, "full"]
    assert resumed["losses"] == whole["losses"][8:]
    assert resumed["result"]["seconds"] > 0
    assert resumed["result"]["loss"] == whole["result"]["loss"]
    assert resumed["result"]["weights_sha256"] == whole["result"]["weights_sha256"]


@pytest.fixture(scope="module")
def faults(workers, runs, tiny_encoder):
    """Answers of runs that meet a fault, in one pair of processes."""
    stopped = workers.directory / "stopped"
    source = Path(runs[1, "full"][0]["result"]["model"]).parent
    damaged = {}
    for fault in ("flipped", "truncated", "missing", "surplus", "manifest", "partial"):
        damaged[fault] = workers.directory / fault
        shutil.copytree(source / "checkpoints", damaged[fault] / "checkpoints")
        newest = damaged[fault] / "checkpoints" / "step-00000012"
        shard = newest / "deepspeed" / "mp_rank_00_model_states.pt"
        content = bytearray(shard.read_bytes())
        if fault == "flipped":
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        elif fault == "truncated":
            shard.write_bytes(content[:-1])
        elif fault == "missing":
            (newest / "rank-00001.safetensors").unlink()
        elif fault == "surplus":
            shard.with_name("mp_rank_01_model_states.pt").write_bytes(content)
        elif fault == "manifest":
            text = (newest / "manifest.json").read_text()
            (newest / "manifest.json").write_text(text.replace('"step": 12', '"step": 11'))
        else:
            newest.rename(newest.with_name(".step-00000012"))
    scenarios = {f: scenario(d, tiny_encoder, {"zero_stage": 1}) for f, d in damaged.items()}
    scenarios["other settings"] = scenario(
        source, tiny_encoder, {"zero_stage": 1, "learning_rate": 0.5}
    )
    scenarios["again"] = scenario(source, tiny_encoder, {"zero_stage": 1})
    scenarios["nan"] = scenario(stopped, tiny_encoder, {"accumulation": 2}, task={"bad_example": 3})
    scenarios["few"] = scenario(stopped, tiny_encoder, task={"num_examples": 3})
    return dict(zip(scenarios, workers.run(*scenarios.values()), strict=True))


@pytest.mark.parametrize(
    "fault", ["flipped", "truncated", "missing", "surplus", "manifest", "partial"]
)
def test_damaged_checkpoint_falls_back_to_the_one_before(faults, runs, fault):
    whole, _ = runs[1, "full"]
    assert faults[fault]["losses"] == whole["losses"][8:]
    assert faults[fault]["result"]["weights_sha256"] == whole["result"]["weights_sha256"]


def test_old_checkpoints_are_removed(faults, workers):
    left = sorted(p.name for p in (workers.directory / "flipped" / "checkpoints").iterdir())
    assert left == ["step-00000008", "step-00000012"]


def test_nan_loss_names_step_and_batch(faults, workers):
    answer = faults["nan"]
    assert answer["error"] == "NonFiniteLoss"
    assert "step" in answer["message"]
    (saved,) = (workers.directory / "stopped").glob("non-finite-*.json")
    assert str(saved) in answer["message"]
    content = json.loads(saved.read_text())
    assert {"example": 3} in content["examples"]
    assert f"at step {content['step']}, batch {content['batch']}" in answer["message"]
    assert len(answer["losses"]) == content["step"] - 1


def test_finished_run_is_not_run_again(faults, runs):
    assert faults["again"]["losses"] == []
    assert faults["again"]["result"] == runs[1, "full"][0]["result"]


def test_refusals(faults):
    other = faults["other settings"]
    assert other["error"] == "TrainingError"
    assert "learning_rate = 0.005 and this one has 0.5" in other["message"]
    assert faults["few"]["error"] == "TrainingError"
    assert "--batch-size" in faults["few"]["message"]


def test_tensorboard_curves(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole, _ = runs[1, "full"]
    events = EventAccumulator(str(Path(whole["result"]["model"]).parent / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx(whole["losses"])
    assert set(events.Tags()["scalars"]) == {"loss", "learning_rate", "grad_norm", "examples_per_s"}
