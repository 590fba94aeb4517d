import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from fusionrec.data.rowhash import HashSet, hash_column, hash_rows


@given(st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]))))
def test_equal_texts_have_equal_hashes(texts):
    hashes = hash_column(pa.array(texts, pa.string())).tolist()
    assert len(set(hashes)) == len(set(texts))
    assert [hash_column(pa.array([text], pa.string())).tolist()[0] for text in texts] == hashes


def test_slices():
    array = pa.array([str(i) * i for i in range(60)])
    assert (hash_column(array.slice(7, 20)) == hash_column(array)[7:27]).all()


def test_many_ids_differ():
    numbers = pa.array(np.arange(300_000)).cast(pa.string())
    assert len(np.unique(hash_column(numbers))) == 300_000


def test_rows_differ_by_order_and_column():
    a, b = pa.array(["x", "y", "x"]), pa.array(["y", "x", "y"])
    hashes = hash_rows([a, b])
    assert hashes[0] == hashes[2] != hashes[1]
    assert hash_rows([pa.array(["ab"]), pa.array(["c"])]) != hash_rows(
        [pa.array(["a"]), pa.array(["bc"])]
    )


@given(st.lists(st.lists(st.integers(0, 60)), max_size=12))
def test_set_is_a_set(batches):
    ours, reference = HashSet(), set()
    for batch in batches:
        expected = []
        for value in batch:
            expected.append(value not in reference)
            reference.add(value)
        assert ours.add(np.array(batch, dtype=np.uint64)).tolist() == expected
        assert len(ours) == len(reference)
    probe = np.arange(70, dtype=np.uint64)
    assert ours.contains(probe).tolist() == [i in reference for i in range(70)]
    assert set(ours.members().tolist()) == reference
