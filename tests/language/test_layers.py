"""Packed linear layers: the same numbers, in place of what they replace, and nothing else."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

from fusionrec.language.layers import Layers, pack
from fusionrec.language.packing import PackedLinear

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


def _layers(dtype: torch.dtype) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.Linear(64, 8, bias=False)).to(
        dtype
    )


@pytest.mark.parametrize("rows", [1, 7])
def test_packed_layers_give_the_same_bits(rows: int):
    layers, packed = _layers(torch.bfloat16), _layers(torch.bfloat16)
    pack(packed)
    assert all(type(layer) is PackedLinear for layer in packed)
    inputs = torch.randn(rows, 5, 48, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(packed(inputs), layers(inputs))


def test_layers_in_float32_stay_as_they_are():
    layers = _layers(torch.float32)
    pack(layers)
    assert all(type(layer) is torch.nn.Linear for layer in layers)


def bert(activation: str) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=activation,
    )
    return BertModel(config).eval()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("padded", [False, True])
def test_packed_models_find_what_they_found_before(activation: str, padded: bool):
    exact, packed = bert(activation), bert(activation).to(torch.bfloat16)
    pack(packed)
    assert (type(packed.encoder) is Layers) is (activation == "gelu")
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, 5:] = mask[2, 2:] = 0
    with torch.inference_mode():
        found = packed(input_ids=tokens, attention_mask=mask)
        expected = exact(input_ids=tokens, attention_mask=mask)
    told = mask.bool()
    # bf16 has 8 bits; two layers of values around 1.
    torch.testing.assert_close(
        found.last_hidden_state[told].float(), expected.last_hidden_state[told], atol=0.06, rtol=0
    )
    torch.testing.assert_close(
        found.pooler_output.float(), expected.pooler_output, atol=0.06, rtol=0
    )


def test_a_gelu_is_computed_with_its_layer():
    exact, packed = bert("gelu").encoder.layer[0].intermediate, bert("gelu").encoder.layer[0]
    packed = packed.intermediate.to(torch.bfloat16)
    pack(packed)
    assert type(packed.dense) is PackedLinear
    assert type(packed.intermediate_act_fn) is torch.nn.Identity
    inputs = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = packed(inputs.to(torch.bfloat16)).float()
        torch.testing.assert_close(found, exact(inputs), atol=0.02, rtol=0.02)


def test_a_decoder_keeps_its_layers():
    config = bert("gelu").config
    config.is_decoder = True
    packed = BertModel(config).to(torch.bfloat16).eval()
    pack(packed)
    assert type(packed.encoder) is not Layers
    assert type(packed.encoder.layer[0].attention.self.query) is PackedLinear


def test_a_packed_layer_says_the_shape_and_dtype_of_its_weights():
    layers = _layers(torch.bfloat16)
    pack(layers)
    assert layers[0].weight.shape == (64, 48)
    assert layers[0].weight.dtype is torch.bfloat16
