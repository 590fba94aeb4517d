import bm25s
import numpy as np
import pytest

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.retrieval import rows as rows_module
from fusionrec.retrieval import sums as sums_module
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


@pytest.mark.parametrize("dense_from", [0.0, 100.0], ids=["scattered", "sorted"])
def test_a_wide_catalogue_is_answered_like_a_narrow_one(monkeypatch, dense_from):
    generator = np.random.default_rng(3)
    titles = tuple(" ".join(f"word{w}" for w in generator.integers(0, 9, 5)) for _ in range(40))
    catalogue = Catalogue(tuple(map(str, range(40))), titles, ("",) * 40, ((),) * 40, ("",) * 40)
    source = BM25().fit(TrainingData(catalogue, Histories.of([[]])))
    histories = Histories.of([[3, 9], [20], [], [7, 7, 31]])
    candidates = np.tile(np.arange(-1, 40, dtype=np.int32), (4, 1))
    narrow = source.top(histories, 10), source.score(histories, candidates)
    monkeypatch.setattr(rows_module, "DENSE_WIDTH", 0)
    monkeypatch.setattr(sums_module, "_DENSE_FROM", dense_from)
    wide = source.top(histories, 10), source.score(histories, candidates)
    np.testing.assert_allclose(wide[0].scores, narrow[0].scores, rtol=1e-5)
    np.testing.assert_allclose(wide[1], narrow[1], rtol=1e-5)
    for row in range(4):
        answer = source.ask(histories.slice(row, row + 1))
        np.testing.assert_array_equal(answer.top(10).items[0], wide[0].items[row])
        np.testing.assert_array_equal(answer.score(candidates[row : row + 1])[0], wide[1][row])
