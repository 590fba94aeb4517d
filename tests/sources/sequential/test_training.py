import numpy as np
import pytest

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.sequential.config import SASRecConfig
from fusionrec.sources.sequential.training import HeldOut, Training

TINY = SASRecConfig(width=8, num_heads=1, num_blocks=1, dropout=0, epochs=9, patience=2)


def training(rows, times=None, has_timestamps=True, num_items=30):
    empty = ("",) * num_items
    ids = tuple(map(str, range(num_items)))
    catalogue = Catalogue(ids, empty, empty, ((),) * num_items, empty)
    return TrainingData(catalogue, Histories.of(rows, times), has_timestamps)


def rows_of(histories):
    return [histories.row(row).tolist() for row in range(len(histories))]


def test_the_newest_events_of_all_are_held_out():
    rows = [[1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11, 12]]
    times = [[1, 2, 8], [1, 2, 3, 4], [98, 99], [5, 6, 7]]
    left, held = HeldOut.of(training(rows, times), share=2 / 12, seed=0)
    assert rows_of(left) == [[1, 2], [4, 5, 6, 7], [8, 9], [10, 11]]
    assert rows_of(held.histories) == [[1, 2], [10, 11]]
    assert held.targets.tolist() == [3, 12]


def test_without_times_a_seed_chooses_whose():
    data = training([[user, 20, 21] for user in range(20)], has_timestamps=False)
    chosen = [HeldOut.of(data, share=0.1, seed=seed)[1] for seed in (0, 0, 1)]
    first, again, other = (rows_of(held.histories) for held in chosen)
    assert len(first) == 6
    assert first == again
    assert first != other


def test_it_ends_when_nothing_is_gained_and_keeps_the_best(monkeypatch):
    course = Training(training([[1, 2, 3, 4], [2, 3, 4, 5]] * 20), TINY)
    values, vectors = iter([0.1, 0.3, 0.2, 0.29, 0.9]), []
    monkeypatch.setattr(course, "_measure", lambda: next(values))
    while not course.done:
        course.epoch()
        vectors.append(course.learned().vectors)
    assert [epoch.ndcg for epoch in course.epochs] == [0.1, 0.3, 0.2, 0.29]
    assert (vectors[0] != vectors[1]).any()
    for later in vectors[2:]:
        np.testing.assert_array_equal(later, vectors[1])


def test_asking_on_the_way_changes_nothing():
    data = training([[1, 2, 3, 4], [2, 3, 4, 5]] * 20)
    asked, alone = Training(data, TINY), Training(data, TINY)
    for _ in range(3):
        asked.epoch()
        asked.learned()
        alone.epoch()
    assert asked.epochs == alone.epochs
    np.testing.assert_array_equal(asked.learned().vectors, alone.learned().vectors)


def test_the_loss_falls_to_what_is_left_to_chance():
    # After 0 comes 1 or 2 as often, after 1 and 2 comes 3: ln 2 for half of the questions.
    data = training([[0, 1, 3], [0, 2, 3]] * 40, num_items=4)
    course = Training(
        data, TINY.model_copy(update={"learning_rate": 0.1, "held_out": 1e-9, "epochs": 40})
    )
    while not course.done:
        course.epoch()
    assert len(course.epochs) == 40  # nothing is held out that could end it
    assert course.epochs[-1].loss == pytest.approx(np.log(2) / 2, abs=0.05)
