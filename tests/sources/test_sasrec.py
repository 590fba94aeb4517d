"""What SASRec answers where the answer is known; the contract of sources is in test_contract."""

import subprocess
import sys

import numpy as np
import pytest

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.sources.protocol import Iterative, TrainingData
from fusionrec.sources.sasrec import SASRec, SASRecConfig

NUM_ITEMS = 20
SMALL = SASRecConfig(
    width=16,
    num_heads=2,
    num_blocks=1,
    dropout=0,
    num_negatives=8,
    learning_rate=0.02,
    max_length=8,
    epochs=30,
    patience=30,
)
BRIEF = SMALL.model_copy(update={"epochs": 4})
"""For what does not depend on how much was learned."""


def chain(seed=0, num_items=NUM_ITEMS, vectors=None) -> tuple[TrainingData, np.ndarray]:
    """Histories in which the next item is a function of the last; and that function."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(num_items)
    following = np.roll(order, -1)[np.argsort(order)]
    starts, lengths = generator.integers(num_items, size=150), generator.integers(2, 10, size=150)
    rows = [
        order[(start + np.arange(length)) % num_items]
        for start, length in zip(starts, lengths, strict=True)
    ]
    empty = ("",) * num_items
    ids = tuple(map(str, range(num_items)))
    catalogue = Catalogue(ids, empty, empty, ((),) * num_items, empty)
    return TrainingData(catalogue, Histories.of(rows), item_vectors=vectors), following


def asked(following, length=3) -> Histories:
    """One history for each item, which is the last of it."""
    before = np.argsort(following)
    rows = [np.arange(len(following))]
    while len(rows) < length:
        rows.insert(0, before[rows[0]])
    return Histories.of(np.stack(rows, axis=1))


@pytest.mark.parametrize("block", ["sasrec", "ligr"])
@pytest.mark.parametrize("num_negatives", [8, NUM_ITEMS])
def test_the_next_item_follows_from_the_last(block, num_negatives):
    data, following = chain()
    config = SMALL.model_copy(update={"block": block, "num_negatives": num_negatives})
    top = SASRec(config).fit(data).top(asked(following), 1)
    np.testing.assert_array_equal(top.items[:, 0], following)


def test_the_newest_events_are_read_of_a_long_history():
    data, following = chain()
    source = SASRec(BRIEF).fit(data)
    candidates = np.tile(np.arange(NUM_ITEMS, dtype=np.int32), (NUM_ITEMS, 1))
    short, long = asked(following, length=8), asked(following, length=11)
    np.testing.assert_array_equal(source.score(short, candidates), source.score(long, candidates))


def test_a_seed_decides_everything():
    data, following = chain()
    histories = asked(following)
    first, again = (SASRec(BRIEF).fit(data).top(histories, 5) for _ in range(2))
    np.testing.assert_array_equal(first.scores, again.scores)
    other = SASRec(BRIEF.model_copy(update={"seed": 1})).fit(data).top(histories, 5)
    assert (other.scores != first.scores).any()


def test_fitting_leaves_the_global_generator_alone():
    import torch

    before = torch.random.get_rng_state()
    SASRec(SMALL.model_copy(update={"epochs": 1})).fit(chain()[0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_steps_end_with_what_a_fit_gives():
    data, following = chain()
    source = SASRec(BRIEF)
    assert isinstance(source, Iterative)
    assert source.epochs == 4
    steps = list(source.fit_in_steps(data, (1, 2, 99)))
    assert len(steps) == 3
    found = [step.top(asked(following), 5).scores for step in steps]
    np.testing.assert_array_equal(found[-1], source.fit(data).top(asked(following), 5).scores)
    assert (found[0] != found[-1]).any()


def test_save_and_load(tmp_path):
    data, following = chain()
    fitted = SASRec(BRIEF).fit(data)
    fitted.save(tmp_path / "sasrec")
    again = SASRec.load(tmp_path / "sasrec")
    assert again.config == BRIEF
    for histories in (asked(following), Histories.of([[], [3]])):
        before, after = fitted.top(histories, 6), again.top(histories, 6)
        np.testing.assert_array_equal(before.items, after.items)
        np.testing.assert_array_equal(before.scores, after.scores)


def test_serving_needs_no_torch(tmp_path):
    SASRec(SMALL.model_copy(update={"epochs": 1})).fit(chain()[0]).save(tmp_path)
    code = f"""
import sys
from pathlib import Path
from fusionrec.data.histories import Histories
from fusionrec.sources.sasrec import SASRec
top = SASRec.load(Path({str(tmp_path)!r})).top(Histories.of([[1, 2]]), 3)
assert (top.items >= 0).any()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_item_without_events_is_never_found_nor_heeded():
    data, _ = chain()
    empty = ("",) * (NUM_ITEMS + 1)
    ids = tuple(map(str, range(NUM_ITEMS + 1)))
    more = TrainingData(Catalogue(ids, empty, empty, ((),) * len(ids), empty), data.histories)
    source = SASRec(BRIEF).fit(more)
    top = source.top(Histories.of([[1, 2], [1, NUM_ITEMS, 2], [NUM_ITEMS]]), NUM_ITEMS)
    assert NUM_ITEMS not in top.items
    np.testing.assert_array_equal(top.scores[0], top.scores[1])
    assert (top.items[2] == -1).all()


def test_an_item_with_text_alone_is_found_beside_those_it_is_like():
    # Every item has a text of its own, but the last, which nobody had yet, has that of another.
    data, following = chain()
    texts = np.eye(NUM_ITEMS + 1, NUM_ITEMS, dtype=np.float32)
    twin = int(following[4])
    texts[NUM_ITEMS] = texts[twin]
    empty = ("",) * (NUM_ITEMS + 1)
    ids = tuple(map(str, range(NUM_ITEMS + 1)))
    catalogue = Catalogue(ids, empty, empty, ((),) * len(ids), empty)
    more = TrainingData(catalogue, data.histories, item_vectors=texts)
    histories = asked(following).slice(4, 5)
    found = SASRec(SMALL).fit(more).top(histories, 2).items[0]
    assert set(found.tolist()) == {twin, NUM_ITEMS}
    blind = SASRec(SMALL.model_copy(update={"text": False})).fit(more).top(histories, NUM_ITEMS)
    assert NUM_ITEMS not in blind.items


def test_histories_of_one_event_teach_nothing():
    data, _ = chain()
    alone = TrainingData(data.catalogue, Histories.of([[1], [2], []]))
    assert (SASRec(SMALL).fit(alone).top(Histories.of([[1, 2]]), 3).items == -1).all()
