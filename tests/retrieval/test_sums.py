import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrec.retrieval import sums as sums_module
from fusionrec.retrieval.sums import add_up, total

WAYS = pytest.mark.parametrize("dense_from", [0.0, 100.0], ids=["scattered", "sorted"])
ENTRIES = st.lists(st.tuples(st.integers(0, 9), st.integers(-4, 6)), max_size=40)


def arrays(entries):
    return (
        np.array([column for column, _ in entries], np.int32),
        np.array([value / 8 for _, value in entries], np.float32),
    )


def by_hand(entries):
    sums = np.zeros(10)
    for column, value in entries:
        sums[column] += value / 8
    return sums


@WAYS
@settings(max_examples=60, deadline=None)
@given(ENTRIES, st.integers(1, 5), st.lists(st.integers(0, 9), max_size=3))
def test_the_largest_are_all_there_with_their_ties(dense_from, entries, k, seen):
    without = np.array(seen, np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums_module, "_DENSE_FROM", dense_from)
        columns, found = add_up(*arrays(entries), 10).largest(k, without)
    sums = by_hand(entries)
    sums[seen] = 0
    np.testing.assert_array_equal(found, sums[columns])
    assert len(set(columns.tolist())) == len(columns)
    assert (found > 0).all()
    edge = np.sort(sums)[-k]
    assert set(np.flatnonzero((sums > 0) & (sums >= edge)).tolist()) <= set(columns.tolist())


@WAYS
def test_columns_that_are_met_often_do_not_crowd_out_others(monkeypatch, dense_from):
    monkeypatch.setattr(sums_module, "_DENSE_FROM", dense_from)
    columns = np.repeat(np.arange(10, dtype=np.int32), [1, 1, 1, 1, 1, 1, 1, 1, 90, 90])
    found, _ = add_up(columns, np.ones(len(columns), np.float32), 10).largest(5, columns[:1])
    assert {8, 9} < set(found.tolist())
    assert len(found) >= 5


@WAYS
@settings(max_examples=60, deadline=None)
@given(ENTRIES, st.lists(st.integers(-1, 9), min_size=1, max_size=6), st.booleans())
def test_places_are_looked_up_also_after_the_largest(dense_from, entries, wanted, keep):
    places = np.array(wanted, np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums_module, "_DENSE_FROM", dense_from)
        summed = add_up(*arrays(entries), 10, keep=keep)
    summed.largest(2, np.maximum(places, 0))
    found = summed.at(places)
    sums = by_hand(entries)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [sums[column] if column >= 0 else 0 for column in wanted])


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
