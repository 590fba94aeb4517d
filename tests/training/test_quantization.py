"""Adapters on weights in 4 bits; on CPUs too, where bitsandbytes is installed."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from fusionrec.errors import ConfigError
from fusionrec.training.config import LoraSettings, Method, TrainingConfig
from fusionrec.training.quantization import adapted_layers, quantize, values
from fusionrec.training.weights import with_adapters

installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the extra qlora is not installed"
)
QLORA = TrainingConfig(method=Method.QLORA, lora=LoraSettings(rank=2))
CPU = torch.device("cpu")
# Appendix E of the paper, of which the rest is 0 and the other half.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
NF4 += [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495]
SHAPE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 64, "vocab_size": 64}
SHAPE |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Headless:
    head = ()


def adapted() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = BertModel(BertConfig(**SHAPE), add_pooling_layer=False)
        return with_adapters(model, Headless(), QLORA)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_layers_that_cannot_be_put_in_four_bits():
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11}
    shape |= {"bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng():
        model = with_adapters(GPT2LMHeadModel(GPT2Config(**shape)), Headless(), QLORA)
    with pytest.raises(ConfigError, match=r"\(Conv1D\).*set --method lora"):
        adapted_layers(model)


@installed
def test_values_of_normal_float_are_kept():
    """Blocks that span from -1 to 0 have one scale: there is nothing to round."""
    model = adapted()
    weight = adapted_layers(model)[0].get_base_layer().weight
    generator = torch.Generator().manual_seed(0)
    expected = torch.tensor([*NF4, 0.0])[torch.randint(8, weight.shape, generator=generator)]
    expected[:, ::64] = -1.0
    weight.data.copy_(expected)
    quantize(model, CPU, torch.float32)
    packed = adapted_layers(model)[0].get_base_layer().weight
    assert packed.dtype == torch.uint8
    assert packed.nbytes == weight.numel() / 2
    torch.testing.assert_close(values(packed), expected)
    scales = [name for name in model.state_dict() if ".weight." in name.replace(".default.", "")]
    assert scales == []


@installed
def test_gradients_are_those_of_the_values():
    """Also after an evaluation, for which bitsandbytes has another format on some CPUs."""
    packed, plain = adapted(), adapted()
    quantize(packed, CPU, torch.float32)
    for layer, other in zip(adapted_layers(packed), adapted_layers(plain), strict=True):
        other.get_base_layer().weight.data.copy_(values(layer.get_base_layer().weight))
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        packed.eval()(input_ids=ids)
    for model in (packed, plain):
        model.train()(input_ids=ids).last_hidden_state[..., :9].square().sum().backward()
    found, expected = (
        {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        for model in (packed, plain)
    )
    assert all("lora_" in name for name in found)
    assert any(gradient.abs().max() > 0.1 for gradient in found.values())
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def runs(workers, tmp_path_factory):
    """(folder of the model, answers: of a whole run, of one that breaks off, of its rest)."""
    model = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        BertModel(BertConfig(**SHAPE)).save_pretrained(model)
    config = {"method": "qlora", "batch_size": 4, "learning_rate": 5e-3, "num_threads": 1}
    config |= {"checkpoint_every": 2, "report_every": 1, "epochs": 2}
    scenarios = []
    for part, end in (("whole", {}), ("broken", {"leave_at": 5}), ("broken", {})):
        common = {"task": {"model": str(model)}, "directory": str(workers.directory / part)}
        scenarios.append(common | {"config": config} | end)
    return model, workers.run(*scenarios, count=1)


@installed
def test_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(runs):
    _, (whole, broken, rest) = runs
    assert len(whole["losses"]) == 12
    assert sum(whole["losses"][-3:]) < 0.9 * sum(whole["losses"][:3])
    assert broken["losses"] == whole["losses"][:5]
    assert rest["losses"] == whole["losses"][4:]
    assert rest["result"]["weights_sha256"] == whole["result"]["weights_sha256"]


@installed
def test_adapters_are_merged_into_the_values(runs):
    before, (whole, *_) = runs
    folder = Path(whole["result"]["model"])
    adapter, after = (
        load_file(path)
        for path in (folder.parent / "adapter.safetensors", folder / "model.safetensors")
    )
    name = "encoder.layer.1.attention.self.query"
    [a], [b] = ([w for key, w in adapter.items() if f"{name}.lora_{s}" in key] for s in "AB")
    model = with_adapters(BertModel.from_pretrained(before), Headless(), QLORA)
    quantize(model, CPU, torch.float32)
    layer = model.get_submodule(f"base_model.model.{name}.base_layer")
    settings = LoraSettings()
    expected = values(layer.weight) + b @ a * settings.alpha / settings.rank
    torch.testing.assert_close(after[f"{name}.weight"], expected)
    assert b.abs().max() > 0
