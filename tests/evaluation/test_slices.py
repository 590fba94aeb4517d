import numpy as np

from fusionrec.data.histories import Histories
from fusionrec.data.splits import Cases
from fusionrec.evaluation.slices import popularity_bands, slices


def test_bands_hold_a_third_of_the_events_each():
    counts = np.array([10, 5, 5, 4, 3, 2, 1, 0])
    assert popularity_bands(counts).tolist() == [2, 1, 1, 0, 0, 0, 0, -1]


def test_bands_of_nothing():
    assert popularity_bands(np.zeros(3, np.int64)).tolist() == [-1, -1, -1]
    assert popularity_bands(np.array([7])).tolist() == [2]


def test_groups_part_the_targets(cases, item_counts):
    parts = slices(cases, item_counts)
    groups = {part.group for part in parts}
    assert groups == {"history length", "target popularity", "target"}
    for group in groups:
        total = sum(part.mask.astype(int) for part in parts if part.group == group)
        warm = item_counts[cases.targets.items] > 0
        assert (total == (warm if group == "target popularity" else 1)).all()
    assert all(part.mask.any() for part in parts)


def test_an_empty_history_is_a_slice_of_its_own():
    cases = Cases(
        np.arange(3), Histories.of([[], [1, 2], range(60)]), Histories.of([[0], [3, 5], [99]])
    )
    counts = np.ones(100, np.int64)
    counts[5] = 0
    parts = {(part.group, part.name): part.mask.tolist() for part in slices(cases, counts)}
    assert parts["history length", "0"] == [True, False, False, False]
    assert parts["history length", "1–4"] == [False, True, True, False]
    assert parts["history length", "50+"] == [False, False, False, True]
    assert parts["target", "cold"] == [False, False, True, False]
    assert ("history length", "10–19") not in parts
