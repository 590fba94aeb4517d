"""Trees over a linear fusion, on problems whose answer is known."""

import numpy as np
import pytest

from fusionrec.data.histories import Histories
from fusionrec.errors import ConfigError
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.ranks import list_ranks
from fusionrec.fusion.candidates import Candidates
from fusionrec.fusion.features import ItemStatistics, feature_names, features, newest_times
from fusionrec.fusion.lambdarank import LambdaRank, LambdaRankConfig, NothingToLearn
from fusionrec.fusion.model import Fusion, Segment, fuse

ITEMS = 40
WIDTH = 12
SOURCES = ("a", "b")
STATISTICS = ItemStatistics(np.arange(ITEMS) % 5, None)
COLD = STATISTICS.counts == 0
SMALL = LambdaRankConfig(trees=30, learning_rate=0.3, leaves=4, min_leaf_rows=5, depth=10)


def linear(**weights):
    segment = Segment(weights={"a": 1.0, "b": 1.0, **weights})
    return Fusion(sources=SOURCES, scales=dict.fromkeys(SOURCES, 1.0), segments=(segment,))


def one_or_the_other(num_cases, seed=0):
    """Cases whose target is the one candidate that exactly one of two sources likes.

    The others have both high or both low: an exclusive or, which no weighted sum can order.
    """
    generator = np.random.default_rng(seed)
    items = np.sort(
        np.stack([generator.choice(ITEMS, WIDTH, replace=False) for _ in range(num_cases)]), axis=1
    ).astype(np.int32)
    both = generator.integers(0, 2, items.shape)
    scores = np.stack([both, both]).astype(np.float32)
    target = generator.integers(0, WIDTH, num_cases)
    liked = generator.integers(0, 2, num_cases)
    rows = np.arange(num_cases)
    scores[liked, rows, target] = 1
    scores[1 - liked, rows, target] = 0
    scores += generator.uniform(0.5, 0.7, scores.shape).astype(np.float32)
    candidates = Candidates(items, scores, generator.integers(1, 9, num_cases))
    return candidates, Histories.of(items[rows, target][:, None])


def grown(candidates, targets, config=SMALL, statistics=STATISTICS):
    newest = np.zeros(len(candidates), dtype=np.int64)
    return LambdaRank.fit(linear(), candidates, targets, newest, statistics, config, seed=0)


def ndcg(lists, targets):
    return METRICS["ndcg"](list_ranks(lists.items, lists.scores, targets), 10).mean()


@pytest.fixture(scope="module")
def problem():
    return one_or_the_other(300)


@pytest.fixture(scope="module")
def model(problem):
    return grown(*problem)


def fused(model, candidates):
    return model.fuse(candidates, np.zeros(len(candidates), dtype=np.int64), COLD)


def test_trees_order_what_no_weighted_sum_can(model):
    candidates, targets = one_or_the_other(200, seed=1)
    best = max(
        ndcg(fuse(linear(a=a, b=b), candidates, COLD), targets)
        for a in (0.0, 0.5, 1.0)
        for b in (0.0, 0.5, 1.0)
    )
    assert best < 0.6
    # Two of twelve places are not read, so that it cannot be all of them.
    assert ndcg(fused(model, candidates), targets) > 0.75


def test_terms_add_up_to_what_lightgbm_says(model, problem):
    candidates, _ = problem
    lists = fused(model, candidates)
    assert lists.term_names == ("a", "b", "history", "item")
    np.testing.assert_allclose(lists.terms.sum(axis=1), lists.scores, atol=1e-5)
    assert (np.diff(lists.scores, axis=1) <= 0).all()
    # Differences within what was read are those of the trees' own predictions.
    plain = fuse(linear(), candidates, COLD)
    columns = np.stack(
        [np.searchsorted(row, top) for row, top in zip(candidates.items, plain.items, strict=True)]
    )[:, : SMALL.depth]
    newest = np.zeros(len(candidates), dtype=np.int64)
    best = plain.scores[:, : SMALL.depth]
    rows = features(candidates, columns, best, np.ones(2, np.float32), STATISTICS, newest)
    said = model.trees.booster.predict(rows.reshape(-1, rows.shape[-1])).reshape(columns.shape)
    for row in range(0, len(candidates), 29):
        score = dict(zip(lists.items[row].tolist(), lists.scores[row].tolist(), strict=True))
        ours = np.array([score[item] for item in plain.items[row, : SMALL.depth].tolist()])
        np.testing.assert_allclose(ours - ours[0], said[row] - said[row, 0], atol=1e-4)


def test_what_was_not_read_stays_below_in_its_order(model, problem):
    candidates, _ = problem
    plain, lists = fuse(linear(), candidates, COLD), fused(model, candidates)
    for row in range(len(candidates)):
        assert set(plain.items[row, : SMALL.depth]) == set(lists.items[row, : SMALL.depth])
    np.testing.assert_array_equal(plain.items[:, SMALL.depth :], lists.items[:, SMALL.depth :])
    np.testing.assert_array_equal(
        plain.terms[:, :, SMALL.depth :], lists.terms[:, :2, SMALL.depth :]
    )


