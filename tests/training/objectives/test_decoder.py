import math

import numpy as np
import pytest
import torch

from fusionrec.data.histories import Histories
from fusionrec.data.text import history_texts
from fusionrec.errors import ConfigError, ModelError
from fusionrec.evaluation.orders import order_sensitivity
from fusionrec.language.decoder import DecoderReranker, Prompt, answer_logits
from fusionrec.language.precision import Precision
from fusionrec.language.rankers import load_reranker
from fusionrec.language.reranker import Reranker
from fusionrec.training.objectives.decoder import DecoderSettings, DecoderTask
from fusionrec.training.objectives.settings import part
from fusionrec.training.task import drawn


@pytest.fixture
def make(tiny_decoder, catalogue, examples):
    def build(prompt: Prompt) -> tuple[DecoderTask, torch.nn.Module]:
        settings = DecoderSettings(encoder=str(tiny_decoder), max_tokens=96, prompt=prompt)
        task = DecoderTask(settings, catalogue, examples)
        return task, task.build_model()

    return build


@pytest.mark.parametrize(
    ("prompt", "expected"), [(Prompt.LETTERS, math.log(3)), (Prompt.YES_NO, math.log(2))]
)
def test_equal_logits_cost_what_chance_does(make, prompt, expected):
    task, model = make(prompt)
    torch.nn.init.zeros_(model.lm_head.weight)
    loss = task.loss(model, task.batch(np.arange(8)))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_answer_is_the_letter_of_what_came_next(make, catalogue, examples):
    task, _ = make(Prompt.LETTERS)
    (batch,) = task.plan(8, np.random.default_rng(0))
    tensors = task.batch(batch)
    decode = task._prompts.tokenizer.decode
    rows = drawn(batch, 8)[0]
    found = part(tensors, "prompt")
    prompts = [ids for piece in range(4) for ids in found[f"{piece}.input_ids"]]
    in_order = [prompts[place] for place in found["place"]]
    for row, ids, answer in zip(rows, in_order, tensors["answer"], strict=True):
        text = decode(ids)
        letters = text.split("next ?")[1]
        line = letters.split(" ABC"[answer + 1] + " .")[1].split(" .")[0].strip()
        assert catalogue.titles[examples.positives[row]] in line
    # Each epoch has an order of its own, and the same epoch always the same.
    again = task.plan(8, np.random.default_rng(0))[0]
    assert torch.equal(task.batch(again)["answer"], tensors["answer"])
    orders = [
        task.batch(np.sort(task.plan(8, np.random.default_rng(seed))[0] % 8 + 8 * seed))["answer"]
        for seed in range(4)
    ]
    assert len({tuple(order.tolist()) for order in orders}) > 1


def test_more_candidates_than_letters(tiny_decoder, catalogue, examples):
    many = examples.with_negatives(np.tile(examples.negatives, (1, 13)), 26)
    with pytest.raises(ConfigError, match="--num-negatives 25"):
        DecoderTask(DecoderSettings(encoder=str(tiny_decoder)), catalogue, many)


@pytest.mark.parametrize("prompt", Prompt)
def test_the_saved_model_scores_as_in_training(make, prompt, tmp_path):
    task, model = make(prompt)
    task.save(model, tmp_path)
    loaded = DecoderReranker.load(tmp_path, device="cpu")
    assert loaded.config.prompt is prompt
    history, items = "night music (music).", ["the love. film.", "space.", "war in space. film."]
    (scores,) = loaded.score([history], [items])
    prompts = loaded.prompts
    rows = (
        [prompts.letters(history, items)]
        if prompt is Prompt.LETTERS
        else [prompts.yes_no(history, item) for item in items]
    )
    inputs = prompts.tokenizer.pad(rows, return_tensors="pt")
    with torch.inference_mode():
        logits = answer_logits(loaded.model, inputs, prompts.answers)
    expected = logits[0, :3] if prompt is Prompt.LETTERS else logits[:, 0] - logits[:, 1]
    torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-4, atol=1e-5)


def test_scores_do_not_depend_on_the_batch_or_the_padding(make):
    for prompt in Prompt:
        task, model = make(prompt)
        reader = DecoderReranker(model.eval(), task._prompts.tokenizer, task._prompts.config)
        items = ["the love", "war in space night music", "space"]
        together = reader.score(["space", "the night music", " "], [items, items[:2], items])
        alone = reader.score(["the night music"], [items[:2]], batch_size=1)
        np.testing.assert_allclose(together[1], alone[0], rtol=1e-4, atol=1e-5)
        assert together[2].tolist() == [0.0, 0.0, 0.0]


def test_averaged_over_all_rotations_the_first_place_has_no_privilege(make):
    task, model = make(Prompt.LETTERS)
    config = task._prompts.config.model_copy(update={"orders": 3})
    items = ["the love", "war in space", "night music"]
    turned = [*items[1:], items[0]]
    for each, agrees in ((config, True), (task._prompts.config, False)):
        reader = DecoderReranker(model.eval(), task._prompts.tokenizer, each)
        first, second = reader.score(["space", "space"], [items, turned])
        assert np.allclose(np.roll(second, 1), first, rtol=1e-4, atol=1e-5) == agrees


def test_long_texts_are_cut_to_the_prompt(make):
    for prompt in Prompt:
        prompts = make(prompt)[0]._prompts
        long = "love " * 300
        row = prompts.letters(long, [long] * 5) if prompt is Prompt.LETTERS else None
        row = row or prompts.yes_no(long, long)
        assert len(row["input_ids"]) <= 96
        assert prompts.tokenizer.decode(row["input_ids"]).endswith("Answer :")


def test_an_encoder_is_no_decoder(tiny_encoder):
    with pytest.raises(ModelError, match="encoder"):
        DecoderReranker.load(tiny_encoder, device="cpu")


def test_a_pipeline_finds_out_which_reranker_it_has(make, tiny_encoder, tmp_path):
    task, model = make(Prompt.LETTERS)
    task.save(model, tmp_path / "decoder")
    Reranker.load(tiny_encoder, device="cpu").save(tmp_path / "cross-encoder")
    assert isinstance(load_reranker(tmp_path / "decoder"), DecoderReranker)
    assert isinstance(load_reranker(tmp_path / "cross-encoder"), Reranker)
    for name in ("decoder", "cross-encoder"):
        assert load_reranker(tmp_path / name, frozen=True).precision is Precision.FP32


def test_who_reads_lists_is_measured_by_their_order(make, catalogue, tmp_path):
    """A letters' prompt shows the model an order of the candidates, a yes-no prompt does not."""
    found = {}
    items = np.tile(np.arange(5, dtype=np.int32), (3, 1))
    histories = Histories.of([[5], [0, 5], [1, 2]])
    for prompt in Prompt:
        task, model = make(prompt)
        task.save(model, tmp_path / prompt)
        reranker = DecoderReranker.load(tmp_path / prompt, device="cpu")

        def score(asked, codes, reranker=reranker):
            texts = [[catalogue.titles[code] for code in row] for row in codes]
            return np.stack(reranker.score(history_texts(catalogue, asked), texts))

        assert reranker.reads_lists == (prompt is Prompt.LETTERS)
        found[prompt] = order_sensitivity(score, histories, items)
    assert found[Prompt.YES_NO].tau == pytest.approx(1, abs=0.05)
    assert found[Prompt.LETTERS].tau < 0.8
