"""What every source must do. A new source is one more entry of SOURCES."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.retrieval.index import IndexConfig
from fusionrec.sources.bm25 import BM25
from fusionrec.sources.content import Content, ContentConfig
from fusionrec.sources.ease import EASE
from fusionrec.sources.ials import IALS, IALSConfig
from fusionrec.sources.item_item import ItemItem, ItemItemConfig
from fusionrec.sources.item_knn import ItemKNN
from fusionrec.sources.load import SOURCES as LOADABLE
from fusionrec.sources.load import load_source
from fusionrec.sources.popularity import Popularity
from fusionrec.sources.protocol import ReadsItemVectors, TrainingData
from fusionrec.sources.recvae import RecVAE, RecVAEConfig
from fusionrec.sources.sasrec import SASRec, SASRecConfig
from fusionrec.sources.semantic import Semantic
from fusionrec.sources.transitions import Transitions

NUM_ITEMS = 12
PERSONAL = [
    ItemItem(ItemItemConfig(learner=ItemKNN())),
    ItemItem(ItemItemConfig(learner=EASE())),
    ItemItem(ItemItemConfig(learner=Transitions())),
    IALS(IALSConfig(factors=2, regularisation=0.1)),
    SASRec(SASRecConfig(width=8, num_heads=1, dropout=0.1, learning_rate=0.03, epochs=8)),
    BM25(),
    Content(),
    RecVAE(RecVAEConfig(factors=4, hidden=8, num_layers=2, learning_rate=0.02, epochs=8)),
    *(Semantic(IndexConfig(kind=kind)) for kind in ("flat", "hnsw", "ivf", "ivfpq")),
]
SOURCES = [Popularity(), *PERSONAL]


def name(source):
    kind = getattr(source.config, "kind", None)
    return f"{source.name}-{kind}" if kind else source.name


def checkerboard() -> TrainingData:
    """Half the users want the even items, half the odd ones; words and vectors say the same."""
    generator = np.random.default_rng(0)
    rows = [generator.permutation(np.arange(user % 2, NUM_ITEMS, 2))[:4] for user in range(60)]
    words = ("even square", "odd round")
    catalogue = Catalogue(
        item_ids=tuple(f"i{item}" for item in range(NUM_ITEMS)),
        titles=tuple(f"{words[item % 2]} number{item}" for item in range(NUM_ITEMS)),
        texts=("",) * NUM_ITEMS,
        categories=tuple((f"kind {item % 2}",) for item in range(NUM_ITEMS)),
        domains=("board",) * NUM_ITEMS,
    )
    vectors = np.zeros((NUM_ITEMS, 3), dtype=np.float32)
    vectors[np.arange(NUM_ITEMS), np.arange(NUM_ITEMS) % 2] = 1
    return TrainingData(catalogue, Histories.of(rows), has_timestamps=True, item_vectors=vectors)


def asked(*rows: list[int]) -> Histories:
    vectors = np.zeros((len(rows), 3), dtype=np.float32)
    for index, row in enumerate(rows):
        if row:
            vectors[index, row[-1] % 2] = 1
    return Histories.of(rows).with_vectors(vectors)


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return checkerboard()


def test_every_loadable_source_is_under_contract():
    assert {source.name for source in SOURCES} == set(LOADABLE)


@pytest.mark.parametrize("source", SOURCES, ids=name)
class TestSource:
    def test_top_is_descending_without_history_or_repeats(self, source, data):
        histories = asked([0, 2], [1], [], [4, 6, 8, 10])
        ranked = source.fit(data).top(histories, 5)
        assert ranked.items.shape == ranked.scores.shape == (4, 5)
        for row in range(len(histories)):
            items = ranked.items[row][ranked.items[row] >= 0]
            assert len(set(items.tolist())) == len(items)
            assert not set(items.tolist()) & set(histories.row(row).tolist())
            assert (np.diff(ranked.scores[row][: len(items)]) <= 0).all()
            assert (ranked.scores[row][: len(items)] > 0).all()
            assert (ranked.items[row][len(items) :] == -1).all()

    def test_score_agrees_with_top(self, source, data):
        fitted, histories = source.fit(data), asked([0, 2], [1, 3, 5])
        ranked = fitted.top(histories, 4)
        found = fitted.score(histories, ranked.items)
        np.testing.assert_allclose(found, ranked.scores, rtol=1e-6, atol=1e-7)

    def test_padding_scores_zero(self, source, data):
        found = source.fit(data).score(asked([0]), np.array([[2, -1]], np.int32))
        assert found.dtype == np.float32
        assert found[0, 1] == 0

    def test_ties_go_to_the_lower_code(self, source, data):
        ranked = source.fit(data).top(asked([0, 2]), NUM_ITEMS)
        items, scores = ranked.items[0], ranked.scores[0]
        for first in range(NUM_ITEMS - 1):
            if items[first + 1] >= 0 and scores[first] == scores[first + 1]:
                assert items[first] < items[first + 1]

    def test_save_and_load_give_the_same_answers(self, source, data, tmp_path):
        fitted, histories = source.fit(data), asked([0, 2], [], [3])
        fitted.save(tmp_path / source.name)
        again = load_source(tmp_path / source.name)
        assert again.name == source.name
        before, after = fitted.top(histories, 6), again.top(histories, 6)
        np.testing.assert_array_equal(before.items, after.items)
        np.testing.assert_array_equal(before.scores, after.scores)
        assert not list(tmp_path.rglob("*.pkl"))

    def test_answers_do_not_depend_on_the_batch(self, source, data):
        fitted, histories = source.fit(data), asked([0, 2], [1], [], [3, 5, 7])
        together = fitted.top(histories, 5)
        for row in range(len(histories)):
            alone = fitted.top(histories.slice(row, row + 1), 5)
            np.testing.assert_array_equal(alone.items[0], together.items[row])
            np.testing.assert_array_equal(alone.scores[0], together.scores[row])

    def test_fit_leaves_the_source_as_it_was_and_repeats_itself(self, source, data):
        first, second = source.fit(data), source.fit(data)
        assert first is not source
        histories = asked([0, 2, 4])
        np.testing.assert_array_equal(first.top(histories, 5).items, second.top(histories, 5).items)

    def test_no_histories_give_no_rows(self, source, data):
        assert source.fit(data).top(asked(), 3).items.shape == (0, 3)


WITHOUT_TEXT = [SASRec(SASRecConfig(width=8, text=False, epochs=2)), Content(ContentConfig(text=0))]


@pytest.mark.parametrize("source", [*SOURCES, *WITHOUT_TEXT], ids=name)
def test_what_reads_the_vectors_of_items_says_so(source, data, tmp_path):
    """Who gives a pipeline another encoder fits those again, and no others."""
    assert data.item_vectors is not None
    found = []
    for number, vectors in enumerate((data.item_vectors, data.item_vectors[::-1].copy())):
        place = tmp_path / str(number)
        source.fit(replace(data, item_vectors=vectors)).save(place)
        found.append({path.name: path.read_bytes() for path in place.iterdir()})
    says = isinstance(source, ReadsItemVectors) and source.reads_item_vectors
    assert says == (found[0] != found[1])


@pytest.mark.parametrize("source", PERSONAL, ids=name)
def test_checkerboard_colour_is_found(source, data):
    ranked = source.fit(data).top(asked([0, 2], [1, 3]), 4)
    assert (ranked.items[0] % 2 == 0).all()
    assert (ranked.items[1] % 2 == 1).all()


@pytest.mark.parametrize("source", PERSONAL, ids=name)
def test_nothing_is_said_about_an_empty_history(source, data):
    assert (source.fit(data).top(asked([]), 3).items == -1).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=8), min_size=1, max_size=5))
def test_any_history_is_answered(rows):
    data = checkerboard()
    for source in (Popularity(), ItemItem(ItemItemConfig(learner=Transitions())), BM25()):
        ranked = source.fit(data).top(asked(*rows), 3)
        assert np.isfinite(ranked.scores).all()
