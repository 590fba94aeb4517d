"""The engine with two gloo workers: every ZeRO stage, full and adapted; kills, faults, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from fusionrec.errors import TrainingError
from fusionrec.training.curves import read
from fusionrec.training.engine import _refuse_difference
from tests.training.scenarios import SKIPPED, faulty, scenario

KILLED = [(1, "full"), (2, "full"), (3, "full"), (2, "lora")]
RESIZED = [(1, "full"), (2, "lora"), (3, "full")]
STILL = {"dropout": False}
VARIANTS = [(stage, method) for stage in (1, 2, 3) for method in ("full", "lora")]
VARIANTS += [(stage, "dora") for stage in (1, 3)]
VARIANTS += [(stage, "bf16") for stage in (1, 2, 3)]  # which is full, in bfloat16

pytestmark = pytest.mark.timeout(2000)  # two pairs of processes and one alone before a test ends


@pytest.fixture(scope="module")
def models(tiny_encoder, tmp_path_factory):
    """{method: folder of the model that it starts from}.

    DoRA reads another module's weights; of the tiny encoder's, ZeRO 3 shards none.
    """
    wide = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = BertConfig(**shape, intermediate_size=128, vocab_size=64)
        BertModel(config).save_pretrained(wide)
    return {"full": tiny_encoder, "lora": tiny_encoder, "dora": wide, "bf16": tiny_encoder}


@pytest.fixture(scope="module")
def begun(workers, tiny_encoder, models):
    """{name: answer} of the runs that are whole or come to no end; some were killed.

    Starting a process costs more than a dozen runs, so all that two fresh workers can do is done at
    once: here, and in `ended`, which goes on with these runs as after a crash.
    """
    scenarios = {}
    for stage, method in VARIANTS:
        config = configured(workers, stage, method)
        for part, end in (("whole", {}), ("broken", {"leave_at": 5 if stage == 2 else 7})):
            directory = workers.directory / f"{stage}-{method}-{part}"
            scenarios[part, stage, method] = scenario(directory, models[method], config, **end)
    for method in ("full", "lora"):
        directory = workers.directory / f"{method}-still"
        scenarios["still", method] = scenario(
            directory, tiny_encoder, {"method": method}, task=STILL
        )
    for stage, method in RESIZED:
        config = {"zero_stage": stage, "method": method}
        directory = workers.directory / f"{stage}-{method}-resized"
        # Checkpoints are there of steps 4 and 8.
        scenarios["two", stage, method] = scenario(
            directory, tiny_encoder, config, task=STILL, leave_at=5
        )
    answers = []
    for number, (stage, method) in enumerate(KILLED):  # a kill is the end of two workers
        config, directory = configured(workers, stage, method), killed_in(workers, stage, method)
        last = scenario(directory, tiny_encoder, config, kill_at=6 if stage == 2 else 10)
        others = scenarios.values() if number == 0 else ()
        answers += workers.run(*others, last, may_die=True)
        assert not (directory / "result.json").exists()
    return dict(zip(scenarios, answers, strict=True))


def killed_in(workers, stage, method) -> Path:
    return workers.directory / f"{stage}-{method}-killed"


def configured(workers, stage, method):
    kind = {"precision": "bf16"} if method == "bf16" else {"method": method}
    config = kind | {"zero_stage": stage, "accumulation": 1 + (stage == 2)}
    if stage == 3:
        config["checkpoint_staging"] = str(workers.directory / "staging")
    return config


@pytest.fixture(scope="module")
def alone(workers, begun, tiny_encoder):
    """{name: answer} of one worker that goes on with runs of two, and a refusal."""
    scenarios = {}
    for number, (stage, method) in enumerate(RESIZED):
        directory = workers.directory / f"{stage}-{method}-resized"
        if number == 0:
            scenarios["refused"] = scenario(directory, tiny_encoder, task=STILL)
        config = {"zero_stage": stage, "method": method, "accumulation": 2}
        scenarios["one", stage, method] = scenario(
            directory, tiny_encoder, config, task=STILL, leave_at=9
        )
    config = {"zero_stage": 2, "precision": "bf16", "accumulation": 2}
    for part, end in (("whole", {}), ("broken", {"leave_at": 5}), ("resumed", {})):
        directory = workers.directory / f"alone-{'whole' if part == 'whole' else 'broken'}"
        scenarios[part, "bf16"] = scenario(directory, tiny_encoder, config, **end)
    return dict(zip(scenarios, workers.run(*scenarios.values(), count=1), strict=True))


@pytest.fixture(scope="module")
def ended(workers, begun, alone, tiny_encoder, models):
    """{name: answer} of two fresh workers: of runs that go on, and of faults."""
    scenarios = {}
    for stage, method in VARIANTS:
        config = configured(workers, stage, method)
        directory = workers.directory / f"{stage}-{method}-broken"
        scenarios["resumed", stage, method] = scenario(directory, models[method], config)
    for stage, method in RESIZED:
        config = {"zero_stage": stage, "method": method}
        directory = workers.directory / f"{stage}-{method}-resized"
        scenarios["two again", stage, method] = scenario(
            directory, tiny_encoder, config, task=STILL
        )
    left = {}  # the newest checkpoint of each killed run: its last one may have been under way
    for stage, method in KILLED:
        config, directory = configured(workers, stage, method), killed_in(workers, stage, method)
        left["killed", stage, method] = max(p.name for p in directory.glob("checkpoints/step-*"))
        scenarios["killed", stage, method] = scenario(directory, tiny_encoder, config)
    scenarios |= faulty(workers, begun, tiny_encoder)
    answers = dict(zip(scenarios, workers.run(*scenarios.values()), strict=True))
    for name, checkpoint in left.items():
        answers[name]["left"] = checkpoint
    return answers


@pytest.fixture(scope="module")
def runs(begun, ended):
    """{variant: (uninterrupted answer, answer of the run that was interrupted and resumed)}."""
    return {each: (begun["whole", *each], ended["resumed", *each]) for each in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(runs, variant):
    whole, resumed = runs[variant]
    assert len(resumed["losses"]) < len(whole["losses"])
    assert resumed["losses"] == whole["losses"][-len(resumed["losses"]) :]
    assert resumed["result"]["loss"] == whole["result"]["loss"]
    assert resumed["result"]["weights_sha256"] == whole["result"]["weights_sha256"]


def test_one_worker_in_bfloat16_resumes_bit_for_bit(alone):
    """Its optimizer works in place, and keeps float32 weights beside those of the model."""
    whole, broken, resumed = (alone[part, "bf16"] for part in ("whole", "broken", "resumed"))
    assert broken["losses"] == whole["losses"][:5]
    assert resumed["losses"] == whole["losses"][4:]
    assert resumed["result"]["weights_sha256"] == whole["result"]["weights_sha256"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_loss_and_moves_the_weights(runs, variant, models):
    whole, _ = runs[variant]
    assert np.mean(whole["losses"][-3:]) < np.mean(whole["losses"][:3])
    before = load_file(models[variant[1]] / "model.safetensors")
    after = load_file(Path(whole["result"]["model"]) / "model.safetensors")
    assert set(after) == {name for name in before if not name.startswith("pooler")}
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before[name], after[name])
    if variant[1] in ("lora", "dora"):  # what has no adapter stays as it was
        name = "embeddings.word_embeddings.weight"
        assert torch.equal(before[name], after[name])


def test_zero_3_loads_weights_in_shards(begun, models):
    """No worker ever holds the model; under the other stages all of them do."""
    weights = load_file(models["full"] / "model.safetensors")
    whole = sum(w.numel() for name, w in weights.items() if not name.startswith("pooler"))
    for method in ("full", "lora"):
        held = [begun["whole", stage, method]["built"][0] for stage in (1, 2, 3)]
        assert held == [whole, whole, 0]


@pytest.mark.parametrize("method", ["full", "dora"])
def test_zero_stages_agree(runs, method):
    first, third = runs[1, method][0], runs[3, method][0]
    assert first["losses"] == pytest.approx(third["losses"], rel=1e-5)


@pytest.mark.parametrize("variant", KILLED)
def test_killed_worker(ended, runs, variant):
    """SIGKILL of one worker near the end; the same command then ends as if it never was."""
    check_killed(ended["killed", *variant], *runs[variant])


@pytest.mark.slow
@pytest.mark.parametrize("variant", [(1, "lora"), (3, "lora"), (3, "bf16")])
def test_killed_worker_of_another_kind(workers, runs, tiny_encoder, variant):
    """A kill costs two pairs of processes each."""
    config, directory = configured(workers, *variant), killed_in(workers, *variant)
    workers.run(scenario(directory, tiny_encoder, config, kill_at=10), may_die=True)
    left = max(path.name for path in directory.glob("checkpoints/step-*"))
    [resumed] = workers.run(scenario(directory, tiny_encoder, config))
    check_killed(resumed | {"left": left}, *runs[variant])


def check_killed(resumed, whole, _):
    assert resumed["left"] in ("step-00000004", "step-00000008")
    assert resumed["losses"] == whole["losses"][int(resumed["left"][-2:]) :]
    assert resumed["result"]["seconds"] > 0
    assert resumed["result"]["loss"] == whole["result"]["loss"]
    assert resumed["result"]["weights_sha256"] == whole["result"]["weights_sha256"]


@pytest.mark.parametrize(
    "fault", ["flipped", "truncated", "missing", "surplus", "manifest", "partial"]
)
def test_damaged_checkpoint_falls_back_to_the_one_before(ended, runs, fault):
    whole, _ = runs[1, "full"]
    assert ended[fault]["losses"] == whole["losses"][8:]
    assert ended[fault]["result"]["weights_sha256"] == whole["result"]["weights_sha256"]


def test_old_checkpoints_are_removed(ended, workers):
    left = sorted(p.name for p in (workers.directory / "flipped" / "checkpoints").iterdir())
    assert left == ["step-00000008", "step-00000012"]


def test_nan_loss_names_step_and_batch(ended, workers):
    answer = ended["nan"]
    assert answer["error"] == "NonFiniteLoss"
    assert "step" in answer["message"]
    (saved,) = (workers.directory / "stopped").glob("non-finite-*.json")
    assert str(saved) in answer["message"]
    content = json.loads(saved.read_text())
    (batch,) = content["batches"]
    assert {"example": 3} in batch["examples"]
    assert f"at step {content['step']}, batch {batch['batch']}" in answer["message"]
    assert len(answer["losses"]) == content["step"] - 1


@pytest.mark.parametrize(("stage", "fault"), SKIPPED)
def test_steps_that_are_not_finite_are_left_out(ended, workers, stage, fault):
    """Twice, once in each epoch; all other steps train."""
    answer = ended[f"skip {fault} {stage}"]
    assert answer["result"]["skipped"] == 2
    assert np.isfinite(answer["result"]["loss"])
    losses = np.array(answer["losses"])
    assert np.isnan(losses).sum() == (2 if fault == "loss" else 0)
    finite = losses[np.isfinite(losses)]
    assert finite[-3:].mean() < finite[:3].mean()
    weights = load_file(Path(answer["result"]["model"]) / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    saved = sorted((workers.directory / f"skip {fault} {stage}").glob("non-finite-*.json"))
    examples = [b["examples"] for path in saved for b in json.loads(path.read_text())["batches"]]
    assert sum({"example": 3} in batch for batch in examples) == 2
    assert len(examples) == (2 if fault == "loss" else 4)  # it may be any worker's gradient


def test_gradient_that_is_not_finite_stops_when_no_more_may_be_left_out(ended):
    answer = ended["gradient"]
    assert answer["error"] == "NonFiniteLoss"
    assert "the gradient became" in answer["message"]
    assert "after 1 steps that were left out" in answer["message"]


def test_spike_is_flagged_and_its_batch_saved(ended, workers):
    saved = sorted((workers.directory / "spike").glob("spike-*.json"))
    assert len(saved) == ended["spike"]["result"]["spikes"] >= 2  # not those among the first ten
    for path in saved:
        (batch,) = json.loads(path.read_text())["batches"]
        assert {"example": 3} in batch["examples"]


def test_full_disk_stops_all_workers_and_keeps_the_last_checkpoint(ended, runs):
    """Rank 1 can write no more from step 5 on, when a checkpoint of step 4 is there."""
    answer = ended["full disk"]
    assert answer["error"] == "CheckpointNotWritten"
    assert "worker 1" in answer["message"]
    assert "step-00000008" in answer["message"]
    again, whole = ended["after full disk"], runs[3, "full"][0]
    assert again["losses"] == whole["losses"][4:]
    assert again["result"]["weights_sha256"] == whole["result"]["weights_sha256"]


def test_checkpoint_that_fails_behind_training_ends_the_run(ended, workers):
    answer = ended["disk breaks"]
    assert answer["error"] == "CheckpointNotWritten"
    assert "step-00000008 could not be written (worker 1: Input/output error)" in answer["message"]
    assert 8 <= len(answer["losses"]) <= 12  # the next one was not begun
    [left] = (workers.directory / "disk breaks" / "checkpoints").iterdir()
    assert left.name == "step-00000004"


def test_sigterm_leaves_a_checkpoint(ended, runs, workers):
    answer = ended["preempted"]
    assert answer["error"] == "Preempted"
    assert "checkpoint of step 6" in answer["message"]
    again, whole = ended["after preempted"], runs[1, "full"][0]
    assert again["losses"] == whole["losses"][6:]
    assert again["result"]["weights_sha256"] == whole["result"]["weights_sha256"]
    told = read(workers.directory / "preempted")
    assert [(attempt.start, attempt.workers) for attempt in told.attempts] == [(0, 2), (6, 2)]
    assert told.curves["loss"] == list(enumerate(whole["losses"], 1))
    assert {"memory_bytes/worker-0", "memory_bytes/worker-1"} < told.curves.keys()


def test_notice_leaves_a_checkpoint_and_the_run_goes_on(ended, runs, workers):
    assert ended["noticed"]["losses"] == runs[1, "full"][0]["losses"]
    left = sorted(p.name for p in (workers.directory / "noticed" / "checkpoints").iterdir())
    assert left == ["step-00000005", "step-00000012"]


def test_computing_layers_again_changes_no_number(ended, runs):
    assert ended["layers again"]["losses"] == runs[1, "full"][0]["losses"]


def test_same_seed_gives_the_same_adapter(ended, runs):
    whole, resumed = runs[2, "lora"]
    same = ended["same seed"]["result"]["adapter_sha256"]
    assert same == whole["result"]["adapter_sha256"] == resumed["result"]["adapter_sha256"]
    assert same != ended["other seed"]["result"]["adapter_sha256"]
    assert runs[1, "full"][0]["result"]["adapter_sha256"] is None
    adapter = load_file(Path(whole["result"]["model"]).parent / "adapter.safetensors")
    assert adapter
    assert all("lora_" in name for name in adapter)


@pytest.mark.parametrize("variant", RESIZED)
def test_run_goes_on_with_another_number_of_workers(begun, alone, ended, variant):
    """2 → 1 → 2 workers, the same examples in every step: only rounding differs.

    Without dropout, which draws differently when the workers are others.
    """
    whole = begun["still", variant[1]]["losses"]
    parts = (begun["two", *variant], alone["one", *variant], ended["two again", *variant])
    first, second, third = (each["losses"] for each in parts)
    losses = first[:4] + second[:4] + third
    assert len(losses) == 12
    assert losses == pytest.approx(whole, rel=1e-4)


def test_another_number_of_workers_needs_the_same_batches_a_step(alone):
    refusal = alone["refused"]
    assert refusal["error"] == "TrainingError"
    assert "--num-workers 2, or with --accumulation 2" in refusal["message"]


def test_one_worker_in_float32_trains_the_weights_themselves(begun, alone):
    """Also with the weights of a checkpoint; others train copies in the optimizer."""
    assert alone["one", 1, "full"]["shares_weights"]
    assert alone["one", 2, "lora"]["shares_weights"]
    assert not alone["whole", "bf16"]["shares_weights"]
    assert not begun["two", 1, "full"]["shares_weights"]
    assert not begun["two", 2, "lora"]["shares_weights"]


def test_finished_run_is_not_run_again(ended, runs):
    assert ended["again"]["losses"] == []
    assert ended["again"]["result"] == runs[1, "full"][0]["result"]


def test_refusals(ended):
    other = ended["other settings"]
    assert other["error"] == "TrainingError"
    assert "learning_rate = 0.005 and this one has 0.5" in other["message"]
    assert ended["few"]["error"] == "TrainingError"
    assert "--batch-size" in ended["few"]["message"]


def test_refusals_name_what_the_user_set():
    new = {"task": {}, "training": {"batches": 4}}
    with pytest.raises(TrainingError, match="num_workers × accumulation = 2 and this one has 4"):
        _refuse_difference(Path("run"), {"task": {}, "training": {"batches": 2}}, new)
    with pytest.raises(TrainingError, match="run of an earlier version: give another --out"):
        _refuse_difference(Path("run"), {"task": {}, "training": {"accumulation": 1}}, new)


def test_tensorboard_curves(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole, _ = runs[1, "full"]
    events = EventAccumulator(str(Path(whole["result"]["model"]).parent / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx(whole["losses"])
    names = {"loss", "learning_rate", "grad_norm", "examples_per_s", "tokens_per_s"}
    memory = {"memory_bytes/worker-0", "memory_bytes/worker-1"}
    assert set(events.Tags()["scalars"]) == names | {"skipped", "spikes"} | memory
    rates = zip(events.Scalars("tokens_per_s"), events.Scalars("examples_per_s"), strict=True)
    assert {round(tokens.value / examples.value, 3) for tokens, examples in rates} == {7.0}
