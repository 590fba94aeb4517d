"""Learned decays: the likelihood is that of the served scores, and its maximum the true decay."""

import itertools
import json

import numpy as np
import pytest
from pydantic import ValidationError

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.sources.decays import QUESTIONS, SHARE, Evidence, learn_decays
from fusionrec.sources.held_out import hold_out
from fusionrec.sources.item_item import ItemItem, ItemItemConfig
from fusionrec.sources.item_knn import ItemKNN
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.transitions import Transitions
from fusionrec.space import searched


def training(rows, num_items):
    empty = ("",) * num_items
    ids = tuple(map(str, range(num_items)))
    catalogue = Catalogue(ids, empty, empty, ((),) * num_items, empty)
    return TrainingData(catalogue, Histories.of(rows), has_timestamps=False)


@pytest.mark.parametrize(("decay", "recency"), [(0.5, 0.7), (0.9, 0.4)])
def test_the_true_decays_are_found(decay, recency):
    generator = np.random.default_rng(5)
    rows, every = generator.integers(0, 200, (1000, 10)), np.arange(200, dtype=np.int32)
    learner = Transitions(steps=10, decay=decay)
    config = ItemItemConfig(learner=learner, recency=recency, neighbours=200)
    source, histories = ItemItem(config).fit(training(rows, 200)), Histories.of(rows)
    chances = source.score(histories, np.tile(every, (1000, 1))).astype(np.float64)
    np.put_along_axis(chances, rows, 0, axis=1)
    chances /= chances.sum(axis=1, keepdims=True)
    # Each history goes on with an item that is as likely as its score is high.
    targets = [generator.choice(200, p=each) for each in chances]
    data = training(np.column_stack([rows, targets]), 200)
    found = learn_decays(learner.model_copy(update={"decay": "learned"}), "learned", data)
    assert found.decay == pytest.approx(decay, abs=0.06)
    assert found.recency == pytest.approx(recency, abs=0.06)


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(2)
    rows = [generator.integers(0, 12, generator.integers(2, 9)) for _ in range(120)]
    return training(rows, 12)


def test_the_likelihood_is_that_of_the_served_scores(data):
    learner = Transitions(steps=3, decay=0.6, from_power=0.3, to_power=0.2)
    evidence = Evidence.of(learner, data)
    left, histories, targets = hold_out(data, SHARE, QUESTIONS, seed=0)
    fitted = ItemItem(ItemItemConfig(learner=learner, recency=0.7, neighbours=12)).fit(
        TrainingData(data.catalogue, left)
    )
    every = np.arange(12, dtype=np.int32)
    scores = fitted.score(histories.newest(3), np.tile(every, (len(histories), 1)))
    popular, logs = np.bincount(left.items) / len(left.items), []
    for row, target in enumerate(targets.tolist()):
        scores[row, histories.newest(3).row(row)] = 0
        if scores[row, target] > 0 and target not in histories.row(row):
            share = scores[row, target] / scores[row].sum()
            logs.append(np.log(0.8 * share + 0.2 * popular[target]))
    assert evidence.num_questions == len(logs)
    assert 0 < len(logs) < len(targets)  # some were in the history
    assert evidence.log_likelihood(0.6, 0.7, 0.2) == pytest.approx(np.mean(logs), rel=1e-5)


def test_what_is_learned_is_the_most_likely(data):
    learner = Transitions(steps=3, decay="learned")
    evidence, some = Evidence.of(learner, data), np.linspace(0.05, 0.95, 10)

    def most(decays, recencies):
        return max(
            evidence.log_likelihood(*each) for each in itertools.product(decays, recencies, some)
        )

    found = learn_decays(learner, "learned", data)
    near = np.linspace(0, 0.99, 100)
    best = max(evidence.log_likelihood(found.decay, found.recency, each) for each in near)
    assert best >= most(some, some) - 1e-4
    kept = learn_decays(learner, 0.3, data)
    assert kept.recency == 0.3
    best = max(evidence.log_likelihood(kept.decay, 0.3, each) for each in near)
    assert best >= most(some, [0.3]) - 1e-4


def test_learned_decays_are_served(data, tmp_path):
    config = ItemItemConfig(learner=Transitions(decay="learned"), recency="learned")
    fitted = ItemItem(config).fit(data)
    fitted.save(tmp_path)
    learned = json.loads((tmp_path / "decays.json").read_text())
    assert fitted.config == ItemItem.load(tmp_path).config == config
    asked, every = Histories.of([[1, 5, 3], [2]]), np.tile(np.arange(12, dtype=np.int32), (2, 1))
    set_ = ItemItemConfig(learner=Transitions(decay=learned["decay"]), recency=learned["recency"])
    same = ItemItem(set_).fit(data)
    np.testing.assert_array_equal(fitted.score(asked, every), same.score(asked, every))
    np.testing.assert_array_equal(
        ItemItem.load(tmp_path).score(asked, every), same.score(asked, every)
    )
    same.save(tmp_path)
    assert not (tmp_path / "decays.json").exists()
    assert ItemItem.load(tmp_path).config == set_


def test_nothing_to_learn_from_leaves_the_start():
    found = learn_decays(Transitions(decay="learned"), "learned", training([[0, 1]], 2))
    assert (found.decay, found.recency) == (0.8, 0.5)


def test_what_is_learned_is_not_searched():
    config = ItemItemConfig(learner=Transitions(decay="learned"), recency=0.5)
    assert set(searched(config)) & {"learner.decay", "recency"} == {"recency"}


def test_only_transitions_learn():
    with pytest.raises(ValidationError, match="only transitions learn it, item-knn does not"):
        ItemItemConfig(learner=ItemKNN(), recency="learned")
