import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrec.data.histories import Histories
from fusionrec.sources.sequential.batches import Windows


def questions(histories, max_length, max_events, *, last_only=False, seed=0):
    """Every question: what the window shows up to it, and its answer."""
    windows = Windows(histories, max_length, last_only=last_only)
    found = []
    for batch in windows.batches(max_events, np.random.default_rng(seed)):
        assert batch.events.shape == batch.following.shape == batch.asked.shape
        for row, place in zip(*np.nonzero(batch.asked), strict=True):
            shown = tuple(batch.events[row, : place + 1].tolist())
            found.append((shown, int(batch.following[row, place])))
    return found


def test_every_position_asks_for_the_next():
    found = questions(Histories.of([[5, 6, 7], [], [1], [8, 9]]), 10, 100)
    assert sorted(found) == [((5,), 6), ((5, 6), 7), ((8,), 9)]


def test_the_last_position_alone():
    found = questions(Histories.of([[5, 6, 7], [8, 9]]), 10, 100, last_only=True)
    assert sorted(found) == [((5, 6), 7), ((8,), 9)]


def test_a_long_history_is_cut_from_its_newest_event():
    found = questions(Histories.of([[0, 1, 2, 3, 4, 5]]), 3, 100)
    assert max(found) == ((2, 3, 4), 5)
    assert sorted(answer for _, answer in found) == [1, 2, 3, 4, 5]
    assert ((0, 1), 2) in found


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 50), max_size=12), min_size=1, max_size=8),
    st.integers(1, 6),
    st.integers(1, 20),
)
def test_each_question_is_asked_once_whatever_the_batches(rows, max_length, max_events):
    found = questions(Histories.of(rows), max_length, max_events)
    expected = sorted(item for row in rows for item in row[1:])
    assert sorted(answer for _, answer in found) == expected
    for batch in Windows(Histories.of(rows), max_length, last_only=False).batches(
        max_events, np.random.default_rng(1)
    ):
        assert batch.events.size <= max(max_events, batch.events.shape[1])


def test_the_order_follows_the_generator():
    histories = Histories.of([[item, item + 1] for item in range(20)])
    assert questions(histories, 5, 4, seed=1) == questions(histories, 5, 4, seed=1)
    assert questions(histories, 5, 4, seed=1) != questions(histories, 5, 4, seed=2)
