"""Exact and approximate search on vectors small enough to check by hand, and on clustered ones."""

import json
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from fusionrec.data.histories import Histories
from fusionrec.errors import BundleError, DataError
from fusionrec.retrieval.index import FlatIndex, IndexConfig, build, choose, load

APPROXIMATE = ["hnsw", "ivf", "ivfpq"]


def clustered(num_items: int = 3000, dimension: int = 32, num_clusters: int = 30):
    generator = np.random.default_rng(5)
    centres = generator.normal(size=(num_clusters, dimension))
    noise = 0.6 * generator.normal(size=(num_items, dimension))
    vectors = (centres[generator.integers(num_clusters, size=num_items)] + noise).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


VECTORS = clustered()
QUERIES = VECTORS[:40] + VECTORS[40:80]
HISTORIES = Histories.of([[row, 1000 + row] for row in range(40)])


def by_hand(vectors, query, seen, k):
    scores = vectors.astype(np.float64) @ query
    order = [code for code in np.lexsort((np.arange(len(scores)), -scores)) if code not in seen]
    return [code for code in order if scores[code] > 0][:k]


@pytest.mark.parametrize("kind", ["flat", *APPROXIMATE])
def test_known_answers(kind):
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [1, 0], [0, 0], [-1, 0]], np.float32)
    index = build(vectors, IndexConfig(kind=kind))
    items, scores = index.top_unseen(
        np.array([[1, 0], [0, 1], [0, 0]], np.float32), Histories.of([[], [1], []]), 3
    )
    assert items.tolist() == [[0, 3, 2], [2, -1, -1], [-1, -1, -1]]
    np.testing.assert_allclose(scores, [[1, 1, 0.6], [0.8, 0, 0], [0, 0, 0]], atol=1e-3)
    assert index.score(vectors[0], np.array([5, -1, 2], np.int32)) == pytest.approx(
        [-1, 0, 0.6], abs=1e-3
    )


@pytest.mark.parametrize("kind", ["flat", *APPROXIMATE])
def test_items_without_a_vector_are_not_counted(kind):
    vectors = np.array([[1, 0], [0, 1], [0, 0]], np.float32)
    assert build(vectors, IndexConfig(kind=kind)).report.num_items == 2


def test_the_least_effort_of_a_graph_is_the_depth_of_its_search():
    """So that every effort that is tried is another search."""
    effort = build(VECTORS, IndexConfig(kind="hnsw", recall=0.01)).report.effort
    assert effort == 125  # 1.25 × 100
    assert build(VECTORS, IndexConfig(kind="ivf", recall=0.01)).report.effort == 1


def test_flat_search_is_exact():
    items, _ = build(VECTORS, IndexConfig()).top_unseen(QUERIES, HISTORIES, 20)
    for row in range(40):
        assert items[row].tolist() == by_hand(
            VECTORS, QUERIES[row], HISTORIES.row(row).tolist(), 20
        )


def test_flat_search_takes_more_of_many_ties_than_it_looked_at():
    vectors = np.tile(np.array([[1, 0]], np.float32), (500, 1))
    items, _ = FlatIndex(vectors).top_unseen(vectors[:6], Histories.of([[0, 2]] + [[]] * 5), 4)
    assert items.tolist() == [[1, 3, 4, 5]] + [[0, 1, 2, 3]] * 5


def test_a_flat_search_stays_on_the_thread_that_asks():
    threads: Any = faiss
    index, seen = FlatIndex(VECTORS), []
    searched = index._index.search

    def search(*arguments):
        seen.append(threads.omp_get_max_threads())
        return searched(*arguments)

    before = threads.omp_get_max_threads()
    threads.omp_set_num_threads(2)
    try:
        index._index = SimpleNamespace(search=search)
        index.top_unseen(QUERIES, HISTORIES, 10)
        assert set(seen) == {1}
        assert threads.omp_get_max_threads() == 2
    finally:
        threads.omp_set_num_threads(before)


@pytest.mark.parametrize("kind", ["flat", *APPROXIMATE])
def test_answers_do_not_depend_on_the_batch_and_agree_with_scores(kind):
    index = build(VECTORS, IndexConfig(kind=kind))
    items, scores = index.top_unseen(QUERIES, HISTORIES, 10)
    for row in range(40):
        alone = index.top_unseen(QUERIES[row : row + 1], HISTORIES.slice(row, row + 1), 10)
        np.testing.assert_array_equal(alone[0][0], items[row])
        np.testing.assert_array_equal(alone[1][0], scores[row])
        np.testing.assert_array_equal(index.score(QUERIES[row], items[row]), scores[row])
        assert not set(items[row].tolist()) & set(HISTORIES.row(row).tolist())


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_the_wanted_recall_is_reached_with_the_least_effort(kind):
    effort = {}
    for wanted in (0.5, 0.95):
        config = IndexConfig(kind=kind, recall=wanted)
        index = build(VECTORS, config, lambda count: QUERIES[:count])
        assert min(index.report.recall.values()) >= wanted
        assert set(index.report.recall) == {"histories", "items"}
        assert index.report.num_queries == 40
        effort[wanted] = index.report.effort
    assert effort[0.5] <= effort[0.95]
    items, _ = index.top_unseen(QUERIES, Histories.of([[]] * 40), 100)
    found = [len(set(items[q]) & set(by_hand(VECTORS, QUERIES[q], (), 100))) for q in range(40)]
    assert np.mean(found) >= 95


def test_recall_out_of_reach_is_said():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(4000, 16)).astype(np.float32)
    with pytest.warns(UserWarning, match=r"a ivfpq index .* at best, and recall = 1.0 is wanted"):
        build(vectors, IndexConfig(kind="ivfpq", recall=1.0))


@pytest.mark.parametrize("kind", ["flat", *APPROXIMATE])
def test_a_saved_index_gives_the_same_answers(kind, tmp_path):
    index = build(VECTORS, IndexConfig(kind=kind))
    index.save(tmp_path)
    again = load(tmp_path)
    assert again.report == index.report
    assert json.loads((tmp_path / "index.json").read_text())["kind"] == kind
    for before, after in zip(
        index.top_unseen(QUERIES, HISTORIES, 10),
        again.top_unseen(QUERIES, HISTORIES, 10),
        strict=True,
    ):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_the_same_settings_build_the_same_files(kind, tmp_path):
    for name in ("first", "second"):
        build(VECTORS, IndexConfig(kind=kind, seed=3)).save(tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_the_expected_size_is_about_what_is_written(kind, tmp_path):
    index = build(VECTORS, IndexConfig(kind=kind))
    index.save(tmp_path)
    written = (tmp_path / "index.faiss").stat().st_size
    assert 0.8 * written <= index.report.num_bytes <= 1.3 * written


def test_the_kind_is_chosen_by_size_and_memory():
    config = IndexConfig(flat_up_to=1000, max_bytes=1 << 30)
    assert choose(config, 1000, 384) == "flat"
    assert choose(config, 1001, 384) == "hnsw"
    assert choose(config, 1_000_000, 384) == "hnsw"
    assert choose(config, 2_500_000, 384) == "ivf"
    assert choose(config, 10_000_000, 384) == "ivfpq"
    assert choose(IndexConfig(kind="ivf"), 10, 384) == "ivf"


def test_mistakes(tmp_path):
    with pytest.raises(DataError, match="a ivf index needs at least two items with a vector"):
        build(np.eye(1, 4, dtype=np.float32), IndexConfig(kind="ivf"))
    with pytest.raises(BundleError, match=r"index\.json cannot be read: fit the pipeline again"):
        load(tmp_path)
