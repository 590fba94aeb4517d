"""Known answers of the item-item learners, and independent implementations of them."""

import numpy as np
import pytest
import scipy.sparse as sp

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.errors import DataError
from fusionrec.sources.ease import EASE
from fusionrec.sources.item_item import ItemItem, ItemItemConfig
from fusionrec.sources.item_knn import ItemKNN
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.transitions import Transitions


def training(rows, num_items):
    empty = ("",) * num_items
    ids = tuple(map(str, range(num_items)))
    return TrainingData(Catalogue(ids, empty, empty, ((),) * num_items, empty), Histories.of(rows))


@pytest.fixture(scope="module")
def random_data():
    generator = np.random.default_rng(1)
    rows = [generator.choice(30, generator.integers(2, 9), replace=False) for _ in range(80)]
    return training(rows, 30)


def test_ease_is_the_closed_form(random_data):
    seen = np.zeros((80, 30))
    seen[random_data.histories.rows, random_data.histories.items] = 1
    inverse = np.linalg.inv(seen.T @ seen + 7 * np.eye(30))
    expected = -inverse / np.diag(inverse)
    np.fill_diagonal(expected, 0)
    found = EASE(regularisation=7).learn(random_data, neighbours=30).matrix.toarray()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_ease_leaves_cold_items_out():
    found = EASE().learn(training([[0, 1], [1, 0]], 5), neighbours=5).matrix.toarray()
    assert found[:2, :2].any()
    assert not found[2:].any()
    assert not found[:, 2:].any()


def test_sparse_ease_refuses_more_pairs_than_it_may_hold(random_data):
    with pytest.raises(DataError, match=r"ease.max_pairs = 9, .* use the source item-knn or tra"):
        EASE(max_items=29, max_pairs=9).learn(random_data, neighbours=5)
    assert EASE(max_items=30, max_pairs=9).can_solve(random_data.histories)


def test_sparse_ease_on_all_items_is_the_dense_one():
    generator = np.random.default_rng(1)
    sizes = generator.integers(8, 20, 80)
    data = training([generator.choice(30, size, replace=False) for size in sizes], 30)
    dense = EASE().learn(data, neighbours=30).matrix.toarray()
    sparse = EASE(max_items=29).learn(data, neighbours=30).matrix.toarray()
    np.testing.assert_allclose(sparse, dense, atol=1e-5)


def test_sparse_ease_loses_nothing_between_groups_that_never_meet():
    generator = np.random.default_rng(3)
    sizes = generator.integers(2, 6, 240)
    rows = [5 * (n % 6) + generator.choice(5, size, replace=False) for n, size in enumerate(sizes)]
    data = training(rows, 31)  # the last item is cold
    dense = EASE(regularisation=3).learn(data, neighbours=30).matrix.toarray()
    sparse = EASE(regularisation=3, max_items=1, support=4).learn(data, neighbours=30)
    np.testing.assert_allclose(sparse.matrix.toarray(), dense, atol=1e-5)


def test_sparse_ease_regresses_on_what_tells_most():
    # Item 0 is met twice with item 1, which is met four times, and twice with 2, met twice.
    rows = [[0, 1, 2], [0, 1, 2], [1, 3], [1, 3], [4]]
    found = EASE(regularisation=1, max_items=1, support=1).learn(training(rows, 5), neighbours=5)
    weights = found.matrix.toarray()
    assert weights[:, 0].tolist() == pytest.approx([0, 0, 2 / 3, 0, 0])
    assert weights[:, 3].tolist() == pytest.approx([0, 2 / 5, 0, 0, 0])
    assert not weights[:, 4].any()


