"""States and weights that a worker offloads, on a CPU: from memory into the same memory."""

import pytest
import torch
from transformers import BertConfig, BertModel

SETTINGS = {"batch_size": 2, "learning_rate": 5e-3, "num_threads": 1, "trackers": []}
SETTINGS |= {"max_steps": 6, "checkpoint_every": 2, "report_every": 1}
STATES = {"offload_optimizer": True}
ALL = STATES | {"offload_parameters": True}
NOTHING: dict = {}
# {variant: (settings, what is offloaded, and what after a break)}
VARIANTS = {
    "1": ({"zero_stage": 1}, STATES, STATES),
    "2": ({"zero_stage": 2, "method": "lora", "accumulation": 2}, STATES, NOTHING),
    "3": ({"zero_stage": 3}, ALL, ALL),
}


@pytest.fixture(scope="module")
def runs(workers, tmp_path_factory):
    """{variant: answers of a run without offloading, with it, of one that breaks off, its rest}."""
    model = tmp_path_factory.mktemp("model")
    # Of a smaller one ZeRO 3 shards nothing.
    shape = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = BertConfig(**shape, intermediate_size=128, vocab_size=64)
        BertModel(config).save_pretrained(model)
    scenarios = []
    for variant, (settings, offloaded, then) in VARIANTS.items():
        parts = [("plain", NOTHING, {}), ("whole", offloaded, {})]
        parts += [("broken", offloaded, {"leave_at": 3}), ("broken", then, {})]
        for part, offload, end in parts:
            directory = str(workers.directory / f"{variant} {part}")
            config = SETTINGS | settings | offload
            task = {"model": str(model)}
            scenarios.append({"task": task, "config": config, "directory": directory} | end)
    answers = iter(workers.run(*scenarios, count=1))
    return dict(zip(VARIANTS, zip(*[answers] * 4, strict=True), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_offloaded_run_has_the_same_losses(runs, variant):
    """Only norms of the gradients are summed in another order."""
    plain, whole, _, rest = runs[variant]
    assert len(set(plain["losses"])) == 6
    assert whole["losses"] == pytest.approx(plain["losses"], rel=2e-5)
    assert rest["losses"] == pytest.approx(plain["losses"][2:], rel=2e-5)


@pytest.mark.parametrize("variant", ["1", "3"])
def test_offloaded_run_goes_on_bit_for_bit(runs, variant):
    _, whole, broken, rest = runs[variant]
    assert broken["losses"] == whole["losses"][:3]
    assert rest["losses"] == whole["losses"][2:]
    assert rest["result"]["weights_sha256"] == whole["result"]["weights_sha256"]
