import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from fusionrec.errors import ConfigError
from fusionrec.language.encoder import Encoder
from fusionrec.training import weights
from fusionrec.training.config import Method, TrainingConfig
from fusionrec.training.losses.info_nce import info_nce
from fusionrec.training.mining import mine
from fusionrec.training.objectives.encoder import EncoderSettings, EncoderTask, among

ALL = np.arange(8)


@pytest.fixture
def make(still_encoder, catalogue, examples):
    def build(**settings) -> tuple[EncoderTask, torch.nn.Module]:
        chosen = EncoderSettings(encoder=str(still_encoder), max_tokens=32, **settings)
        task = EncoderTask(chosen, catalogue, examples)
        return task, task.build_model()

    return build


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.ravel() for p in model.parameters() if p.grad is not None])


def test_loss_is_info_nce_over_the_batch(make):
    task, model = make()
    batch = task.batch(ALL)
    # A high temperature makes all cosines equal: the loss counts the items that are no mask.
    flat, _ = make(temperature=1e9)
    flat._tokenizer, flat._config = task._tokenizer, task._config
    had = among(batch["seen"], batch["codes"])
    counts = (~had).sum(dim=1) + 1
    assert flat.loss(model, batch).item() == pytest.approx(counts.log().mean().item(), rel=1e-5)


def test_among():
    seen = torch.tensor([[1, 4, 9], [2, 5, 2**62]])
    codes = torch.tensor([4, 5, -1])
    assert among(seen, codes).tolist() == [[True, False, False], [False, True, False]]


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_gradcache_changes_neither_loss_nor_gradient(make, chunk):
    found = []
    for grad_cache in (None, chunk):
        task, model = make(grad_cache=grad_cache)
        loss = task.loss(model, task.batch(ALL))
        loss.backward()
        found.append((loss.item(), gradients(model)))
    (whole, expected), (cached, gradient) = found
    assert cached == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_gradcache_holds_the_activations_of_one_chunk(make):
    def saved(grad_cache: int | None) -> int:
        task, model = make(grad_cache=grad_cache)
        batch, total = task.batch(ALL), 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            task.loss(model, batch)
        return total

    assert saved(2) < 0.1 * saved(None)


def test_matryoshka_is_the_mean_over_beginnings(make):
    task, model = make(dimensions=(8, 16))
    batch = task.batch(ALL)
    histories, items = task._towers(model, batch)
    had = among(batch["seen"], batch["codes"])
    losses = []
    for size in (32, 8, 16):
        cuts = [torch.nn.functional.normalize(v[:, :size], dim=1) for v in (histories, items)]
        losses.append(info_nce(*cuts, had).item())
    assert task.loss(model, batch).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_dimension_that_the_model_lacks(make):
    with pytest.raises(ConfigError, match="32 dimensions"):
        make(dimensions=(32,))


def test_popularity_correction_counts_what_is_expected(make):
    """Of 12 events item 0 has four and item 4 two; to each of the six items one is added."""
    task, _ = make(popularity_correction=True)
    correction = task._correction(torch.tensor([0, 4, -1]), torch.tensor([True, True, False]))
    expected = [math.log(2 * 5 / 18), math.log(2 * 3 / 18), 0.0]
    assert correction.tolist() == pytest.approx(expected, rel=1e-5)


def test_mining_finds_the_nearest_that_the_user_never_had(examples):
    # Items on a line; every history points along it, so that the last items are nearest.
    items = torch.nn.functional.normalize(
        torch.tensor([[math.cos(a), math.sin(a)] for a in np.linspace(1.5, 0, 6)]), dim=1
    )
    queries = torch.tensor([[1.0, 0.0]]).expand(8, 2)
    with_text = np.array([True] * 5 + [False])
    mined = mine(queries, items, examples, with_text, count=1, nearest=1, seed=0)
    for row, (code,) in enumerate(mined):
        unseen = set(range(5)) - set(examples.seen.row(int(examples.users[row])).tolist())
        assert code == max(unseen)
    more = mine(queries, items, examples, with_text, count=4, nearest=4, seed=0)
    assert all(set(row[row < 0]) <= {-1} for row in more)
    assert sorted(more[0].tolist()) == [-1, -1, 3, 4]


