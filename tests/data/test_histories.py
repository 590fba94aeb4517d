"""Histories against plain lists: whatever the batch, the CSR says what nested lists would."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrec.data.histories import Histories

batches = st.lists(st.lists(st.integers(0, 99), max_size=7), max_size=6)


def rows(histories: Histories) -> list[list[int]]:
    return [histories.row(index).tolist() for index in range(len(histories))]


def times(histories: Histories) -> list[list[int]]:
    return [part.tolist() for part in np.split(histories.timestamps, histories.offsets[1:-1])]


def test_known_answers() -> None:
    histories = Histories.of([[3, 1, 4], [], [1, 5]], [[10, 20, 30], [], [5, 6]], ["a", None, "b"])
    assert len(histories) == 3
    assert histories.offsets.tolist() == [0, 3, 3, 5]
    assert histories.lengths.tolist() == [3, 0, 2]
    assert histories.rows.tolist() == [0, 0, 0, 2, 2]
    assert histories.ages.tolist() == [2, 1, 0, 1, 0]
    assert rows(histories.newest(2)) == [[1, 4], [], [1, 5]]
    assert times(histories.newest(1)) == [[30], [], [6]]
    assert rows(histories.without_last(2)) == [[3], [], []]
    turned = histories.take([2, 0, 2])
    assert rows(turned) == [[1, 5], [3, 1, 4], [1, 5]]
    assert turned.texts == ("b", "a", "b")


def test_types_are_the_ones_that_travel() -> None:
    for histories in (Histories.of([]), Histories.of([[]]), Histories.of([[1], [2, 3]])):
        for one in (
            histories,
            histories.newest(1),
            histories.without_last(),
            histories.slice(0, 0),
        ):
            assert one.items.dtype == np.int32
            assert one.timestamps.dtype == np.int64
            assert one.offsets.dtype == np.int64


@settings(deadline=None)  # a busy machine is no fault of the code
@given(batches)
def test_of_round_trips(batch: list[list[int]]) -> None:
    histories = Histories.of(batch)
    assert rows(histories) == batch
    assert [a for row in batch for a in range(len(row) - 1, -1, -1)] == histories.ages.tolist()
    assert [r for r, row in enumerate(batch) for _ in row] == histories.rows.tolist()


@settings(deadline=None)
@given(batches, st.integers(0, 9))
def test_newest_and_without_last_part_a_history(batch: list[list[int]], count: int) -> None:
    histories = Histories.of(batch)
    assert rows(histories.newest(count)) == [row[max(0, len(row) - count) :] for row in batch]
    assert rows(histories.without_last(count)) == [row[: max(0, len(row) - count)] for row in batch]
    together = [
        old + new
        for old, new in zip(
            rows(histories.without_last(count)), rows(histories.newest(count)), strict=True
        )
    ]
    assert together == batch


@settings(deadline=None)
@given(batches, st.data())
def test_take_and_slice_agree_with_lists(batch: list[list[int]], data: st.DataObject) -> None:
    vectors = np.arange(len(batch) * 2, dtype=np.float32).reshape(len(batch), 2)
    histories = Histories.of(batch, texts=[str(i) for i in range(len(batch))])
    histories = histories.with_vectors(vectors)
    position = st.integers(0, max(0, len(batch) - 1))
    picks = data.draw(st.lists(position, max_size=8 if batch else 0))
    taken = histories.take(picks)
    assert rows(taken) == [batch[i] for i in picks]
    assert times(taken) == [list(range(len(batch[i]))) for i in picks] or not picks
    assert taken.texts == tuple(str(i) for i in picks)
    assert taken.vectors is not None
    np.testing.assert_array_equal(taken.vectors, vectors[picks])
    start = data.draw(st.integers(0, len(batch)))
    stop = data.draw(st.integers(start, len(batch)))
    sliced, same = histories.slice(start, stop), histories.take(range(start, stop))
    assert rows(sliced) == rows(same)
    assert sliced.texts == same.texts
    assert sliced.offsets.tolist() == same.offsets.tolist()


def test_what_does_not_fit_together_is_refused() -> None:
    items, stamps = np.zeros(2, np.int32), np.zeros(2, np.int64)
    with pytest.raises(AssertionError):
        Histories(items, stamps, np.array([0, 1]))
    with pytest.raises(AssertionError):
        Histories(items, stamps[:1], np.array([0, 2]))
    with pytest.raises(AssertionError):
        Histories(items, stamps, np.array([0, 2]), texts=("one", "too many"))
