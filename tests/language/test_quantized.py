"""Linear layers in 8 bits."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fusionrec.errors import ModelError
from fusionrec.language.encoder import Encoder
from fusionrec.language.layers import Layers, quantise
from fusionrec.language.precision import Precision
from fusionrec.language.quantized import Int8FeedForward, Int8Linear, has_int8, has_vnni, watched
from fusionrec.language.reranker import Reranker
from fusionrec.training.config import TrainingConfig
from tests.language.test_layers import bert

TEXTS = ["love and war in space", "a night of music", "the book"]

pytestmark = pytest.mark.skipif(not has_int8(), reason="torch cannot multiply in 8 bits here")


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_close(bias):
    """Each output has a scale of its own: one of large weights costs the others nothing."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(64, 3, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(3, 64, generator=generator))
        linear.weight[1] *= 1000
        linear.weight[2] = 0
    inputs = torch.randn(2, 5, 64, generator=generator)
    exact, found = linear(inputs), Int8Linear(linear)(inputs)
    assert found.shape == exact.shape
    for output in (0, 1):
        spread = exact[..., output].std()
        assert (found - exact)[..., output].abs().max() < 0.05 * spread
    torch.testing.assert_close(found[..., 2], exact[..., 2])  # its bias alone


def test_a_sum_and_a_gelu_are_made_with_the_product():
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(16, 8)
    inputs, other = (torch.randn(2, 3, n, generator=generator) for n in (16, 8))
    exact = linear(inputs)
    torch.testing.assert_close(
        Int8Linear(linear).plus(inputs, other), exact + other, rtol=0, atol=0.05
    )
    torch.testing.assert_close(
        Int8Linear(linear, "gelu")(inputs), torch.nn.functional.gelu(exact), rtol=0, atol=0.05
    )


def test_the_ends_of_the_range_are_levels():
    """None is rounded beyond the last, which would be the first."""
    linear = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2))
    for low in (-1.0, -0.9999, -0.5, -1e-3, 0.0):
        inputs = torch.tensor([[low, 1.0]])
        torch.testing.assert_close(Int8Linear(linear)(inputs), inputs, rtol=0, atol=0.02)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("padded", [False, True])
def test_quantised_models_find_what_they_found_before(activation, padded):
    exact, found = bert(activation), bert(activation)
    quantise(found)
    assert (type(found.encoder) is Layers) is (activation == "gelu")
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, 5:] = mask[2, 2:] = 0
    with torch.inference_mode():
        ours = found(input_ids=tokens, attention_mask=mask).last_hidden_state
        theirs = exact(input_ids=tokens, attention_mask=mask).last_hidden_state
    told = mask.bool()
    # Of values around 1, as many as there are levels in a range of about 8.
    torch.testing.assert_close(ours[told], theirs[told], atol=0.1, rtol=0)


needs_vnni = pytest.mark.skipif(not has_vnni(), reason="sums of products may not fit here")


def feed_forward() -> tuple[torch.nn.Linear, torch.nn.Linear, torch.Tensor]:
    """Its layers, and inputs [2, 3, 16]."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide, narrow = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)
    return wide, narrow, 5 * torch.randn(2, 3, 16, generator=generator)


@needs_vnni
def test_a_feed_forward_network_is_close():
    wide, narrow, inputs = feed_forward()
    inner = torch.nn.functional.gelu(wide(inputs))
    found = Int8FeedForward(wide, narrow, inner.max().item())(inputs)
    torch.testing.assert_close(found, narrow(inner) + inputs, rtol=0, atol=0.1)


@needs_vnni
def test_above_the_peak_it_is_cut_off():
    """And does not begin again at the lowest level."""
    wide, narrow, inputs = feed_forward()
    inner = torch.nn.functional.gelu(wide(inputs))
    peak = inner.max().item() / 3
    found = Int8FeedForward(wide, narrow, peak)(inputs)
    torch.testing.assert_close(found, narrow(inner.clamp(max=peak)) + inputs, rtol=0, atol=0.1)


def test_peaks_are_the_largest_of_all_that_was_read():
    model = bert("gelu")
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    seen = []
    for layer in model.encoder.layer:
        layer.intermediate.register_forward_hook(lambda _, __, out: seen.append(out.max().item()))
    with watched(model) as peaks:
        model(input_ids=tokens[:2])
        model(input_ids=tokens[2:])
    assert peaks == [max(seen[0], seen[2]), max(seen[1], seen[3])]
    model(input_ids=tokens.flip(1))
    assert len(seen) == 6
    assert peaks == [max(seen[0], seen[2]), max(seen[1], seen[3])]


@pytest.mark.parametrize("vnni", [False, pytest.param(True, marks=needs_vnni)])
def test_models_whose_peaks_are_known(monkeypatch, vnni):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": vnni})
    exact, found = bert("gelu"), bert("gelu")
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    with watched(exact) as peaks:
        theirs = exact(input_ids=tokens).last_hidden_state.detach()
    quantise(found, peaks)
    inside = {type(layer._feed_forward) for layer in found.encoder._layers}
    assert (inside == {Int8FeedForward}) is vnni
    with torch.inference_mode():
        ours = found(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0)


def test_peaks_of_another_model_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    with pytest.raises(ModelError, match="peaks of 1 layers are known, and the model has 2"):
        quantise(bert("gelu"), [1.0])


def test_inputs_of_one_sign_and_none():
    linear = torch.nn.Linear(8, 2, bias=False)
    for inputs in (torch.full((3, 8), 5.0), torch.full((3, 8), -5.0), torch.zeros(3, 8)):
        torch.testing.assert_close(Int8Linear(linear)(inputs), linear(inputs), rtol=0, atol=0.2)


def test_what_gives_one_number_stays():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    quantise(model)
    assert [type(layer) for layer in model] == [Int8Linear, torch.nn.Linear]


def test_an_encoder_is_close(tiny_encoder):
    exact = Encoder.load(tiny_encoder, device="cpu", precision=Precision.FP32).encode(TEXTS)
    encoder = Encoder.load(tiny_encoder, device="cpu", precision=Precision.INT8, frozen=True)
    assert encoder.precision is Precision.INT8
    assert any(isinstance(layer, Int8Linear) for layer in encoder.model.modules())
    found = encoder.encode([*TEXTS, " "])
    assert found.dtype == np.float32
    assert (found[:3] * exact).sum(axis=1).min() > 0.98
    assert not found[3].any()


def test_a_reranker_is_close(tiny_encoder):
    lists = [["war in space", "the night"], ["music"]]
    exact, found = (
        np.concatenate(
            Reranker.load(tiny_encoder, device="cpu", precision=p, frozen=True).score(
                ["love", "a book"], lists
            )
        )
        for p in (Precision.FP32, Precision.INT8)
    )
    np.testing.assert_allclose(found, exact, atol=0.1 * max(1.0, float(np.abs(exact).max())))


def test_only_frozen_models_are(tiny_encoder):
    encoder = Encoder.load(tiny_encoder, device="cpu", precision=Precision.INT8)
    assert encoder.precision is Precision.FP32
    with pytest.raises(ValidationError, match="int8 is for serving"):
        TrainingConfig(precision=Precision.INT8)
