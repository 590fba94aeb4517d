import numpy as np

from fusionrec.retrieval.halves import single


def test_every_finite_half_is_the_same_number_in_single_precision():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    found = single(halves)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), halves.astype(np.float32).view(np.uint32))


def test_what_is_single_already_is_not_copied():
    numbers = np.ones(3, np.float32)
    assert single(numbers) is numbers


def test_rows_and_parts_keep_their_shape():
    halves = np.arange(12, dtype=np.float16).reshape(3, 4)
    np.testing.assert_array_equal(single(halves[::2, 1:]), [[1, 2, 3], [9, 10, 11]])
    assert single(np.empty((0, 4), np.float16)).shape == (0, 4)
