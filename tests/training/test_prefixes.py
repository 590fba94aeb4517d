"""Prompts that share a prefix give what each gives alone."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from fusionrec.language.decoder import answer_logits
from fusionrec.training import prefixes
from fusionrec.training.tracking import count_tokens

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "num_key_value_heads": 1}
MODELS = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
}
ANSWERS = torch.tensor([7, 11])
PREFIXES = [[3, 4, 5, 6, 7], [8, 9]]
SUFFIXES = [[[10, 11], [12, 13, 14], [15]], [[16, 17, 18, 19], [20, 21]]]


def made(config) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def alone() -> dict[str, torch.Tensor]:
    """[P, L] of a row each, padded on the left."""
    prompts = [p + s for p, each in zip(PREFIXES, SUFFIXES, strict=True) for s in each]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits_and_gradients(name):
    model = made(MODELS[name])
    assert prefixes.shares(model)
    batch = prefixes.rows(PREFIXES, SUFFIXES, padding=0)
    found = prefixes.logits(model, batch, ANSWERS)
    expected = answer_logits(model, alone(), ANSWERS)
    torch.testing.assert_close(found, expected)
    weights = list(model.parameters())
    one, other = (torch.autograd.grad(x.square().sum(), weights) for x in (found, expected))
    for shared, own in zip(one, other, strict=True):
        torch.testing.assert_close(shared, own, rtol=1e-4, atol=1e-6)


def test_rows():
    batch = prefixes.rows(PREFIXES, SUFFIXES, padding=0)
    assert batch["input_ids"].tolist() == [
        [3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15],
        [8, 9, 16, 17, 18, 19, 20, 21, 0, 0, 0],
    ]
    assert batch["position_ids"][1, :8].tolist() == [0, 1, 2, 3, 4, 5, 2, 3]
    ends = batch["input_ids"][batch["row"], batch["end"]]
    assert ends.tolist() == [11, 14, 15, 19, 21]
    assert count_tokens(batch) == 11 + 8
    assert np.prod(batch["input_ids"].shape) < alone()["input_ids"].numel()


def test_who_cannot_share():
    assert not prefixes.shares(made(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)))
    assert not prefixes.shares(made(MistralConfig(**SMALL, sliding_window=4)))
    llama = AutoModelForCausalLM.from_config(MODELS["llama"], attn_implementation="eager")
    assert not prefixes.shares(llama)
