"""Objectives in two gloo workers: what they exchange, and what they choose by the current model."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusionrec.training.config import TrainingConfig
from fusionrec.training.objectives.decoder import DecoderSettings
from fusionrec.training.objectives.distillation import DistillationSettings
from fusionrec.training.objectives.encoder import EncoderSettings, EncoderTask
from fusionrec.training.objectives.multitask import MultiTaskSettings, Part
from fusionrec.training.objectives.pretraining import PretrainingSettings
from fusionrec.training.objectives.rating import RatingSettings
from fusionrec.training.objectives.reranker import RerankerSettings
from fusionrec.training.tasks import save_task

OTHERS = ("letters", "yes-no", "causal", "rating", "distillation", "student encoder", "towers")
CONFIG = {"batch_size": 2, "learning_rate": 5e-3, "num_threads": 1, "report_every": 1}
FAULTS = ("flipped", "truncated", "missing")
MINING = {"mined_negatives": 2, "mine_every": 3, "mine_from": 3, "grad_cache": 2}


def reference(task: EncoderTask, config: TrainingConfig, steps: int) -> list[float]:
    """Losses of one process whose batches are those of both workers together."""
    model = task.build_model()
    plan = task.plan(config.batch_size, np.random.default_rng([config.seed, 0]))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for step in range(steps):
        loss = task.loss(model, task.batch(np.concatenate(plan[2 * step : 2 * step + 2])))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def answers(workers, still_encoder, catalogue, examples):
    settings = {
        "gathered": EncoderSettings(encoder=str(still_encoder), max_tokens=32),
        "mined": EncoderSettings(encoder=str(still_encoder), max_tokens=32, **MINING),
        "multi": MultiTaskSettings(
            encoder=str(still_encoder),
            max_tokens=12,
            objectives=(Part.ENCODER, Part.PRETRAINING),
            mined_negatives=1,
            mine_every=3,
        ),
    }
    settings["lists"] = RerankerSettings(encoder=str(still_encoder), max_tokens=32)
    tasks = {"multi": "multi-task", "lists": "reranker"}
    for name, chosen in settings.items():
        task = tasks.get(name, "encoder")
        save_task(task, chosen, catalogue, examples, workers.directory / name)

    def scenario(name: str, run: str, **rest) -> dict:
        config = CONFIG | rest.pop("config", {})
        folder = {"folder": str(workers.directory / name)}
        return {"task": folder, "config": config, "directory": str(workers.directory / run)} | rest

    scenarios = {"gathered": scenario("gathered", "gathered-run")}
    for stage in (1, 2, 3):
        config = {"zero_stage": stage, "epochs": 4, "checkpoint_every": 4}
        scenarios[f"mined-{stage}"] = scenario("mined", f"mined-{stage}", config=config)
    broken = {"config": config, "leave_at": 5}
    scenarios["broken"] = scenario("mined", "broken", **broken)
    scenarios["resumed"] = scenario("mined", "broken", config=config)
    for fault in FAULTS:  # a checkpoint of step 6, and before it one of step 4
        often = {"config": config | {"checkpoint_every": 2}}
        scenarios[f"before {fault}"] = scenario("mined", fault, **often, leave_at=7)
        ill = {"damage": "checkpoints/step-00000006/chosen.safetensors", "fault": fault}
        scenarios[fault] = scenario("mined", fault, **often, **ill)
    for stage in (1, 3):
        config = {"zero_stage": stage, "epochs": 4, "batch_size": 1, "learning_rate": 1e-2}
        scenarios[f"multi-{stage}"] = scenario("multi", f"multi-{stage}", config=config)
        config = {"zero_stage": stage, "epochs": 2}
        scenarios[f"lists-{stage}"] = scenario("lists", f"lists-{stage}", config=config)
    return dict(zip(scenarios, workers.run(*scenarios.values()), strict=True))


def test_two_workers_do_what_one_does_with_both_batches(
    answers, still_encoder, catalogue, examples
):
    settings = EncoderSettings(encoder=str(still_encoder), max_tokens=32)
    task = EncoderTask(settings, catalogue, examples)
    expected = reference(task, TrainingConfig(**CONFIG), steps=2)
    assert answers["gathered"]["losses"] == pytest.approx(expected, rel=1e-4)


def test_mining_with_gradcache_is_the_same_in_every_zero_stage(answers):
    first = answers["mined-1"]["losses"]
    assert len(first) == 8
    for stage in (2, 3):
        assert answers[f"mined-{stage}"]["losses"] == pytest.approx(first, rel=1e-4)
    found = []
    for step in (4, 8):  # mined at steps 3 and 6
        run = Path(answers["mined-3"]["result"]["model"]).parent
        found.append(load_file(run / f"checkpoints/step-{step:08d}/chosen.safetensors")["mined"])
    assert found[0].shape == found[1].shape == (8, 2)
    assert not torch.equal(*found)


def test_a_resumed_run_goes_on_with_the_negatives_it_had(answers):
    whole, resumed = answers["mined-3"], answers["resumed"]
    assert resumed["losses"] == whole["losses"][4:]  # mined at step 3, resumed at 4
    assert resumed["result"]["weights_sha256"] == whole["result"]["weights_sha256"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_whose_negatives_are_damaged_is_passed_over(answers, fault):
    whole, resumed = answers["mined-3"], answers[fault]
    assert resumed["losses"] == whole["losses"][4:]
    assert resumed["result"]["weights_sha256"] == whole["result"]["weights_sha256"]


def test_pieces_of_other_lengths_are_the_same_in_every_zero_stage(answers):
    first, third = (answers[f"lists-{stage}"]["losses"] for stage in (1, 3))
    assert len(first) == 4
    assert third == pytest.approx(first, rel=1e-4)


def test_uncertainties_are_learned_and_shared_weights_saved(answers):
    for stage in (1, 3):
        model = Path(answers[f"multi-{stage}"]["result"]["model"])
        assert {path.name for path in model.iterdir()} == {"encoder", "pretraining"}
    first, third = (answers[f"multi-{stage}"]["losses"] for stage in (1, 3))
    assert third == pytest.approx(first, rel=1e-4)
    assert np.mean(first[-2:]) < np.mean(first[:2])


@pytest.fixture(scope="module")
def others(workers, wide, catalogue, examples):
    """{(objective, stage of ZeRO): answer}, in one pair of processes."""
    shared = {"encoder": str(wide["encoder"]), "max_tokens": 48}
    decoder = {"encoder": str(wide["decoder"]), "max_tokens": 48}
    tasks = {
        "letters": ("decoder", DecoderSettings(**decoder, prompt="letters")),
        "yes-no": ("decoder", DecoderSettings(**decoder, prompt="yes-no")),
        "causal": ("pretraining", PretrainingSettings(**decoder | {"max_tokens": 8})),
        "rating": ("rating", RatingSettings(**shared)),
        "distillation": ("distillation", DistillationSettings(**shared)),
        "student encoder": ("distillation", DistillationSettings(**shared, student="encoder")),
        "towers": ("encoder", EncoderSettings(**shared, towers=2)),
    }
    taught = dataclasses.replace(
        examples,
        scores=np.tile(np.array([2.0, 0.0, -2.0], np.float32), (8, 1)),
        ratings=np.arange(8, dtype=np.float32) % 5,
        expected=np.full(8, 2.0, np.float32),
    )
    scenarios = {}
    for kind in OTHERS:
        name, settings = tasks[kind]
        folder = workers.directory / f"task {kind}"
        save_task(name, settings, catalogue, None if kind == "causal" else taught, folder)
        for stage in (1, 3):
            batch_size = 1 if kind == "causal" else 2  # there are six texts
            config = CONFIG | {"zero_stage": stage, "epochs": 2, "batch_size": batch_size}
            directory = str(workers.directory / f"{kind} {stage}")
            task = {"folder": str(folder)}
            scenarios[kind, stage] = {"task": task, "config": config, "directory": directory}
    return dict(zip(scenarios, workers.run(*scenarios.values()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_every_objective_is_the_same_in_shards(others, kind):
    first, third = (others[kind, stage]["losses"] for stage in (1, 3))
    assert len(first) >= 4
    assert np.ptp(first) > 1e-3 * np.mean(first)
    assert third == pytest.approx(first, rel=1e-4)
