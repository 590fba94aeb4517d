import dataclasses

import numpy as np
import pytest

from fusionrec.data.histories import Histories
from fusionrec.errors import TrainingError
from fusionrec.training.examples import Examples

TRAIN = Histories.of([[3, 1, 4, 1, 5], [2], [], [0, 9, 8]])


def make(**changes) -> Examples:
    settings = {"per_user": 3, "limit": 100, "generator": np.random.default_rng(0)}
    return Examples.of(TRAIN, **(settings | changes))


def test_the_newest_events_with_all_that_came_before():
    examples = make()
    # The second 1 of the first user is no answer: it is in the history already.
    assert examples.positives.tolist() == [4, 5, 9, 8]
    assert [examples.histories.row(i).tolist() for i in range(4)] == [
        [3, 1],
        [3, 1, 4, 1],
        [0],
        [0, 9],
    ]
    assert examples.users.tolist() == [0, 0, 3, 3]


def test_limits():
    assert make(per_user=1).positives.tolist() == [5, 8]
    assert len(make(limit=2)) == 2
    has_text = np.ones(10, dtype=bool)
    has_text[[5, 8]] = False
    assert make(with_text=has_text).positives.tolist() == [4, 9]
    assert [len(make().newest(2).histories.row(i)) for i in range(4)] == [2, 2, 1, 2]


def test_nothing_to_learn_from():
    with pytest.raises(TrainingError, match="larger data set"):
        Examples.of(
            Histories.of([[1], [2, 2]]), per_user=3, limit=9, generator=np.random.default_rng(0)
        )


def test_negatives_are_unseen_and_in_order():
    examples = make()
    candidates = np.array([[1, 7, 6, 5], [7, -1, 2, 0], [9, 8, 0, -1], [6, 5, 4, 3]], np.int32)
    with_negatives = examples.with_negatives(candidates, 2)
    # The third example has none left: its user had all of its candidates.
    assert with_negatives.positives.tolist() == [4, 5, 8]
    assert with_negatives.negatives.tolist() == [[7, 6], [7, 2], [6, 5]]


def test_round_trip(tmp_path):
    examples = make().with_negatives(np.full((4, 3), 7, np.int32), 2)
    examples.save(tmp_path)
    again = Examples.load(tmp_path)
    assert again.fingerprint == examples.fingerprint
    assert again.histories.row(1).tolist() == examples.histories.row(1).tolist()
    assert again.fingerprint != make().fingerprint


def test_what_stands_beside_examples_goes_with_them(tmp_path):
    ratings = np.arange(4, dtype=np.float32)
    rated = dataclasses.replace(make(), ratings=ratings, expected=ratings + 1)
    assert rated.fingerprint != make().fingerprint
    taken = rated.take(np.array([3, 1]))
    assert taken.ratings.tolist() == [3.0, 1.0]
    assert taken.scores is None
    rated.save(tmp_path)
    assert Examples.load(tmp_path).expected.tolist() == [1.0, 2.0, 3.0, 4.0]
