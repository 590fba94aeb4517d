import numpy as np
import pytest

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.errors import DataError
from fusionrec.sources.content import Content, ContentConfig
from fusionrec.sources.protocol import TrainingData

CATEGORIES = (("a", "b"), ("a",), ("b",), ("c",), (), ("a", "b"), ("b", "c"))
COUNT = len(CATEGORIES)
EVERY = np.arange(COUNT, dtype=np.int32)[None]


def data(categories=CATEGORIES, vectors=None):
    count = len(categories)
    empty = ("",) * count
    catalogue = Catalogue(tuple(map(str, range(count))), empty, empty, categories, empty)
    return TrainingData(catalogue, Histories.of([[0]]), item_vectors=vectors)


def idf(frequency):
    return 1 + np.log((1 + COUNT) / (1 + frequency))


def test_scores_are_cosines_of_rare_categories():
    found = Content().fit(data()).score(Histories.of([[0]]), EVERY)[0]
    a, b, c = idf(3), idf(4), idf(2)
    both = np.hypot(a, b)
    expected = [1, a / both, b / both, 0, 0, 1, b * b / both / np.hypot(b, c)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_newest_item_weighs_most():
    source = Content(ContentConfig(recency=0.5)).fit(data())
    one, other = source.score(Histories.of([[1, 3], [3, 1]]), EVERY[:, :4].repeat(2, axis=0))
    # Of two items with nothing in common the profile is (1, ½) / √1¼.
    assert [one[3], one[1]] == pytest.approx([1 / 1.25**0.5, 0.5 / 1.25**0.5], rel=1e-5)
    assert [other[1], other[3]] == pytest.approx([one[3], one[1]], rel=1e-5)


def test_fewer_factors_find_what_goes_together():
    # a and b are always together, so are c and d; e is with neither.
    rows = (("a", "b"), ("a", "b"), ("a",), ("b",), ("c", "d"), ("c", "d"), ("c",), ("d",))
    found = Content(ContentConfig(factors=2)).fit(data(rows)).top(Histories.of([[2], [6]]), 8)
    assert set(found.items[0].tolist()) == {0, 1, 3, -1}  # 3 has b, which comes with a
    assert set(found.items[1].tolist()) == {4, 5, 7, -1}


def test_text_stands_beside_the_categories():
    vectors = np.zeros((COUNT, 2), dtype=np.float32)
    vectors[[0, 4]] = [1, 0]
    histories = Histories.of([[0]])
    alone = Content(ContentConfig(text=1)).fit(data(vectors=vectors)).top(histories, 3)
    assert alone.items.tolist() == [[4, -1, -1]]
    mixed = Content(ContentConfig(text=0.5)).fit(data(vectors=vectors)).score(histories, EVERY)[0]
    # Item 4 has the same text and no category, item 5 the same categories and no text.
    assert mixed[[4, 5]] == pytest.approx([0.5**0.5] * 2, rel=1e-5)


def test_items_of_which_nothing_is_known_say_nothing():
    source = Content().fit(data())
    assert (source.top(Histories.of([[4]]), 3).items == -1).all()
    with pytest.raises(DataError, match=r"content needs items with categories or text vectors"):
        Content().fit(data(categories=((),) * 3))
