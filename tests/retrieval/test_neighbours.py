import numpy as np
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrec.data.histories import Histories
from fusionrec.retrieval.neighbours import (
    gather,
    gather_sums,
    profiles,
    top_neighbours,
    top_neighbours_dense,
    top_of_dense,
    top_of_sums,
)
from fusionrec.retrieval.sums import Sum, add_up


def one_sum(values) -> Sum:
    row = np.asarray(values, np.float32)
    columns = np.flatnonzero(row).astype(np.int32)
    return add_up(columns, row[columns], len(row))


def test_sparse_and_dense_cuts_agree():
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(40, 40)) * (generator.random((40, 40)) < 0.4)
    sparse = top_neighbours(sp.csr_array(matrix), 5)
    dense = top_neighbours_dense(matrix.astype(np.float32), 5)
    np.testing.assert_array_equal(sparse.matrix.toarray(), dense.matrix.toarray())
    assert np.diff(sparse.matrix.indptr).max() <= 5


def test_few_entries_are_cut_by_sorting():
    matrix = sp.csr_array(([3.0, -4.0, 1.0], ([0, 0, 0], [1, 2, 3])), shape=(200, 200))
    found = top_neighbours(matrix, 2)
    assert dict(zip(found.indices.tolist(), found.data.tolist(), strict=True)) == {1: 3.0, 2: -4.0}


def test_repeated_items_add_up():
    histories = Histories.of([[1, 1, 2]])
    found = profiles(histories, np.array([1, 2, 4], np.float32), 3)
    np.testing.assert_array_equal(found.toarray(), [[0, 3, 4]])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-2, 3), min_size=1, max_size=12), st.integers(1, 6), st.data())
def test_top_is_a_sort(values, k, data):
    row = np.array([values], dtype=np.float32)
    seen = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=3))
    histories = Histories.of([seen])
    order = sorted(range(len(values)), key=lambda item: (-values[item], item))
    expected = [item for item in order if values[item] > 0 and item not in seen][:k]
    for items, scores in (
        top_of_dense(row, histories, k),
        top_of_sums([one_sum(values)], histories, k),
    ):
        assert [item for item in items[0] if item >= 0] == expected
        assert scores[0][: len(expected)].tolist() == [values[item] for item in expected]


def test_sparse_scores_are_found_like_dense_ones():
    dense = np.array([[0, 2, 0, -1, 3], [0, 0, 0, 0, 0]], np.float32)
    candidates = np.array([[4, 0, -1, 3], [1, 2, -1, -1]], np.int32)
    expected = [[3, 0, 0, -1], [0, 0, 0, 0]]
    np.testing.assert_array_equal(gather(dense, candidates), expected)
    sums = [one_sum(row) for row in dense]
    np.testing.assert_array_equal(gather_sums(sums, candidates), expected)
