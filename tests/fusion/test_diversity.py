"""Lists that are diverse by known amounts."""

from dataclasses import replace

import numpy as np
import pytest

from fusionrec.data.histories import Histories
from fusionrec.data.releases import Releases
from fusionrec.errors import ConfigError
from fusionrec.fusion.diversity import Diversity, DiversityConfig, ItemCategories
from fusionrec.fusion.model import Fused, ordered

# Items 0–3 are comedies, 4 and 5 dramas, 6 both, 7 nothing.
NAMES = [("c",), ("c",), ("c",), ("c",), ("d",), ("d",), ("c", "d"), ()]
COUNTS = np.array([7, 0, 0, 0, 0, 0, 0, 0])
HISTORY = Histories.of([[3]])


def lists(items, scores, names=("a",)):
    terms = np.array(scores, dtype=np.float32)[:, None, :]
    return ordered(np.array(items, dtype=np.int32), terms, names)


def diverse(fused, histories=HISTORY, **settings):
    config = DiversityConfig(**settings)
    return Diversity(config, ItemCategories.of(NAMES), COUNTS).apply(histories, fused)


ONE = lists([[0, 1, 2, 4, 5]], [[1.0, 0.9, 0.8, 0.5, 0.0]])


def test_a_weight_of_nothing_changes_nothing():
    assert diverse(ONE) is ONE


def test_what_repeats_an_item_above_loses_as_much_as_it_repeats():
    found = diverse(ONE, similarity=0.5)
    # 0 stands first; 4 is like nothing above it and comes before 1 and 2, which lose 0.5.
    assert found.items[0].tolist() == [0, 4, 1, 2, 5]
    assert found.scores[0].tolist() == pytest.approx([1.0, 0.5, 0.4, 0.3, -0.5])
    half = diverse(lists([[0, 6, 7]], [[1.0, 0.9, 0.0]]), similarity=0.4)
    assert half.terms[0, 1].tolist() == pytest.approx([0, -0.4 / 2, 0])  # one category of two


def test_a_cap_moves_the_rest_behind():
    found = diverse(ONE, max_per_category=1, places=2)
    assert found.items[0].tolist() == [0, 4, 1, 2, 5]
    assert diverse(ONE, max_per_category=2).items[0].tolist() == [0, 1, 4, 5, 2]
    only = lists([[0, 1, 2]], [[3.0, 2.0, 1.0]])
    assert diverse(only, max_per_category=1).items[0].tolist() == [0, 1, 2]  # nothing else is there


def test_calibration_shows_the_history_s_categories_in_their_shares():
    mixed = Histories.of([[3, 5]])
    close = lists([[0, 1, 2, 4, 5]], [[1.0, 0.99, 0.98, 0.97, 0.0]])
    assert diverse(close, mixed, calibration=1.0).items[0, :3].tolist() == [0, 4, 1]
    comedies = Histories.of([[3, 3]])
    assert diverse(close, comedies, calibration=1.0).items[0, :3].tolist() == [0, 1, 2]
    gained = np.log(1 + 1 / 0.1) / 2  # half of the history, a category that is empty yet
    assert diverse(close, mixed, calibration=1.0).terms[0, 1, 0] == pytest.approx(gained)


def test_popular_items_lose():
    found = diverse(ONE, popularity=0.15)
    assert found.items[0].tolist() == [1, 0, 2, 4, 5]
    assert found.scores[0, 1] == pytest.approx(0.85)


def random_lists(num_lists, width, seed=0):
    generator = np.random.default_rng(seed)
    items = np.stack([generator.choice(60, width, replace=False) for _ in range(num_lists)])
    items[::3, -4:] = -1
    items[7:8] = -1
    scores = generator.random((num_lists, 2, width)).astype(np.float32) * (items >= 0)[:, None]
    return ordered(items.astype(np.int32), scores, ("a", "b"))


@pytest.mark.parametrize(
    "settings",
    [
        {"similarity": 2.0},
        {"calibration": 1.0, "popularity": 0.3},
        {"max_per_category": 2, "similarity": 0.3, "calibration": 0.4},
    ],
)
def test_terms_add_up_scores_descend_and_the_top_stays_the_top(settings):
    generator = np.random.default_rng(1)
    names = [
        [f"g{g}" for g in generator.choice(8, generator.integers(0, 4), replace=False)]
        for _ in range(60)
    ]
    categories, counts = ItemCategories.of(names), generator.integers(0, 50, 60)
    config = DiversityConfig(places=6, depth=12, **settings)
    fused = random_lists(70, 20)
    histories = Histories.of([generator.choice(60, 5) for _ in range(69)] + [[]])
    found = Diversity(config, categories, counts).apply(histories, fused)
    assert found.term_names == ("a", "b", "diversity")
    np.testing.assert_allclose(found.terms.sum(axis=1), found.scores, atol=1e-5)
    for row in range(70):
        there = found.items[row] >= 0
        assert (np.diff(found.scores[row][there]) <= 0).all()
        assert set(found.items[row, :12]) == set(fused.items[row, :12])
        np.testing.assert_array_equal(found.items[row, 12:], fused.items[row, 12:])
    # A batch is what its lists are alone.
    for row in (0, 7, 69):
        one = Fused(fused.items[[row]], fused.scores[[row]], fused.terms[[row]], fused.term_names)
        alone = Diversity(config, categories, counts).apply(histories.take([row]), one)
        np.testing.assert_array_equal(alone.items[0], found.items[row])
        np.testing.assert_allclose(alone.scores[0], found.scores[row], atol=1e-6)


