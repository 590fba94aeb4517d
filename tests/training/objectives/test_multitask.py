import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fusionrec.language.encoder import Encoder
from fusionrec.language.reranker import Reranker
from fusionrec.training import weights
from fusionrec.training.config import LoraSettings, Method, TrainingConfig
from fusionrec.training.objectives.multitask import MultiTask, MultiTaskSettings, Part
from fusionrec.training.objectives.settings import Need, part

THREE = (Part.ENCODER, Part.RERANKER, Part.PRETRAINING)


@pytest.fixture
def make(still_encoder, catalogue, examples):
    def build(**settings) -> tuple[MultiTask, torch.nn.Module]:
        chosen = MultiTaskSettings(
            encoder=str(still_encoder), max_tokens=12, objectives=THREE, **settings
        )
        task = MultiTask(chosen, catalogue, examples)
        return task, task.build_model()

    return build


def single(task: MultiTask, model: torch.nn.Module, batch: dict) -> list[float]:
    return [each.loss(model.of(each.name), part(batch, each.name)).item() for each in task._tasks]


def test_weights_multiply_the_losses(make):
    task, model = make(objective_weights=(1.0, 0.5, 2.0))
    batch = task.batch(task.plan(2, np.random.default_rng(0))[0])
    alone = single(task, model, batch)
    expected = alone[0] + 0.5 * alone[1] + 2 * alone[2]
    assert task.loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_learned_weights_start_at_one_and_have_the_known_gradient(make):
    task, model = make()
    batch = task.batch(task.plan(2, np.random.default_rng(0))[0])
    alone = single(task, model, batch)
    with torch.no_grad():
        model.log_variances[1] = math.log(2.0)
    loss = task.loss(model, batch)
    expected = alone[0] + alone[1] / 2 + math.log(2) / 2 + alone[2]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    gradient = [0.5 - alone[0], 0.5 - alone[1] / 2, 0.5 - alone[2]]
    assert model.log_variances.grad.tolist() == pytest.approx(gradient, rel=1e-4)


def test_there_is_one_transformer(make):
    task, model = make()
    trunk = model.of("encoder")
    assert model.of("reranker").bert is trunk
    assert model.of("pretraining").bert is trunk
    batch = task.batch(task.plan(2, np.random.default_rng(0))[0])
    task.loss(model, batch).backward()
    assert trunk.embeddings.word_embeddings.weight.grad is not None


def test_every_objective_is_saved(make, tmp_path):
    task, model = make()
    task.save(model, tmp_path)
    assert Encoder.load(tmp_path / "encoder", device="cpu").encode(["space"]).shape == (1, 32)
    Reranker.load(tmp_path / "reranker", device="cpu")
    Encoder.load(tmp_path / "pretraining", device="cpu")


def test_plans_of_different_length_are_repeated(make):
    task, _ = make()
    plan = task.plan(2, np.random.default_rng(0))
    assert len(plan) == 4
    assert plan[0].shape == (3, 2)
    assert [row["objective"] for row in task.describe(plan[3])] == [
        name for name in ("encoder", "reranker", "pretraining") for _ in range(2)
    ]


# peft reads an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_are_merged_into_the_shared_transformer(make, tmp_path):
    task, model = make()
    config = TrainingConfig(method=Method.LORA, lora=LoraSettings(rank=2, alpha=4))
    adapted = weights.with_adapters(model, task, config)
    batch = task.batch(task.plan(2, np.random.default_rng(0))[0])
    expected = task.loss(adapted, batch).item()
    full = {n: t.detach().clone() for n, t in adapted.named_parameters()}
    full |= {n: t.detach().clone() for n, t in adapted.named_buffers()}
    assert any("log_variances" in n and p.requires_grad for n, p in adapted.named_parameters())
    merged = weights.merged(full, task, config)
    assert task.loss(merged, batch).item() == pytest.approx(expected, rel=1e-4)


def test_settings_must_fit_together():
    with pytest.raises(ValidationError, match="twice"):
        MultiTaskSettings(objectives=(Part.ENCODER, Part.ENCODER))
    with pytest.raises(ValidationError, match="2 objectives: give a weight"):
        MultiTaskSettings(objective_weights=(1.0,))
    needs = MultiTaskSettings(objectives=(Part.ENCODER, Part.RATING)).needs
    assert needs == {Need.HISTORIES, Need.RATINGS}
