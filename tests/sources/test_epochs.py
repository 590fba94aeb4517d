"""What is held out of histories, and when a training ends by it."""

from types import SimpleNamespace

import pytest
import torch

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.sources.epochs import HeldOut, Training, gains
from fusionrec.sources.protocol import TrainingData


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


class Counter:
    """Learns to count the epochs, and is found as good as it is told."""

    def __init__(self, values, num_held_out=1):
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        self.has_questions, self.num_held_out = True, num_held_out
        self._values = iter(values)

    def learn(self, _):
        with torch.no_grad():
            self.model.weight += 1
        return 0.5

    def measure(self):
        return next(self._values)

    def learned(self, state):
        return 0 if state is None else int(state["weight"])


SETTINGS = SimpleNamespace(epochs=9, patience=2, seed=0)


def test_it_ends_when_nothing_is_gained_and_keeps_the_best():
    course = Training(Counter([0.1, 0.3, 0.2, 0.29, 0.9]), SETTINGS)
    assert course.learned() == 0
    learned = []
    while not course.done:
        course.epoch()
        learned.append(course.learned())
    assert [epoch.ndcg for epoch in course.epochs] == [0.1, 0.3, 0.2, 0.29]
    assert learned == [1, 2, 2, 2]


def test_nothing_held_out_ends_nothing():
    assert Training(Counter([0.0] * 9, num_held_out=0), SETTINGS).run("training") == 9


def test_steps_stay_as_they_are_once_it_has_ended():
    course = Training(Counter([0.1, 0.3, 0.2, 0.29]), SETTINGS)
    assert list(course.in_steps((1, 3, 99))) == [1, 2, 2]


def test_a_target_is_ranked_among_what_can_be_ranked():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, -torch.inf, 1.0]])
    found = gains(scores, torch.tensor([0, 2, 1]))
    assert found.tolist() == pytest.approx([1, 0.5, 0])
