"""What RecVAE answers where the answer is known; the contract of sources is in test_contract."""

import subprocess
import sys

import numpy as np
import pytest

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.sources.autoencoder.config import RecVAEConfig
from fusionrec.sources.protocol import Iterative, TrainingData
from fusionrec.sources.recvae import RecVAE

NUM_ITEMS, NUM_GROUPS = 24, 4
SMALL = RecVAEConfig(
    factors=8, hidden=16, num_layers=2, learning_rate=0.02, epochs=12, patience=12, held_out=0.05
)
BRIEF = SMALL.model_copy(update={"epochs": 3, "held_out": 1e-6})
"""For what does not depend on how much was learned. Nothing is held out: the last epoch counts."""


def groups(num_items=NUM_ITEMS) -> TrainingData:
    """Users who choose five of the six items of their group."""
    generator = np.random.default_rng(0)
    rows = [
        generator.permutation(np.arange(user % NUM_GROUPS, NUM_ITEMS, NUM_GROUPS))[:5]
        for user in range(120)
    ]
    empty = ("",) * num_items
    ids = tuple(map(str, range(num_items)))
    return TrainingData(Catalogue(ids, empty, empty, ((),) * num_items, empty), Histories.of(rows))


@pytest.fixture(scope="module")
def brief():
    return RecVAE(BRIEF).fit(groups())


def test_what_a_group_chooses_is_found_also_for_histories_never_seen():
    source = RecVAE(SMALL).fit(groups())
    histories = Histories.of([[0, 4], [5, 1], [2], [7, 3, 11]])
    found = source.top(histories, 3).items
    assert (found % NUM_GROUPS == np.arange(NUM_GROUPS)[:, None]).all()


def test_the_numpy_twin_says_what_torch_says(brief):
    import torch

    from fusionrec.sources.autoencoder.model import Encoder
    from fusionrec.sources.autoencoder.training import _tensors, bags

    histories = Histories.of([[0, 4, 8], [1], [2, 3, 2]])
    encoder = Encoder(BRIEF, NUM_ITEMS)
    state = {name: torch.from_numpy(value) for name, value in brief._parameters.items()}
    state["first.weight"] = torch.from_numpy(brief._first)
    encoder.load_state_dict(state, strict=False)
    with torch.no_grad():
        mean, _ = encoder(_tensors(bags(histories, BRIEF.recency, NUM_ITEMS)))
    np.testing.assert_allclose(brief._encode(histories)[:, :-1], mean.numpy(), atol=1e-5)


def test_a_density_is_a_density():
    import torch

    from fusionrec.sources.autoencoder.model import log_normal

    x = torch.linspace(-9, 11, 2001)
    mean, log_variance = torch.tensor(1.0), torch.tensor(0.5)
    expected = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance)).log_prob(x)
    torch.testing.assert_close(log_normal(x, mean, log_variance), expected)


def test_the_newest_item_weighs_most(brief):
    one, other = brief.score(Histories.of([[0, 1], [1, 0]]), np.array([[4], [4]], np.int32))
    assert one[0] != other[0]


def test_steps_end_with_what_a_fit_gives_and_leave_the_global_generator_alone(brief):
    import torch

    before = torch.random.get_rng_state()
    source = RecVAE(BRIEF)
    assert isinstance(source, Iterative)
    assert source.epochs == 3
    steps = list(source.fit_in_steps(groups(), (1, 99)))
    assert torch.equal(torch.random.get_rng_state(), before)
    found = [step.top(Histories.of([[0, 4]]), 5).scores for step in steps]
    assert len(found) == 2
    np.testing.assert_array_equal(found[1], brief.top(Histories.of([[0, 4]]), 5).scores)
    assert (found[0] != found[1]).any()


def test_an_item_without_events_is_never_found_nor_heeded():
    source = RecVAE(BRIEF).fit(groups(NUM_ITEMS + 1))
    top = source.top(Histories.of([[1, 2], [1, 2, NUM_ITEMS], [NUM_ITEMS]]), NUM_ITEMS)
    assert NUM_ITEMS not in top.items
    assert (top.items[1] >= 0).any()
    assert (top.items[2] == -1).all()


def test_histories_of_one_event_teach_nothing():
    alone = TrainingData(groups().catalogue, Histories.of([[1], [2], []]))
    assert (RecVAE(SMALL).fit(alone).top(Histories.of([[1, 2]]), 3).items == -1).all()


def test_serving_needs_no_torch(brief, tmp_path):
    brief.save(tmp_path)
    code = f"""
import sys
from pathlib import Path
from fusionrec.data.histories import Histories
from fusionrec.sources.recvae import RecVAE
top = RecVAE.load(Path({str(tmp_path)!r})).top(Histories.of([[0, 4]]), 3)
assert (top.items >= 0).any()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
