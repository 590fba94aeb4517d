import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from fusionrec.errors import ConfigError, ModelError
from fusionrec.language.pruning import drop_layers

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 20}
IDS = torch.arange(2, 14).reshape(2, 6)


def outputs(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        found = model(input_ids=IDS)
    return (found.logits if "logits" in found else found.last_hidden_state).numpy()


def test_what_does_nothing_goes_first(tmp_path):
    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=4, **SIZES)).eval()
    with torch.no_grad():
        # Layers 1 and 2 pass on what they get: nothing is added, and it is normalised already.
        for place in (1, 2):
            layer = model.encoder.layer[place]
            for linear in (layer.attention.output.dense, layer.output.dense):
                linear.weight.zero_()
                linear.bias.zero_()
    whole = outputs(model)

    def likeness() -> float:
        return -float(np.abs(outputs(model) - whole).max())

    dropped = drop_layers(model, 2, likeness)
    assert [each.layer for each in dropped] == [2, 1]
    assert dropped[1].likeness == pytest.approx(0, abs=1e-5)
    assert model.config.num_hidden_layers == len(model.encoder.layer) == 2
    model.save_pretrained(tmp_path)
    np.testing.assert_allclose(outputs(BertModel.from_pretrained(tmp_path)), whole, atol=1e-5)


def test_a_decoder_counts_its_layers_anew():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **SIZES)).eval()
    asked = iter([0.1, 0.9, 0.2])
    dropped = drop_layers(model, 2, lambda: next(asked))
    assert [each.layer for each in dropped] == [1]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    whole = outputs(model)
    # Reading on with the keys and values of the beginning gives the same.
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
        rest = model(input_ids=IDS[:, 4:], past_key_values=cache).logits.numpy()
    np.testing.assert_allclose(rest, whole[:, 4:], atol=1e-5)


def test_too_many_layers_and_none_at_all():
    model = BertModel(BertConfig(num_hidden_layers=2, **SIZES))
    with pytest.raises(ConfigError, match="give 1 to 1"):
        drop_layers(model, 2, float)
    model.encoder.layer = torch.nn.Sequential(*model.encoder.layer)
    with pytest.raises(ModelError, match="no list of 2 layers"):
        drop_layers(model, 1, float)