def test_greedy_is_greedy():
    """By the formula, item by item, for the first lists."""
    fused = random_lists(5, 9, seed=2)
    generator = np.random.default_rng(3)
    names = [generator.choice(5, generator.integers(1, 3), replace=False) for _ in range(60)]
    categories = ItemCategories.of([[str(g) for g in row] for row in names])
    config = DiversityConfig(similarity=0.7, places=9)
    found = Diversity(config, categories, np.ones(60, np.int64)).apply(
        Histories.of([[1]] * 5), fused
    )
    for row in range(5):
        left = [(i, s) for i, s in zip(fused.items[row], fused.scores[row], strict=True) if i >= 0]
        spread = left[0][1] - left[-1][1]
        above: list[int] = []
        while left:
            scores = [
                s - 0.7 * spread * max((jaccard(names[i], names[j]) for j in above), default=0)
                for i, s in left
            ]
            above.append(left.pop(int(np.argmax(scores)))[0])
        assert found.items[row, : len(above)].tolist() == above


def jaccard(a, b):
    return len({*a} & {*b}) / len({*a} | {*b})


def test_it_is_the_same_after_saving(tmp_path):
    config = DiversityConfig(similarity=0.5, max_per_category=2)
    made = Diversity(config, ItemCategories.of(NAMES), COUNTS)
    made.save(tmp_path / "diversity")
    again = Diversity.load(tmp_path / "diversity", COUNTS)
    assert again.config == config
    np.testing.assert_array_equal(again.apply(HISTORY, ONE).items, made.apply(HISTORY, ONE).items)
    (tmp_path / "diversity" / "diversity.json").write_text('{"similarity": -1}')
    with pytest.raises(ConfigError, match=r"diversity.json is wrong"):
        Diversity.load(tmp_path / "diversity", COUNTS)
    with pytest.raises(ConfigError, match=r"run `python -m tuning.diversity`"):
        Diversity.load(tmp_path / "none", COUNTS)


DAY = 86_400
UNKNOWN = np.iinfo(np.int64).max
OUT = Releases(np.array([*(DAY * np.array([0, 10, 20, 30, 90, 100, 200])), UNKNOWN]), 200 * DAY)


def test_what_came_out_of_late_gains():
    config = DiversityConfig(freshness=0.6, half_life_days=10)
    term = Diversity(config, ItemCategories.of(NAMES), COUNTS, OUT)
    fused = lists([[0, 4, 5, 7]] * 2, [[1.0, 0.8, 0.4, 0.0]] * 2)
    found = term.apply(Histories.of([[3], []], [[100 * DAY], []]), fused)
    assert found.items[0].tolist() == [4, 0, 5, 7]
    # Of ages 10, 100 and 0 days; of item 7 nothing is known.
    expected = np.float32([0.3, 0.6 / 2**10, 0.6, 0])
    np.testing.assert_allclose(found.terms[0, 1], expected, atol=1e-5)
    # A history without events is asked now, 100 days later, when all of this is old.
    np.testing.assert_allclose(found.terms[1, 1], 0, atol=1e-3)


def test_prices_are_paid_as_far_as_they_weigh(tmp_path):
    prices = np.float32([0.2, 0, 0, 0, 0, 0, 0, 0])
    config = DiversityConfig(max_exposure=0.1, exposure=0.5)
    term = Diversity(config, ItemCategories.of(NAMES), COUNTS, prices=prices)
    assert term.apply(HISTORY, ONE).scores[0, :2].tolist() == pytest.approx([0.9, 0.9])
    whole = replace(term, config=config.model_copy(update={"exposure": 1.0}))
    assert whole.apply(HISTORY, ONE).items[0].tolist() == [1, 0, 2, 4, 5]
    whole.save(tmp_path / "diversity")
    again = Diversity.load(tmp_path / "diversity", COUNTS)
    assert again.apply(HISTORY, ONE).items[0].tolist() == [1, 0, 2, 4, 5]
    assert not DiversityConfig(max_exposure=0.1, exposure=0).changes


def test_freshness_needs_a_time(tmp_path):
    config = DiversityConfig(freshness=0.5)
    Diversity(config, ItemCategories.of(NAMES), COUNTS, OUT).save(tmp_path / "diversity")
    assert Diversity.load(tmp_path / "diversity", COUNTS, OUT).config == config
    with pytest.raises(ConfigError, match=r"freshness = 0.5 needs to know when items came out"):
        Diversity.load(tmp_path / "diversity", COUNTS)
