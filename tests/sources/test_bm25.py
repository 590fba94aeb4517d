import bm25s
import numpy as np
import pytest

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.sources.bm25 import BM25, BM25Config
from fusionrec.sources.protocol import TrainingData

TITLES = ("red desert night", "desert storm rising", "blue ocean night", "ocean ocean deep", "")


@pytest.fixture(scope="module")
def fitted():
    count = len(TITLES)
    catalogue = Catalogue(
        tuple(map(str, range(count))), TITLES, ("",) * count, ((),) * count, ("",) * count
    )
    return BM25().fit(TrainingData(catalogue, Histories.of([[]])))


def test_free_text_scores_are_those_of_bm25s(fitted):
    peer = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
    peer.index(bm25s.tokenize(list(TITLES), show_progress=False), show_progress=False)
    wish = "Ocean at night"
    histories = Histories.of([[]], texts=[wish])
    found = fitted.score(histories, np.arange(5, dtype=np.int32)[None])[0]
    np.testing.assert_allclose(found, peer.get_scores(["ocean", "night"]), rtol=1e-5)


def test_a_history_asks_with_its_items_words(fitted):
    ranked = fitted.top(Histories.of([[0]]), 3)
    assert ranked.items[0].tolist()[:2] == [1, 2]


def test_unknown_words_and_no_words_say_nothing(fitted):
    ranked = fitted.top(Histories.of([[], [], [4]], texts=["zebra", None, None]), 2)
    assert (ranked.items == -1).all()


def test_categories_alone_are_enough():
    catalogue = Catalogue(
        ("a", "b", "c"),
        ("",) * 3,
        ("",) * 3,
        (("attribute 7",), ("attribute 7",), ("x",)),
        ("",) * 3,
    )
    source = BM25(BM25Config()).fit(TrainingData(catalogue, Histories.of([[]])))
    assert source.top(Histories.of([[0]]), 2).items.tolist() == [[1, -1]]