def test_a_feature_is_credited_to_its_term():
    # Only the training events of the item tell the target.
    generator = np.random.default_rng(0)
    items = np.tile(np.arange(WIDTH, dtype=np.int32), (200, 1))
    scores = generator.random((2, 200, WIDTH)).astype(np.float32)
    counts = np.zeros(ITEMS, dtype=np.int64)
    counts[7] = 9
    candidates = Candidates(items, scores, np.full(200, 3))
    statistics = ItemStatistics(counts, None)
    config = SMALL.model_copy(update={"depth": WIDTH, "trees": 5})
    model = grown(candidates, Histories.of([[7]] * 200), config, statistics)
    lists = fused(model, candidates)
    assert (lists.items[:, 0] == 7).all()
    parts = lists.terms[:, :, 0] - lists.terms[:, :, 1]
    assert (parts.argmax(axis=1) == 3).all()
    assert (parts[:, 3] > 0.8 * parts.sum(axis=1)).all()
    assert model.table()["trees, share of gain"]["item"] > 0.9


def test_batches_of_any_size_agree(model, problem):
    candidates, _ = problem
    together = fused(model, candidates)
    for row in range(0, len(candidates), 41):
        alone = fused(model, candidates.take(np.array([row])))
        np.testing.assert_array_equal(alone.items[0], together.items[row])
        np.testing.assert_array_equal(alone.scores[0], together.scores[row])


def test_short_and_silent_lists_are_ordered_too(model):
    items = np.array([[1, 4, -1], [-1, -1, -1]], dtype=np.int32)
    candidates = Candidates(items, np.zeros((2, 2, 3), np.float32), np.array([0, 2]))
    lists = fused(model, candidates)
    assert sorted(lists.items[0].tolist()) == [-1, 1, 4]
    assert lists.items[0, 2] == -1
    assert (lists.items[1] == -1).all()
    np.testing.assert_allclose(lists.terms.sum(axis=1), lists.scores, atol=1e-6)
    assert np.isfinite(lists.scores).all()


def test_it_is_the_same_after_saving_and_growing_again(model, problem, tmp_path):
    place = tmp_path / "lambdarank"
    model.save(place)
    model.save(place)  # over what is there
    assert sorted(path.name for path in place.iterdir()) == ["lambdarank.json", "model.txt"]
    loaded = LambdaRank.load(place, STATISTICS.counts)
    expected = fused(model, problem[0])
    for again in (loaded, grown(*problem)):
        found = fused(again, problem[0])
        np.testing.assert_array_equal(found.items, expected.items)
        np.testing.assert_allclose(found.terms, expected.terms, atol=1e-6)
    assert loaded.grown_over(linear())
    assert not loaded.grown_over(linear(a=0.5))
    segment = linear().segments[0].model_copy(update={"reranker": 1.0})
    assert loaded.grown_over(linear().model_copy(update={"segments": (segment,)}))


def test_what_is_broken_is_named(model, tmp_path):
    with pytest.raises(ConfigError, match=r"remove it and run `python -m tuning.fusion`"):
        LambdaRank.load(tmp_path / "none", STATISTICS.counts)
    model.save(tmp_path / "m")
    (tmp_path / "m" / "lambdarank.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"lambdarank.json is wrong"):
        LambdaRank.load(tmp_path / "m", STATISTICS.counts)


def test_without_targets_there_is_nothing_to_learn(problem):
    candidates, _ = problem
    with pytest.raises(NothingToLearn, match=r"first 10 places of its list.*--model linear"):
        grown(candidates, Histories.of([[ITEMS + 1]] * len(candidates)))


def test_features_have_known_values():
    candidates = Candidates(
        np.array([[0, 2, 5]], np.int32),
        np.array([[[4.0, 2.0, 0.0]], [[0.0, 10.0, 5.0]]], np.float32),
        np.array([3]),
    )
    day = 86_400
    train = Histories.of([[0, 2], [2]], timestamps=[[1 * day, 5 * day], [2 * day]])
    items = ItemStatistics.of(train, 6, has_timestamps=True)
    names = feature_names(SOURCES, has_timestamps=True)
    found = features(
        candidates,
        np.array([[1, 0, 2]]),
        np.array([[6.0, 3.0, 1.0]], np.float32),
        np.array([2.0, 5.0], np.float32),
        items,
        np.array([10 * day]),
    )
    by_name = dict(zip(names, np.moveaxis(found[0], 1, 0).tolist(), strict=True))
    assert by_name["a.score"] == [1, 2, 0]
    assert by_name["b.share"] == [1, 0, 0.5]
    np.testing.assert_equal(by_name["b.place"], [1, np.nan, 2])
    assert by_name["linear.share"] == pytest.approx([1, 0.5, 1 / 6])
    assert by_name["linear.place"] == [1, 2, 3]
    assert by_name["history.events"] == [3, 3, 3]
    assert by_name["item.events"] == [2, 1, 0]
    np.testing.assert_equal(by_name["item.age"], [8, 9, np.nan])


def test_an_age_survives_saving_and_needs_a_history(problem, tmp_path):
    candidates, targets = problem
    train = Histories.of([np.arange(ITEMS)], timestamps=[np.arange(ITEMS) * 86_400])
    statistics = ItemStatistics.of(train, ITEMS, has_timestamps=True)
    model = grown(candidates, targets, statistics=statistics)
    model.save(tmp_path / "m")
    again = LambdaRank.load(tmp_path / "m", statistics.counts)
    np.testing.assert_array_equal(again.items.first_times, statistics.first_times)
    histories = Histories.of([[1, 2], []], timestamps=[[5, 9], []])
    assert newest_times(histories).tolist() == [9, 0]
