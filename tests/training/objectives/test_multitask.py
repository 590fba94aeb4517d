import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fusionrec.errors import ConfigError
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


def test_options_reach_their_objectives():
    chosen = MultiTaskSettings(
        objectives=(Part.ENCODER, Part.PRETRAINING, Part.DISTILLATION),
        dimensions=(8,),
        mined_negatives=2,
        next_sentence=True,
        distillation_loss="kl",
    )
    assert chosen.of(Part.ENCODER).dimensions == (8,)
    assert chosen.of(Part.ENCODER).mined_negatives == 2
    assert chosen.of(Part.PRETRAINING).next_sentence
    assert chosen.of(Part.DISTILLATION).distillation_loss == "kl"
    assert {"dimensions", "next_sentence", "student", "objective_weights"} <= chosen.read
    assert not {"prompt", "ranking_loss", "num_reviews"} & chosen.read


def test_the_encoder_mines_by_its_own_part_of_the_model(make):
    task, model = make(mined_negatives=2, mine_every=5, mine_from=3)
    assert task.refresh_every == 5
    assert make()[0].refresh_every == 0
    encoder = task._tasks[0]
    with torch.no_grad():
        task.refresh(lambda function, batch: function(model, batch), 0)
        alone = encoder._mined
        encoder.refresh(lambda function, batch: function(model.of("encoder"), batch), 0)
    assert alone.shape == (8, 2)
    np.testing.assert_array_equal(alone, encoder._mined)
    chosen, encoder._mined = task.chosen(), alone[:, :0]
    assert set(chosen) == {"encoder.mined"}
    task.restore(chosen)
    np.testing.assert_array_equal(alone, encoder._mined)


def test_a_decoder_and_what_it_reads_are_one_language_model(tiny_decoder, catalogue, examples):
    chosen = MultiTaskSettings(
        encoder=str(tiny_decoder), max_tokens=24, objectives=(Part.DECODER, Part.PRETRAINING)
    )
    task = MultiTask(chosen, catalogue, examples)
    model = task.build_model()
    both = [model.of(name) for name in ("decoder", "pretraining")]
    assert both[0].model is both[1].model
    assert both[0].lm_head is both[1].lm_head
    (batch,) = task.plan(8, np.random.default_rng(0))
    task.loss(model, task.batch(batch)).backward()
    assert both[0].lm_head.weight.grad is not None


def test_what_does_not_go_around_one_transformer():
    with pytest.raises(ConfigError, match="encoder reads with an encoder; set --objectives"):
        MultiTaskSettings(objectives=(Part.DECODER, Part.ENCODER)).refuse_misfits()
    with pytest.raises(ConfigError, match="leave --towers out"):
        MultiTaskSettings(towers=2).refuse_misfits()


def test_settings_must_fit_together():
    with pytest.raises(ValidationError, match="twice"):
        MultiTaskSettings(objectives=(Part.ENCODER, Part.ENCODER))
    with pytest.raises(ValidationError, match="2 objectives: give a weight"):
        MultiTaskSettings(objective_weights=(1.0,))
    needs = MultiTaskSettings(objectives=(Part.ENCODER, Part.RATING)).needs
    assert needs == {Need.HISTORIES, Need.RATINGS}
