import math

import numpy as np
import pytest
import torch

from fusionrec.errors import ConfigError
from fusionrec.training.losses.info_nce import info_nce
from fusionrec.training.mining import load_mined, mine
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
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


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


def test_popularity_correction_counts_what_is_expected(make, examples):
    task, _ = make(popularity_correction=True)
    correction = task._correction(torch.tensor([0, 4, -1]), torch.tensor([True, True, False]))
    counts = np.bincount(examples.seen.items, minlength=6) + 1
    expected = np.log(2 * counts[[0, 4]] / counts.sum())
    assert correction.tolist() == pytest.approx([*expected, 0.0], rel=1e-5)


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


def test_mined_items_are_negatives_and_are_kept(make, tmp_path):
    task, model = make(mined_negatives=2, mine_every=3)
    assert task.refresh_every == 3

    def forward(function, batch):
        with torch.no_grad():
            return function(model, batch)

    plain = task.loss(model, task.batch(ALL)).item()
    task.refresh(forward, tmp_path / "deep" / "mined.safetensors", 0)
    assert task.batch(ALL)["codes"].shape == (8 + 16,)
    assert task.loss(model, task.batch(ALL)).item() > plain
    assert len(task.describe(ALL[:1])[0]["mined"]) == 2
    again, _ = make(mined_negatives=2)
    again.restore(tmp_path / "deep" / "mined.safetensors")
    mined = load_mined(tmp_path / "deep" / "mined.safetensors")
    assert torch.equal(again.batch(ALL)["codes"], task.batch(ALL)["codes"])
    assert mined.shape == (8, 2)
