import math

import numpy as np
import pytest
import torch

from fusionrec.errors import ConfigError, TrainingError
from fusionrec.language.encoder import Encoder
from fusionrec.training.objectives.pretraining import PretrainingSettings, PretrainingTask


@pytest.fixture
def make(still_encoder, tiny_decoder, catalogue):
    def build(
        kind: str, max_tokens: int = 12, reviews: tuple[str, ...] = (), **settings
    ) -> PretrainingTask:
        folder = {"encoder": still_encoder, "decoder": tiny_decoder}[kind]
        chosen = PretrainingSettings(encoder=str(folder), max_tokens=max_tokens, **settings)
        return PretrainingTask(chosen, catalogue, reviews)

    return build


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_equal_logits_cost_the_logarithm_of_the_vocabulary(make, kind):
    task = make(kind)
    model = task.build_model()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    loss = task.loss(model, task.batch(np.arange(2)))
    assert loss.item() == pytest.approx(math.log(model.config.vocab_size), rel=1e-5)


def test_blocks_are_the_joined_texts(make):
    task = make("decoder", max_tokens=8)
    batch = task.batch(np.arange(2))
    assert torch.equal(batch["input_ids"], batch["labels"])
    text = task._tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("the love . film . </s> war")


def test_reviews_stand_behind_the_catalogue(make):
    plain, read = (make("decoder", max_tokens=8, reviews=r) for r in ((), ("love " * 7, "war")))
    count = plain._count
    assert read._count == count + 1
    assert (read._blocks[:count] == plain._blocks).all()
    assert read._tokenizer.decode(read._blocks[count]).endswith("love love love")
    assert read.identity["examples"] != plain.identity["examples"]


def test_masks_hit_their_share_and_only_what_is_hit_is_guessed(make):
    task = make("encoder", mask_share=0.5)
    task._blocks = np.tile(np.arange(5, 69), (200, 1))  # letters and digits
    seen, chosen = task._mask(task._blocks.ravel(), np.random.default_rng(0))
    original = task._blocks.ravel()
    mask = task._tokenizer.mask_token_id
    assert chosen.mean() == pytest.approx(0.5, abs=0.02)
    assert (seen[~chosen] == original[~chosen]).all()
    assert (seen[chosen] == mask).mean() == pytest.approx(0.8, abs=0.02)
    assert (seen[chosen] == original[chosen]).mean() == pytest.approx(0.1, abs=0.02)
    batch = task.batch(np.array([3]))
    guessed = batch["labels"] != -100
    assert torch.equal(batch["labels"][guessed], torch.arange(5, 69)[guessed[0]])


def test_masks_change_with_the_epoch_and_not_with_the_batch(make):
    task = make("encoder", mask_share=0.5)
    count = len(task._blocks)
    same = [task.batch(np.array(rows))["input_ids"][0] for rows in ([1], [1, 0])]
    assert torch.equal(*same)
    assert not torch.equal(same[0], task.batch(np.array([1 + 7 * count]))["input_ids"][0])


def test_special_tokens_are_never_guessed(make):
    task = make("encoder", mask_share=0.99)
    batch = task.batch(np.arange(len(task._blocks)))
    separators = torch.from_numpy(task._blocks) == task._tokenizer.sep_token_id
    assert separators.any()
    assert (batch["labels"][separators] == -100).all()


def test_the_encoder_starts_from_what_was_saved(make, tmp_path):
    task = make("encoder")
    model = task.build_model()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.add_(1.0)
    task.save(model, tmp_path)
    loaded = Encoder.load(tmp_path, device="cpu")
    weight = loaded.model.embeddings.word_embeddings.weight
    assert torch.equal(weight, model.bert.embeddings.word_embeddings.weight)
    assert loaded.config.pooling == "mean"


def test_too_little_text(make):
    with pytest.raises(TrainingError, match="--max-tokens"):
        make("encoder", max_tokens=4096)


def test_next_sentence_costs_one_bit_more_where_nothing_is_known(make):
    task = make("encoder", max_tokens=32, next_sentence=True)
    model = task.build_model()
    for head in (model.get_output_embeddings(), model.cls.seq_relationship):
        torch.nn.init.zeros_(head.weight)
    loss = task.loss(model, task.batch(np.arange(4)))
    expected = math.log(model.config.vocab_size) + math.log(2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert model.bert.pooler.dense.weight.grad is not None


def test_a_pair_is_an_item_s_own_or_half_another_s(make):
    task = make("encoder", max_tokens=64, next_sentence=True)
    # "space." alone is one sentence; the others have a title and a category.
    assert task._pairs[0] == ("the love.", "film.")
    assert task._count == 5
    batch = task.batch(np.tile(np.arange(5), 200) + 5 * np.arange(1000))
    assert batch["other"].float().mean().item() == pytest.approx(0.5, abs=0.05)
    guessed = batch["labels"] != -100
    ids = torch.where(guessed, batch["labels"], batch["input_ids"])
    rows = [task._tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    for row, position, other in zip(rows, np.tile(np.arange(5), 200), batch["other"], strict=True):
        first, second = task._pairs[position]
        assert row.startswith(first.removesuffix("."))
        assert (row.replace(" .", ".") == f"{first} {second}") == (not other)
    assert (batch["token_type_ids"] * batch["attention_mask"]).sum() > 0
    assert task.describe(np.array([0]))[0]["text"].startswith("the love")


def test_reviews_make_pairs_too(make):
    task = make("encoder", max_tokens=64, next_sentence=True, reviews=("I love it. War!", "No."))
    assert task._pairs[-1] == ("I love it.", "War!")
    assert task._count == 6


def test_a_second_part_that_all_share_is_never_another_s(make):
    task = make("encoder", max_tokens=64, next_sentence=True)
    task._pairs = [(first, "film.") for first, _ in task._pairs]
    assert not task.batch(np.arange(20))["other"].any()


def test_an_encoder_is_made_of_what_learned_pairs(make, tmp_path):
    task = make("encoder", max_tokens=32, next_sentence=True)
    model = task.build_model()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.add_(1.0)
    task.save(model, tmp_path)
    loaded = Encoder.load(tmp_path, device="cpu").model
    weight = model.bert.embeddings.word_embeddings.weight
    assert torch.equal(loaded.embeddings.word_embeddings.weight, weight)


def test_who_cannot_compare_sentences(make):
    with pytest.raises(ConfigError, match="leave --next-sentence out"):
        make("decoder", next_sentence=True)
