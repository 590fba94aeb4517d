"""Compiled layers: the same losses up to rounding, alone, shared, with adapters, and after a break.

What dropout draws is another thing, so there is none here.
"""

import pytest
import torch

from fusionrec.errors import ConfigError
from fusionrec.training.weights import compile_layers
from tests.training.scenarios import scenario

STILL = {"dropout": False}
VARIANTS = {
    (1, "plain"): {},
    (1, "lora"): {"method": "lora"},
    (1, "layers again"): {"activation_checkpointing": True},
    (2, "shared"): {"zero_stage": 2},
}


@pytest.fixture(scope="module")
def losses(workers, tiny_encoder):
    """{(workers, variant, how): losses of a run's steps}."""
    found = {}
    for count in (1, 2):
        scenarios = {}
        for (number, variant), settings in VARIANTS.items():
            if number != count:
                continue
            directory = workers.directory / f"{count} {variant}"
            compiled = settings | {"compile": True}
            for how, config, end in (
                ("eager", settings, {}),
                ("compiled", compiled, {}),
                ("broken", compiled, {"leave_at": 7}),
            ):
                scenarios[number, variant, how] = scenario(
                    directory / how, tiny_encoder, config, task=STILL, **end
                )
        answers = workers.run(*scenarios.values(), count=count)
        found |= dict(zip(scenarios, answers, strict=True))
        # Other processes go on.
        broken = {name: each for name, each in scenarios.items() if name[-1] == "broken"}
        for each in broken.values():
            del each["leave_at"]
        answers = workers.run(*broken.values(), count=count)
        found |= {
            (*name[:2], "resumed"): answer for name, answer in zip(broken, answers, strict=True)
        }
    return {name: answer["losses"] for name, answer in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_eager_layers(losses, variant):
    eager = losses[*variant, "eager"]
    assert len(eager) > 4
    assert losses[*variant, "compiled"] == pytest.approx(eager, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_goes_on_after_a_break(losses, variant):
    resumed, whole = losses[*variant, "resumed"], losses[*variant, "compiled"]
    assert 0 < len(resumed) < len(whole)
    assert resumed == pytest.approx(whole[-len(resumed) :], rel=1e-5)


def test_an_architecture_without_layers():
    with pytest.raises(ConfigError, match="does not say what its layers are"):
        compile_layers(torch.nn.Linear(2, 2))
