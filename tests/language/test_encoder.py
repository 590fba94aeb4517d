import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fusionrec.errors import ModelError
from fusionrec.language.encoder import Encoder, EncoderConfig, vectors
from fusionrec.language.precision import Precision

TEXTS = ["a film of space", "", "war", "love and music in the night " * 9, "the book", "  ", "war"]


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Encoder:
    loaded = Encoder.load(tiny_encoder, device="cpu")
    assert loaded.config.max_tokens == 128  # all its positions, which are fewer than the default
    return Encoder(loaded.model, loaded.tokenizer, EncoderConfig(model="tiny", max_tokens=32))


def test_vectors_have_unit_length_and_blank_texts_are_zero(encoder: Encoder):
    found = encoder.encode(TEXTS)
    assert found.dtype == np.float32
    assert found.shape == (len(TEXTS), encoder.dimension) == (7, 32)
    lengths = np.linalg.norm(found, axis=1)
    np.testing.assert_allclose(lengths, [1, 0, 1, 1, 1, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(found[2], found[6])


def test_the_batch_a_text_is_in_does_not_matter(encoder: Encoder):
    together = encoder.encode(TEXTS)
    for batch_size in (1, 2, 3):
        np.testing.assert_allclose(encoder.encode(TEXTS, batch_size), together, atol=1e-6)
    np.testing.assert_array_equal(encoder.encode(TEXTS), together)


def test_texts_are_cut_at_max_tokens(encoder: Encoder):
    assert encoder.inputs(["war " * 200])["input_ids"].shape == (1, 32)
    np.testing.assert_array_equal(encoder.encode(["war " * 200]), encoder.encode(["war " * 300]))


def test_the_beginning_of_a_vector_is_a_vector(encoder: Encoder, tmp_path: Path):
    settings = encoder.config.model_copy(update={"dimensions": 8})
    Encoder(encoder.model, encoder.tokenizer, settings).save(tmp_path)
    short = Encoder.load(tmp_path, device="cpu")
    assert short.dimension == 8
    expected = encoder.encode(TEXTS)[:, :8]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True).clip(1e-9)
    np.testing.assert_allclose(short.encode(TEXTS), expected, atol=1e-6)
    with pytest.raises(ModelError, match="set it to 32 or less"):
        Encoder(encoder.model, encoder.tokenizer, settings.model_copy(update={"dimensions": 33}))


def test_no_texts(encoder: Encoder):
    assert encoder.encode([]).shape == (0, 32)
    assert encoder.encode(["", " "]).tolist() == np.zeros((2, 32)).tolist()


class Constant(torch.nn.Module):
    """A model whose states are given."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.last_hidden_state = states

    def forward(self, attention_mask: torch.Tensor) -> "Constant":
        assert attention_mask.shape == self.last_hidden_state.shape[:2]
        return self


def test_pooling_of_known_states():
    # One text of three tokens, of which the last is padding.
    model = Constant(torch.tensor([[[2.0, 0.0], [4.0, 8.0], [1e6, 1e6]]]))
    inputs = {"attention_mask": torch.tensor([[1, 1, 0]])}
    torch.testing.assert_close(vectors(model, inputs, "mean"), torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(vectors(model, inputs, "cls"), torch.tensor([[1.0, 0.0]]))
    nothing = {"attention_mask": torch.tensor([[0, 0, 0]])}
    assert vectors(model, nothing, "mean").tolist() == [[0.0, 0.0]]


def test_encoding_leaves_the_training_mode_as_it_was(encoder: Encoder):
    encoder.model.train()
    try:
        first, second = encoder.encode(TEXTS), encoder.encode(TEXTS)
        assert encoder.model.training
    finally:
        encoder.model.eval()
    np.testing.assert_array_equal(first, second)  # no dropout
    loss = vectors(encoder.model, encoder.inputs(["war"]), "mean").sum()
    assert loss.requires_grad


def test_save_and_load(encoder: Encoder, tmp_path: Path):
    encoder.save(tmp_path / "first")
    loaded = Encoder.load(tmp_path / "first", device="cpu")
    assert loaded.config == encoder.config
    np.testing.assert_array_equal(loaded.encode(TEXTS), encoder.encode(TEXTS))
    loaded.save(tmp_path / "second")
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == {path.name for path in (tmp_path / "second").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "encoder.json"} <= names
    for name in names:
        first, second = tmp_path / "first" / name, tmp_path / "second" / name
        if name != "tokenizer_config.json":  # transformers notes the last truncation in it
            assert first.read_bytes() == second.read_bytes(), name
        assert str(tmp_path).encode() not in first.read_bytes(), name


def test_a_broken_settings_file_is_one_sentence(encoder: Encoder, tmp_path: Path):
    encoder.save(tmp_path)
    (tmp_path / "encoder.json").write_text('{"pooling": "max"}')
    with pytest.raises(ModelError, match=r"encoder\.json cannot be read .*save the model again"):
        Encoder.load(tmp_path)


def test_more_tokens_than_positions(encoder: Encoder):
    config = encoder.config.model_copy(update={"max_tokens": 129})
    with pytest.raises(ModelError, match="max_tokens = 129 is more than the 128 positions"):
        Encoder(encoder.model, encoder.tokenizer, config)


@pytest.mark.parametrize(
    ("published", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls", "embedding_dimension": 32}, "cls"),
    ],
)
def test_published_pooling_is_followed(tiny_encoder: Path, tmp_path: Path, published, pooling):
    folder = tmp_path / "model"
    shutil.copytree(tiny_encoder, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(published))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    config = Encoder.load(folder, device="cpu").config
    assert (config.pooling, config.max_tokens, config.model) == (pooling, 64, str(folder))


def test_a_pooling_that_is_not_known_is_refused(tiny_encoder: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_encoder, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ModelError, match="pools by pooling_mode_max_tokens"):
        Encoder.load(folder)


def test_several_threads(encoder: Encoder):
    expected = encoder.encode(TEXTS)
    found: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: found.append(encoder.encode(TEXTS))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for one in found:
        np.testing.assert_allclose(one, expected, atol=1e-6)


def test_bf16_stays_close_and_answers_in_float32(tiny_encoder: Path, monkeypatch):
    monkeypatch.setattr("fusionrec.language.encoder.usable", lambda precision, *_, **__: precision)
    exact = Encoder.load(tiny_encoder, device="cpu", precision=Precision.FP32)
    half = Encoder.load(tiny_encoder, device="cpu", precision=Precision.BF16)
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    found = half.encode(TEXTS)
    assert found.dtype == np.float32
    cosines = (found * exact.encode(TEXTS)).sum(axis=1)
    np.testing.assert_allclose(cosines, [1, 0, 1, 1, 1, 0, 1], atol=1e-3)
    assert not np.array_equal(found, exact.encode(TEXTS))
    alone = half.encode(TEXTS, batch_size=1)  # other neighbours, a little another vector
    np.testing.assert_allclose((found * alone).sum(axis=1), [1, 0, 1, 1, 1, 0, 1], atol=1e-3)


@pytest.mark.parametrize(
    ("capabilities", "loaded"),
    [
        ({"amx_bf16": True}, Precision.BF16),
        ({"amx_bf16": False, "avx512_bf16": True}, Precision.BF16),
        ({"avx512_f": True, "amx_bf16": False, "avx512_bf16": False}, Precision.FP32),
        ({}, Precision.FP32),
    ],
)
def test_bf16_is_loaded_only_where_it_is_fast(
    tiny_encoder: Path, monkeypatch, capabilities, loaded
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    encoder = Encoder.load(tiny_encoder, device="cpu", precision=Precision.BF16)
    assert encoder.precision is loaded
    dtype = torch.bfloat16 if loaded is Precision.BF16 else torch.float32
    assert encoder.model.dtype == dtype
    assert Encoder.load(tiny_encoder, device="cpu").model.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bf16_on_a_gpu_stays_close(tiny_encoder: Path):
    cpu, gpu = (Encoder.load(tiny_encoder, device=device) for device in ("cpu", "cuda"))
    cosines = (cpu.encode(TEXTS) * gpu.encode(TEXTS)).sum(axis=1)
    np.testing.assert_allclose(cosines, [1, 0, 1, 1, 1, 0, 1], atol=1e-3)
    assert next(gpu.model.parameters()).dtype == torch.float32


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return Encoder.load(device="cpu")


def test_minilm_knows_related_films(minilm: Encoder):
    toys, bugs, saw, saw_again = minilm.encode(
        [
            "Toy Story (1995). Animation, Children. A boy's toys come alive.",
            "A Bug's Life (1998). Animation, Children. An ant colony and circus insects.",
            "Saw (2004). Horror. Two men wake up chained by a sadistic killer.",
            "Hostel (2005). Horror. Backpackers fall into the hands of torturers.",
        ]
    )
    assert toys @ bugs > max(toys @ saw, toys @ saw_again) + 0.1
    assert saw @ saw_again > max(bugs @ saw, bugs @ saw_again) + 0.1


REFERENCE = (
    (-0.091457, 0.024577, -0.016054, -0.020696),
    (-0.030234, -0.012983, 0.023762, 0.000399),
)


def test_minilm_is_pooled_as_published(minilm: Encoder):
    """Reference values of sentence-transformers 6.2.0 on the same weights."""
    assert (minilm.config.max_tokens, minilm.config.pooling) == (256, "mean")
    found = minilm.encode(["A film about toys.", "A film about toys. " * 100])
    np.testing.assert_allclose(found[0, :4], REFERENCE[0], atol=2e-5)
    np.testing.assert_allclose(found[1, :4], REFERENCE[1], atol=2e-5)
