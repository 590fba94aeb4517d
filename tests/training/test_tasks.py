import numpy as np
import pytest
import torch

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.language.encoder import Encoder
from fusionrec.language.reranker import Reranker
from fusionrec.training import pieces, weights
from fusionrec.training.config import LoraSettings, Method, TrainingConfig
from fusionrec.training.examples import Examples
from fusionrec.training.objectives.encoder import EncoderSettings, among
from fusionrec.training.objectives.settings import part
from fusionrec.training.tasks import OBJECTIVES, load_task, save_task

WORDS = ["the love", "war in space", "night music", "book of the night", "film and love", "space"]
CATALOGUE = Catalogue(
    item_ids=tuple("abcdef"),
    titles=tuple(WORDS),
    texts=("",) * 6,
    categories=(("film",), ("film",), ("music",), ("book",), ("film",), ()),
    domains=("",) * 6,
)
TRAIN = Histories.of([[0, 1, 2], [3, 4, 5], [5, 0, 3], [1, 2, 4]])


@pytest.fixture(params=["encoder", "reranker"])
def task(request, tiny_encoder, tmp_path):
    examples = Examples.of(TRAIN, per_user=2, limit=99, generator=np.random.default_rng(0))
    if request.param == "reranker":
        candidates = np.tile(np.arange(6, dtype=np.int32), (len(examples), 1))
        examples = examples.with_negatives(candidates, 2)
    kind = OBJECTIVES[request.param].settings
    settings = kind(encoder=str(tiny_encoder), max_tokens=32, history_items=2)
    save_task(request.param, settings, CATALOGUE, examples, tmp_path)
    return load_task(tmp_path)


def logits(task, model):
    batch = task.batch(np.arange(3))
    if task.name == "reranker":
        pairs = part(batch, "pair")
        return pieces.joined(lambda own: model(input_ids=own["input_ids"]).logits, pairs)
    return model(input_ids=batch["packed.input_ids"]).last_hidden_state


def test_overfits_a_handful_of_examples(task):
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    (examples,) = task.plan(100, np.random.default_rng(0))
    assert sorted(examples) == list(range(8))
    losses = []
    for _ in range(25):
        loss = task.loss(model, task.batch(examples))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_saved_model_is_loaded_by_the_library(task, tmp_path):
    model = task.build_model().eval()
    task.save(model, tmp_path / "model")
    kind = Encoder if task.name == "encoder" else Reranker
    loaded = kind.load(tmp_path / "model", device="cpu")
    assert loaded.config.max_tokens == 32
    assert loaded.config.history_items == 2
    with torch.inference_mode():
        # Of few rows, how they are multiplied depends on where in memory they lie.
        torch.testing.assert_close(
            logits(task, loaded.model), logits(task, model), rtol=1e-6, atol=1e-7
        )


def test_description_names_the_texts(task):
    task.build_model()
    (row,) = task.describe(np.array([1]))
    assert row["history"] == "war in space (film); the love (film)."
    assert row["item"] == "night music. music."
    if task.name == "reranker":
        assert len(row["negatives"]) == 2


def test_items_that_the_user_had_are_no_negatives(tiny_encoder, tmp_path):
    examples = Examples.of(TRAIN, per_user=2, limit=99, generator=np.random.default_rng(0))
    save_task("encoder", EncoderSettings(encoder=str(tiny_encoder)), CATALOGUE, examples, tmp_path)
    task = load_task(tmp_path)
    task.build_model()
    batch = task.batch(np.array([0, 1, 2]))
    had = among(batch["seen"], batch["codes"])  # items 1 and 2 of user 0, item 4 of user 1
    assert had.tolist() == [[True, True, False], [True, True, False], [False, False, True]]


# peft reads an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("method", [Method.LORA, Method.DORA])
def test_merged_adapters_answer_like_the_adapted_model(task, method):
    config = TrainingConfig(method=method, lora=LoraSettings(rank=4, alpha=8))
    adapted = weights.with_adapters(task.build_model(), task, config).eval()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    for name in trained:
        assert "lora_" in name or any(part in task.head for part in name.split("."))
    assert any("classifier" in name for name in trained) == (task.name == "reranker")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        full = {n: t.detach().clone() for n, t in adapted.named_parameters()}
        full |= {n: t.detach().clone() for n, t in adapted.named_buffers()}
        merged = weights.merged(full, task, config)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        torch.testing.assert_close(
            logits(task, merged), logits(task, adapted), rtol=1e-4, atol=1e-5
        )
        assert not torch.allclose(logits(task, merged), logits(task, task.build_model().eval()))


def test_a_folder_is_found_from_wherever_a_worker_runs(tiny_encoder, tmp_path, monkeypatch):
    examples = Examples.of(TRAIN, per_user=1, limit=9, generator=np.random.default_rng(0))
    monkeypatch.chdir(tiny_encoder.parent)
    save_task("encoder", EncoderSettings(encoder=tiny_encoder.name), CATALOGUE, examples, tmp_path)
    monkeypatch.chdir(tmp_path)
    load_task(tmp_path).build_model()
