import numpy as np
import pytest

from fusionrec.data.histories import Histories
from serve_apps.cache import VectorCache

HISTORIES = Histories.of([[1, 2], [2, 1], [1, 2], [], []], texts=(None, None, "sea", "sea", None))


def test_a_vector_is_that_of_a_bundle_an_order_and_a_text():
    keys = [key for bundle in ("a", "b") for key in VectorCache.keys(bundle, HISTORIES)]
    assert keys[4] is keys[9] is None  # nothing is asked for
    found = [key for key in keys if key is not None]
    assert len(set(found)) == len(found) == 8
    assert VectorCache.keys("a", HISTORIES) == keys[:5]


@pytest.mark.parametrize("size", [0, 1, 2])
def test_it_keeps_what_was_used_last(size: int):
    cache = VectorCache(size)
    first, second, third, *_ = VectorCache.keys("a", HISTORIES)
    for number, key in enumerate((first, second)):
        cache.put(key, np.full(2, number, np.float32))
    cache.get(first)
    cache.put(third, np.full(2, 2, np.float32))
    kept = {0: [], 1: [third], 2: [first, third]}[size]
    assert len(cache) == size
    assert [key for key in (first, second, third) if cache.get(key) is not None] == kept
    cache.put(None, np.zeros(2, np.float32))
    assert cache.get(None) is None
    assert len(cache) == size
