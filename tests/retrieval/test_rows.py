import numpy as np
import pytest
import scipy.sparse as sp

from fusionrec.retrieval import rows as rows_module
from fusionrec.retrieval.rows import SparseRows


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
    if limit == 0:
        found = [each.at(np.arange(30, dtype=np.int32)) for each in found]
    chosen = sp.csr_array((weights, asked, offsets), shape=(3, 8))
    np.testing.assert_allclose(found, (chosen @ rows.matrix).toarray(), atol=1e-6)


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


def wide_rows(width: int, lengths: list[int]) -> SparseRows:
    generator = np.random.default_rng(2)
    columns = [np.sort(generator.choice(width, length, replace=False)) for length in lengths]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    data = generator.integers(1, 9, indptr[-1]).astype(np.float32)
    return SparseRows(data, np.concatenate(columns).astype(np.int32), indptr, width)


@pytest.mark.parametrize("block", [2, 1000])
def test_columns_in_pages_are_the_same_columns(monkeypatch, tmp_path, block):
    monkeypatch.setattr(rows_module, "_BLOCK", block)
    rows = wide_rows(200_000, [40, 0, 300, 7, 25])
    kept = rows.compact()
    assert kept.indices.dtype == np.uint16
    assert kept.pages.dtype == np.uint8
    asked, weights = np.array([2, 1, 4, 2], np.int32), np.array([1, 5, 2, 3], np.float32)
    kept.save(tmp_path)
    for found in (kept, SparseRows.load(tmp_path, width=200_000)):
        for part, same in zip(
            found.entries(asked, weights), rows.entries(asked, weights), strict=True
        ):
            assert part.dtype == same.dtype
            np.testing.assert_array_equal(part, same)
        assert (found.matrix != rows.matrix).nnz == 0
    rows.save(tmp_path)  # what was compact once is not taken for it again
    assert SparseRows.load(tmp_path, width=200_000).pages is None


def test_a_page_may_be_full():
    width = 70_000
    rows = wide_rows(width, [width])
    kept = rows.compact()
    assert kept.pages.tolist() == [[65_536, width - 65_536]]
    columns, _ = kept.entries(np.zeros(1, np.int32), np.ones(1, np.float32))
    np.testing.assert_array_equal(columns, np.arange(width))


def test_columns_stay_whole_where_counts_would_take_more():
    rows = wide_rows(10_000_000, [3, 4])
    kept = rows.compact()
    assert kept.pages is None
    assert kept.data.dtype == np.float16
    assert kept.indices is rows.indices


def test_what_is_narrow_or_does_not_fit_stays_in_single_precision(monkeypatch: pytest.MonkeyPatch):
    narrow = SparseRows(np.ones(1, np.float32), np.zeros(1, np.int32), np.array([0, 1]), 4)
    assert narrow.compact() is narrow
    monkeypatch.setattr(rows_module, "DENSE_WIDTH", 3)
    large = SparseRows(np.full(1, 1e5, np.float32), np.zeros(1, np.int32), np.array([0, 1]), 4)
    assert large.compact() is large
