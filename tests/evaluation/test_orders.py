import numpy as np
import pytest
from scipy.stats import kendalltau

from fusionrec.data.histories import Histories
from fusionrec.evaluation.orders import order_sensitivity

ITEMS = np.array([[4, 7, 1, 3], [2, 9, -1, -1], [5, -1, -1, -1]], np.int32)
HISTORIES = Histories.of([[0], [1], [2]])


def by_item(_histories, items):
    return items.astype(np.float32)


def by_place(_histories, items):
    return np.tile(-np.arange(items.shape[1], dtype=np.float32), (len(items), 1))


def test_who_reads_the_items_alone_says_the_same_in_every_order():
    found = order_sensitivity(by_item, HISTORIES, ITEMS)
    assert (found.num_cases, found.num_orders) == (2, 4)
    assert found.tau == found.same_first == 1


def test_who_likes_a_place_says_what_the_order_is():
    """The rankings are the random orders themselves: uncorrelated, with R different firsts."""
    rows = np.tile(np.arange(5, dtype=np.int32), (400, 1))
    histories = Histories.of([[9]] * 400)
    found = order_sensitivity(by_place, histories, rows, num_orders=3)
    assert found.tau == pytest.approx(0, abs=0.05)
    assert found.same_first == pytest.approx(1 / 5, abs=0.05)


def test_tau_is_scipys_and_ties_are_ties():
    """Half item, half place, rounded: with two orders there is one pair, and scipy knows it."""
    asked = []

    def mixed(_histories, items):
        places = np.arange(items.shape[1])
        scores = np.where(items >= 0, (items + places) // 3, 0).astype(np.float32)
        asked.append([dict(zip(row, s, strict=True)) for row, s in zip(items, scores, strict=True)])
        return scores

    rows = np.array([[3, 8, 0, 6, 2], [1, 5, 9, 4, -1]], np.int32)
    found = order_sensitivity(mixed, HISTORIES.slice(0, 2), rows, num_orders=2, seed=3)
    expected = [
        kendalltau([a[code] for code in row if code >= 0], [b[code] for code in row if code >= 0])
        for row, a, b in zip(rows.tolist(), *asked, strict=True)
    ]
    assert found.tau == pytest.approx(np.mean([each.statistic for each in expected]))


def test_where_nothing_is_said_nothing_is_measured():
    assert order_sensitivity(lambda _, i: i * np.float32(0), HISTORIES, ITEMS) is None
    assert order_sensitivity(by_item, HISTORIES.slice(2, 3), ITEMS[2:]) is None