def test_mined_items_are_negatives_and_are_kept(make):
    task, model = make(mined_negatives=2, mine_every=3)
    assert task.refresh_every == 3

    def forward(function, batch):
        with torch.no_grad():
            return function(model, batch)

    plain = task.loss(model, task.batch(ALL)).item()
    task.refresh(forward, 0)
    assert task.batch(ALL)["codes"].shape == (8 + 16,)
    assert task.loss(model, task.batch(ALL)).item() > plain
    assert len(task.describe(ALL[:1])[0]["mined"]) == 2
    again, _ = make(mined_negatives=2)
    again.restore(task.chosen())
    assert torch.equal(again.batch(ALL)["codes"], task.batch(ALL)["codes"])
    assert task.chosen()["mined"].shape == (8, 2)


def test_two_towers_start_equal_and_part(make):
    one, whole = make()
    two, towers = make(towers=2)
    batch = two.batch(ALL)
    assert batch.keys() >= {"history.text", "item.text"}
    loss = two.loss(towers, batch)
    expected = one.loss(whole, one.batch(ALL))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    # What one tower learns from both sides, two learn from one each.
    name = "encoder.layer.0.attention.self.query.weight"
    gradients = [towers[tower].get_parameter(name).grad for tower in ("history", "item")]
    torch.testing.assert_close(sum(gradients), whole.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("settings", [{"grad_cache": 3}, {"mined_negatives": 1}])
def test_each_tower_reads_its_side(make, settings):
    """The towers differ: what reads the wrong one gives another loss."""
    task, model = make(towers=2, **settings)
    plain, _ = make(towers=2)
    with torch.no_grad():
        model["item"].embeddings.word_embeddings.weight.neg_()
        if task.refresh_every:
            task.refresh(lambda f, b: f(model, b), 0)
            plain._mined = task._mined
        assert task.loss(model, task.batch(ALL)).item() == pytest.approx(
            plain.loss(model, plain.batch(ALL)).item(), rel=1e-5
        )


# peft reads an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_two_towers_are_saved_side_by_side(make, tmp_path):
    task, model = make(towers=2)
    config = TrainingConfig(method=Method.LORA)
    adapted = weights.with_adapters(model, task, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and ".item." in name:
                parameter.add_(0.05)
    full = {name: tensor.detach().clone() for name, tensor in adapted.named_parameters()}
    full |= {name: tensor.detach().clone() for name, tensor in adapted.named_buffers()}
    task.save(weights.merged(full, task, config), tmp_path)
    texts = ["war in space", "the love"]
    histories = Encoder.load(tmp_path, device="cpu")
    items = Encoder.load(tmp_path, device="cpu", items=True)
    adapted.eval()
    for loaded, tower in ((histories, "history"), (items, "item")):
        with torch.no_grad():
            expected = task._encode(adapted, loaded.inputs(texts), tower).numpy()
        np.testing.assert_allclose(loaded.encode(texts), expected, atol=1e-5)
    assert np.abs(histories.encode(texts) - items.encode(texts)).max() > 0.001
    # A new run starts from both.
    again = EncoderTask(
        EncoderSettings(encoder=str(tmp_path), towers=2), task._catalogue, task._examples
    )
    assert again.identity["weights"].keys() == {"model.safetensors", "item/model.safetensors"}
    torch.testing.assert_close(
        again.build_model()["item"].state_dict(), items.model.state_dict(), rtol=0, atol=0
    )
    # One tower alone starts from none of them but where it is named.
    for folder, lost in ((tmp_path, True), (tmp_path / "item", False)):
        alone = EncoderSettings(encoder=str(folder))
        with pytest.raises(ConfigError, match="--towers 2") if lost else nullcontext():
            EncoderTask(alone, task._catalogue, task._examples).build_model()
