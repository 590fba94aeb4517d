from pathlib import Path

import numpy as np
import pytest
import torch

from fusionrec.errors import ModelError
from fusionrec.language.encoder import Encoder
from fusionrec.language.precision import Precision
from fusionrec.language.reranker import Reranker, RerankerConfig

HISTORIES = ["a film of space; war", "", "love"]
CANDIDATES = [["the book", "a night of war " * 8, ""], ["music"], []]


@pytest.fixture(scope="module")
def reranker(tiny_encoder: Path) -> Reranker:
    loaded = Reranker.load(tiny_encoder, device="cpu")
    assert loaded.config.max_tokens == 128  # all its positions, which are fewer than the default
    return Reranker(loaded.model, loaded.tokenizer, RerankerConfig(model="tiny", max_tokens=48))


def test_scores_come_as_the_candidates_went(reranker: Reranker):
    scores = reranker.score(HISTORIES, CANDIDATES)
    assert [len(row) for row in scores] == [3, 1, 0]
    assert all(row.dtype == np.float32 for row in scores)
    assert scores[1].tolist() == [0.0]  # a blank history has nothing to say
    assert len(set(scores[0].tolist())) == 3
    assert [len(row) for row in reranker.score([], [])] == []
    assert reranker.score([""], [["x"]])[0].tolist() == [0.0]


def test_a_score_is_the_logit_of_its_pair(reranker: Reranker):
    inputs = reranker.inputs([HISTORIES[0]], [CANDIDATES[0][0]])
    with torch.inference_mode():
        logit = reranker.model(**inputs).logits
    assert logit.shape == (1, 1)
    found = reranker.score(HISTORIES, CANDIDATES)[0][0]
    assert found == pytest.approx(logit.item(), abs=1e-6)


def test_pairs_are_told_apart_and_cut(reranker: Reranker):
    inputs = reranker.inputs(["war " * 100], ["love " * 100])
    assert inputs["input_ids"].shape == (1, 48)
    assert set(inputs["token_type_ids"][0].tolist()) == {0, 1}
    assert abs(inputs["token_type_ids"].float().mean().item() - 0.5) < 0.05


def test_the_batch_a_pair_is_in_does_not_matter(reranker: Reranker):
    together = reranker.score(HISTORIES, CANDIDATES)
    for batch_size in (1, 2):
        alone = reranker.score(HISTORIES, CANDIDATES, batch_size)
        np.testing.assert_allclose(np.concatenate(alone), np.concatenate(together), atol=1e-6)


def test_a_new_head_comes_from_the_seed_and_leaves_the_global_generator_alone(tiny_encoder: Path):
    state = torch.random.get_rng_state()
    heads = [
        Reranker.load(tiny_encoder, device="cpu", seed=s).model.classifier.weight for s in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].shape == (1, 32)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_it_starts_from_the_weights_of_the_encoder(tiny_encoder: Path, reranker: Reranker):
    encoder = Encoder.load(tiny_encoder, device="cpu")
    for name, weight in encoder.model.state_dict().items():
        assert torch.equal(weight, reranker.model.bert.state_dict()[name]), name


def test_save_and_load(reranker: Reranker, tmp_path: Path):
    reranker.save(tmp_path / "first")
    loaded = Reranker.load(tmp_path / "first", device="cpu", seed=99)
    assert loaded.config == reranker.config
    for before, after in zip(
        reranker.score(HISTORIES, CANDIDATES), loaded.score(HISTORIES, CANDIDATES), strict=True
    ):
        np.testing.assert_allclose(before, after, rtol=1e-6)
    assert (tmp_path / "first" / "model.safetensors").is_file()


def test_more_tokens_than_positions(reranker: Reranker):
    config = reranker.config.model_copy(update={"max_tokens": 129})
    with pytest.raises(ModelError, match="max_tokens = 129 is more than the 128 positions"):
        Reranker(reranker.model, reranker.tokenizer, config)


def test_bf16_tells_close_candidates_apart(reranker: Reranker, tmp_path: Path, monkeypatch):
    """A bf16 logit near 8 would be a multiple of 1/64: scores closer than that would tie."""
    torch.nn.init.constant_(reranker.model.classifier.bias, 8.0)
    try:
        reranker.save(tmp_path)
        exact = np.concatenate(reranker.score(HISTORIES, CANDIDATES))
    finally:
        torch.nn.init.constant_(reranker.model.classifier.bias, 0.0)
    monkeypatch.setattr("fusionrec.language.reranker.usable", lambda precision, *_, **__: precision)
    half = Reranker.load(tmp_path, device="cpu", precision=Precision.BF16)
    assert half.model.dtype == torch.bfloat16
    found = np.concatenate(half.score(HISTORIES, CANDIDATES))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, atol=0.02)
    assert np.abs(found[:3] * 64 - np.round(found[:3] * 64)).max() > 1e-2
    assert len(set(found[:3].tolist())) == 3


def test_bf16_is_loaded_only_where_it_is_fast(tiny_encoder: Path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    reranker = Reranker.load(tiny_encoder, device="cpu", precision=Precision.BF16)
    assert (reranker.precision, reranker.model.dtype) == (Precision.FP32, torch.float32)
