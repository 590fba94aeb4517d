import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrec.retrieval import rows as rows_module
from fusionrec.retrieval.rows import SparseRows, total


def random_rows(num_rows: int, width: int) -> SparseRows:
    generator = np.random.default_rng(1)
    dense = generator.normal(size=(num_rows, width)) * (generator.random((num_rows, width)) < 0.3)
    return SparseRows.of(sp.csr_array(dense))


def test_saved_rows_are_memory_mapped_as_they_are(tmp_path):
    rows = random_rows(6, 40)
    rows.save(tmp_path, "words.")
    found = SparseRows.load(tmp_path, "words.", width=40)
    np.testing.assert_array_equal(found.matrix.toarray(), rows.matrix.toarray())
    for part in (found.data, found.indices, found.indptr):
        assert not part.flags.writeable
        assert isinstance(part.base, np.memmap)
    assert found.indices.dtype == np.int32


@pytest.mark.parametrize("limit", [0, 1000], ids=["sparse", "dense"])
def test_sums_are_a_matrix_product(monkeypatch, limit):
    monkeypatch.setattr(rows_module, "DENSE_WIDTH", limit)
    rows = random_rows(8, 30)
    offsets = np.array([0, 3, 3, 7])
    asked = np.array([1, 4, 1, 0, 7, 2, 5], np.int32)
    weights = np.array([1, 0.5, 2, -1, 1, 1, 0.25], np.float32)
    found = rows.sums(offsets, asked, weights)
    found = found.matrix.toarray() if limit == 0 else found
    chosen = sp.csr_array((weights, asked, offsets), shape=(3, 8))
    np.testing.assert_allclose(found, (chosen @ rows.matrix).toarray(), atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-4, 4)), max_size=20), st.randoms())
def test_totals_are_sorted_and_do_not_depend_on_the_order(entries, random):
    shuffled = random.sample(entries, len(entries))
    (columns, values), (again, same) = (
        total(np.array([c for c, _ in e], np.int32), np.array([v / 7 for _, v in e], np.float32))
        for e in (entries, shuffled)
    )
    assert columns.tolist() == sorted({column for column, _ in entries})
    np.testing.assert_array_equal(columns, again)
    np.testing.assert_array_equal(values, same)
    for column, value in zip(columns, values, strict=True):
        assert value == pytest.approx(sum(v for c, v in entries if c == column) / 7, abs=1e-6)


def test_wide_matrices_are_kept_in_half_precision(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows_module, "DENSE_WIDTH", 3)
    values = np.array([0.1, 1.0, 7.3], np.float32)
    wide = SparseRows(values, np.array([0, 2, 3], np.int32), np.array([0, 2, 3]), 4)
    kept = wide.compact()
    assert kept.data.dtype == np.float16
    columns, found = kept.entries(np.array([0, 1], np.int32), np.ones(2, np.float32))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(columns, [0, 2, 3])
    np.testing.assert_allclose(found, values, rtol=2**-11)


def test_what_is_narrow_or_does_not_fit_stays_in_single_precision(monkeypatch: pytest.MonkeyPatch):
    narrow = SparseRows(np.ones(1, np.float32), np.zeros(1, np.int32), np.array([0, 1]), 4)
    assert narrow.compact() is narrow
    monkeypatch.setattr(rows_module, "DENSE_WIDTH", 3)
    large = SparseRows(np.full(1, 1e5, np.float32), np.zeros(1, np.int32), np.array([0, 1]), 4)
    assert large.compact() is large
