"""Which settings are offered, by what there is room for; memory is a formula here."""

import importlib.util

import pytest

from fusionrec.training.config import Method, TrainingConfig
from fusionrec.training.nearest import Setting, nearest
from fusionrec.training.objectives.encoder import EncoderSettings
from fusionrec.training.objectives.multitask import MultiTaskSettings
from fusionrec.training.objectives.rating import RatingSettings

ENCODER, RATING = EncoderSettings(max_tokens=64), RatingSettings(max_tokens=64)
BOTH = MultiTaskSettings(max_tokens=64, objectives=("encoder", "rating"))
AGAIN = {"activation_checkpointing": True, "on_gpu": False}


def activations(task, config) -> float:
    """GB: one of a text of 64 tokens, a tenth where layers are computed again."""
    # Of several objectives, the encoder's alone knows GradCache.
    cached = isinstance(task, EncoderSettings) and not isinstance(task, MultiTaskSettings)
    rows = (task.grad_cache if cached else None) or config.batch_size
    return rows * task.max_tokens / 64 * (0.1 if config.activation_checkpointing else 1)


def states(config, num_workers) -> float:
    """GB: 2 of weights, 2 of gradients and 12 of the optimizer; adapters are nothing."""
    weights = 2 / (num_workers if config.zero_stage == 3 else 1) * (not config.offload_parameters)
    gradients = 2 / (num_workers if config.zero_stage > 1 else 1)
    optimizer = 12 / num_workers * (not config.offload_optimizer)
    if config.method.adapts:
        return weights * (0.25 if config.method is Method.QLORA else 1)
    return weights + gradients + optimizer


@pytest.fixture
def offered(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())

    def find(task, room, *, num_workers=1, on_gpu=True, **config) -> str | None:
        found = nearest(
            Setting(task, TrainingConfig(batch_size=32, **config)),
            lambda t, c: activations(t, c) + states(c, num_workers) <= room,
            num_workers=num_workers,
            on_gpu=on_gpu,
        )
        return None if found is None else " ".join(found.flags)

    return find


OFFLOADED = "--zero-stage 3 --offload-optimizer --offload-parameters"


@pytest.mark.parametrize(
    ("task", "room", "flags"),
    [
        (ENCODER, 40, "--activation-checkpointing"),
        (ENCODER, 18, "--grad-cache 2"),
        (ENCODER, 10, "--activation-checkpointing --offload-optimizer"),
        (ENCODER, 5, "--offload-optimizer --grad-cache 1"),
        (ENCODER, 2.9, f"--activation-checkpointing {OFFLOADED} --grad-cache 8"),
        (ENCODER, 2.05, f"--method lora {OFFLOADED} --grad-cache 2"),
        (RATING, 18, "--activation-checkpointing --offload-optimizer"),
        (RATING, 0, None),
    ],
)
def test_what_costs_only_time_comes_first(offered, task, room, flags):
    assert offered(task, room) == flags


@pytest.mark.parametrize(
    ("task", "room", "method", "flags"),
    [
        (RATING, 17, "full", "--batch-size 8 --accumulation 4"),
        (ENCODER, 17, "full", "--grad-cache 8"),
        (BOTH, 17, "full", "--method lora"),
        (BOTH, 4, "lora", "--method qlora"),
        (BOTH, 2.5, "qlora", "--max-tokens 32"),
        (BOTH, 1, "qlora", "--batch-size 4 --accumulation 8"),
    ],
)
def test_negatives_of_a_batch_are_given_up_last(offered, task, room, method, flags):
    assert offered(task, room, method=method, **AGAIN) == flags


def test_four_bits_want_a_package(offered, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert offered(BOTH, 4, method="lora", **AGAIN) == "--max-tokens 32"


def test_sharding_comes_before_smaller_batches(offered):
    assert offered(RATING, 10, num_workers=4, **AGAIN) == "--zero-stage 2"
    assert offered(RATING, 8, num_workers=4, **AGAIN) == "--zero-stage 3"
    both = "--zero-stage 2 --batch-size 8 --accumulation 4"
    assert offered(RATING, 7, num_workers=4, **AGAIN) == both
