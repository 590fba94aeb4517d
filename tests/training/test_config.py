import pytest
from pydantic import ValidationError

from fusionrec.training.config import Method, TrainingConfig


def test_learning_rate_rises_and_falls():
    config = TrainingConfig(learning_rate=1.0, warmup=0.2)
    rates = [config.learning_rate_at(step, 10) for step in range(10)]
    assert rates[:2] == [0.5, 1.0]
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert rates[2] == 1.0
    assert rates[-1] == pytest.approx(1 / 8)
    assert TrainingConfig(warmup=0.0, learning_rate=1.0).learning_rate_at(0, 1) == 1.0


def test_total_steps():
    assert TrainingConfig(epochs=3).total_steps(7) == 21
    assert TrainingConfig(epochs=3, max_steps=10).total_steps(7) == 10
    assert TrainingConfig(epochs=1, max_steps=10).total_steps(7) == 7


def test_json_round_trip_and_identity():
    config = TrainingConfig(method=Method.LORA, zero_stage=3, batch_size=5)
    assert TrainingConfig.model_validate_json(config.model_dump_json()) == config
    more_often = config.model_copy(update={"checkpoint_every": 1, "num_threads": 7})
    assert more_often.identity() == config.identity()
    assert config.model_copy(update={"offload_optimizer": True}).identity() == config.identity()
    assert config.model_copy(update={"seed": 1}).identity() != config.identity()
    with pytest.raises(ValidationError):
        TrainingConfig(zero_stage=4)


def test_every_worker_finds_the_staging_folder(tmp_path):
    assert TrainingConfig(checkpoint_staging=tmp_path).checkpoint_staging == tmp_path
    with pytest.raises(ValidationError, match="absolute path"):
        TrainingConfig(checkpoint_staging="shards")


def test_deepspeed_settings():
    settings = TrainingConfig(zero_stage=3, batch_size=4, accumulation=2).deepspeed(3, bf16=True)
    assert settings["train_batch_size"] == 24
    assert settings["bf16"]["enabled"] is True
    assert settings["optimizer"]["params"]["torch_adam"] is True
    assert not {"offload_optimizer", "offload_param"} & settings["zero_optimization"].keys()
    both = TrainingConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True)
    assert TrainingConfig().works_in_place(1)
    assert not TrainingConfig(offload_optimizer=True).works_in_place(1)
    zero = both.deepspeed(1, bf16=False)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu"}
