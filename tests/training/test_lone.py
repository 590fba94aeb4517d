"""One worker whose optimizer works in place, beside one that lets DeepSpeed copy everything."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from fusionrec.training.config import TrainingConfig
from fusionrec.training.memory import estimate
from fusionrec.training.traced import Architecture, Load, Pass, Reads

SETTINGS = {
    "epochs": 2,
    "batch_size": 4,
    "report_every": 1,
    "num_threads": 1,
    "max_skipped_steps": 2,
    "learning_rate": 1e-3,
    "max_grad_norm": 0.05,
    "trackers": [],
}
CASES = [(stage, accumulation, "fp32") for stage in (1, 2) for accumulation in (1, 2)]
CASES += [(2, 2, "bf16")]
WIDE = {"batch_size": 2, "max_steps": 2, "num_threads": 1, "trackers": []}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A model with an odd number of biases, which DeepSpeed makes even."""
    folder = tmp_path_factory.mktemp("odd")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = BertConfig(**shape, intermediate_size=63, vocab_size=1000)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model of 19 million parameters."""
    folder = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = BertConfig(**shape, intermediate_size=2048, vocab_size=1000)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(workers, odd, wide):
    """{(stage, accumulation, precision, copies): answer}, and those of the wide model by stage."""
    scenarios = {}
    for stage, accumulation, precision in CASES:
        for copies in (False, True):
            name = (stage, accumulation, precision, copies)
            scenarios[name] = {
                "task": {"model": str(odd), "bad_example": 3, "fault": "gradient"},
                "config": SETTINGS
                | {"zero_stage": stage, "accumulation": accumulation, "precision": precision},
                "directory": str(workers.directory / f"lone-{'-'.join(map(str, name))}"),
                "copies": copies,
            }
    for name in ("first", 1, 2):  # the first also takes what libraries make once
        scenarios[name] = {
            "task": {"model": str(wide)},
            "config": WIDE | {"zero_stage": 1 if name == "first" else name},
            "directory": str(workers.directory / f"lone-wide-{name}"),
        }
    return dict(zip(scenarios, workers.run(*scenarios.values(), count=1), strict=True))


@pytest.mark.parametrize(("stage", "accumulation", "precision"), CASES)
def test_same_steps_as_with_copies(answers, stage, accumulation, precision):
    """Gradients are clipped in each step, and one of them is not finite."""
    case = (stage, accumulation, precision)
    here, copied = (answers[*case, copies] for copies in (False, True))
    assert len(here["losses"]) == (12 if accumulation == 1 else 6)
    assert np.mean(here["losses"][-3:]) < np.mean(here["losses"][:3])
    close = 2e-5 if precision == "fp32" else 2e-3
    np.testing.assert_allclose(here["losses"], copied["losses"], rtol=close)
    assert here["result"]["skipped"] == copied["result"]["skipped"] == 2


@pytest.mark.parametrize("stage", [1, 2])
def test_there_are_no_second_weights_and_gradients(answers, wide, stage):
    load = Load(architecture=Architecture.BACKBONE, passes=(Pass(2, Reads.HIDDEN),), tokens=7)
    config = TrainingConfig(**WIDE, zero_stage=stage)
    expected = estimate(wide, load, config, num_workers=1)
    assert expected.weights == 4 * expected.parameters
    peak = answers[stage]["result"]["peak_memory_bytes"]
    assert expected.peak == pytest.approx(peak, rel=0.2)
