import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusionrec.evaluation import beyond

EMPTY = np.full((2, 3), -1, np.int32)
lists_of_seven = hnp.arrays(np.int32, (4, 3), elements=st.integers(-1, 6))


def lists(*rows):
    return np.array(rows, np.int32)


def test_coverage():
    assert beyond.coverage(lists([0, 1], [1, -1]), 4) == 0.5
    assert beyond.coverage(EMPTY, 4) == 0
    assert beyond.coverage(EMPTY[:0], 4) is None


def test_gini_of_even_and_of_single_exposure():
    assert beyond.gini(lists([0, 1], [2, 3]), 4) == pytest.approx(0)
    assert beyond.gini(lists([2], [2], [2]), 4) == pytest.approx(3 / 4)
    assert beyond.gini(lists([0, 1], [0, 1]), 4) == pytest.approx(1 / 2)
    assert beyond.gini(EMPTY, 4) is None


@given(lists_of_seven)
@settings(deadline=None)
def test_gini_is_half_the_relative_mean_difference(found):
    exposure = np.bincount(found[found >= 0], minlength=7)
    if exposure.sum():
        gaps = np.abs(exposure[:, None] - exposure[None]).sum()
        assert beyond.gini(found, 7) == pytest.approx(gaps / (2 * 7 * exposure.sum()))


def test_novelty_in_bits():
    counts = np.array([3, 1, 0, 0])  # with one added each: 4/8, 2/8, 1/8, 1/8
    assert beyond.novelty(lists([0, 0]), counts) == pytest.approx(1)
    assert beyond.novelty(lists([0, 1]), counts) == pytest.approx(1.5)
    assert beyond.novelty(lists([2, -1], [0, -1]), counts) == pytest.approx(2)
    assert beyond.novelty(EMPTY, counts) is None


def test_diversity_over_text():
    vectors = np.array([[1, 0], [0, 1], [1, 0], [0, 0]], np.float32)
    assert beyond.text_diversity(lists([0, 1]), vectors) == pytest.approx(1)
    assert beyond.text_diversity(lists([0, 2]), vectors) == pytest.approx(0)
    assert beyond.text_diversity(lists([0, 1, 2]), vectors) == pytest.approx(2 / 3)
    assert beyond.text_diversity(lists([0, 1], [0, -1]), vectors) == pytest.approx(1)
    assert beyond.text_diversity(lists([0, 3]), vectors) is None  # item 3 has no text
    assert beyond.text_diversity(EMPTY, vectors) is None


@given(lists_of_seven)
@settings(deadline=None)
def test_diversity_over_text_is_the_mean_over_pairs(found):
    vectors = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    means = []
    for row in found:
        row = row[row >= 0]
        pairs = [1 - vectors[a] @ vectors[b] for i, a in enumerate(row) for b in row[i + 1 :]]
        if pairs:
            means.append(np.mean(pairs))
    expected = pytest.approx(np.mean(means), abs=1e-5) if means else None
    assert beyond.text_diversity(found, vectors) == expected


def test_diversity_over_categories():
    categories = [("a", "b"), ("b", "c"), ("a", "b"), ()]
    assert beyond.category_diversity(lists([0, 1]), categories) == pytest.approx(2 / 3)
    assert beyond.category_diversity(lists([0, 2]), categories) == pytest.approx(0)
    assert beyond.category_diversity(lists([0, 1, 2]), categories) == pytest.approx(4 / 9)
    assert beyond.category_diversity(lists([0, 3]), categories) is None
    assert beyond.category_diversity(lists([0, 1]), [(), ()]) is None
    assert beyond.category_diversity(EMPTY, categories) is None


@given(lists_of_seven)
@settings(deadline=None)
def test_diversity_over_categories_is_the_mean_over_pairs(found):
    rng = np.random.default_rng(3)
    categories = [tuple(np.unique(rng.integers(0, 5, 3)).astype(str)) for _ in range(7)]
    means = []
    for row in found:
        sets = [set(categories[item]) for item in row if item >= 0]
        pairs = [1 - len(a & b) / len(a | b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
        if pairs:
            means.append(np.mean(pairs))
    expected = pytest.approx(np.mean(means), abs=1e-5) if means else None
    assert beyond.category_diversity(found, categories) == expected