@pytest.mark.filterwarnings("ignore:Method expects CSR input")
@pytest.mark.parametrize(
    ("peer", "settings"),
    [
        ("CosineRecommender", {"power": 0.5, "length_power": 0}),
        ("TFIDFRecommender", {"power": 0.5, "weighting": "idf"}),
        ("BM25Recommender", {"similarity": "bm25", "weighting": "idf", "k1": 1.2, "b": 0.75}),
    ],
)
def test_item_knn_is_that_of_implicit(random_data, peer, settings):
    from implicit import nearest_neighbours

    histories = random_data.histories
    ones = np.ones(len(histories.items))
    matrix = sp.csr_matrix((ones, (histories.rows, histories.items)), shape=(80, 30))
    model = getattr(nearest_neighbours, peer)(K=30, num_threads=1)
    model.fit(matrix, show_progress=False)
    expected = model.similarity.toarray()
    np.fill_diagonal(expected, 0)
    found = ItemKNN(**settings, shrinkage=0).learn(random_data, 30).matrix.toarray()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "to_second", "to_first"),
    [
        ({"similarity": "cosine", "power": 0.5}, 2 / 8**0.5, 2 / 8**0.5),
        ({"similarity": "asymmetric-cosine", "power": 0.75}, 2**-0.75, 2**-0.25),
        ({"similarity": "conditional", "power": 0.5}, 2 / (4 * 2**0.5), 2 / (2 * 4**0.5)),
        ({"similarity": "conditional", "power": 0, "length_power": 0.5}, 0.5**0.5 / 2, 0.5**0.5),
        ({"similarity": "jaccard"}, 2 / 4, 2 / 4),
        ({"similarity": "tversky"}, 2 * 2 / (4 + 2), 2 * 2 / (4 + 2)),  # Dice
        ({"similarity": "tversky", "tversky_alpha": 1, "tversky_beta": 0}, 2 / 4, 2 / 2),
        ({"similarity": "bm25", "k1": 1, "b": 1}, 2 * 14**2 / (23 * 15), 2 * 14**2 / (23 * 15)),
    ],
)
def test_item_knn_by_hand(settings, to_second, to_first):
    # Four users have the first item, two of them the second, another one the third, none the last.
    data = training([[0, 1], [0, 1], [0, 2], [0]], 4)
    learner = ItemKNN(**{"length_power": 0, "shrinkage": 0} | settings)
    found = learner.learn(data, 4).matrix.toarray()
    assert found[0, 1] == pytest.approx(to_second, rel=1e-6)
    assert found[1, 0] == pytest.approx(to_first, rel=1e-6)
    assert found[1, 2] == found[1, 3] == found[3, 1] == 0


def test_shrinkage_is_added_to_every_denominator():
    data = training([[0, 1], [0, 1], [0, 2]], 3)
    learner = ItemKNN(similarity="jaccard", length_power=0, shrinkage=1)
    assert learner.learn(data, 3).matrix.toarray()[0].tolist() == pytest.approx([0, 2 / 4, 1 / 4])


def test_transitions_count_steps_with_decay():
    learner = Transitions(steps=2, decay=0.5, from_power=0, to_power=0)
    found = learner.learn(training([[0, 1, 2], [0, 2]], 3), 3).matrix.toarray()
    np.testing.assert_allclose(found, [[0, 1, 1.5], [0, 0, 1], [0, 0, 0]])


def test_transitions_do_not_cross_histories():
    found = Transitions(steps=5).learn(training([[0, 1], [2, 3]], 4), 4).matrix
    assert sorted(zip(*found.nonzero(), strict=True)) == [(0, 1), (2, 3)]


def test_transitions_damp_frequent_items():
    learner = Transitions(steps=1, from_power=1, to_power=0.5)
    found = learner.learn(training([[0, 1], [0, 2], [0, 2]], 3), 3).matrix.toarray()
    np.testing.assert_allclose(found[0], [0, 1 / 3, 2 / 3 / 2**0.5], rtol=1e-6)


def test_recency_weighs_the_newest_event_most():
    learner = Transitions(steps=1, from_power=0)
    source = ItemItem(ItemItemConfig(learner=learner, recency=0.5))
    fitted = source.fit(training([[0, 1], [2, 3]], 4))
    found = fitted.score(Histories.of([[0, 2]]), np.array([[1, 3]], np.int32))
    np.testing.assert_allclose(found, [[0.5, 1.0]])
