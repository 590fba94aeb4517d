"""Biases, factors and neighbours on problems with known answers."""

import numpy as np
import pytest

from fusionrec.evaluation import collaborative
from fusionrec.evaluation.collaborative import Biases, Factors, ItemKnn, Rated


def rated(table: np.ndarray) -> Rated:
    """Of a table [U, I] with NaN where there is no rating."""
    users, items = np.nonzero(~np.isnan(table))
    return Rated(users, items, table[users, items], table.shape)


@pytest.fixture
def sparse() -> Rated:
    generator = np.random.default_rng(0)
    table = generator.integers(1, 6, (7, 9)).astype(float)
    table[generator.random(table.shape) < 0.5] = np.nan
    table[3], table[:, 4] = np.nan, np.nan  # a user and an item of whom nothing is known
    return rated(table)


def test_biases_minimise_their_objective(sparse):
    found = Biases.fit(sparse, damping=2.0)
    # The normal equations of all biases at once.
    design = np.zeros((len(sparse.values), 16))
    design[np.arange(len(design)), sparse.users] = 1
    design[np.arange(len(design)), 7 + sparse.items] = 1
    above = sparse.values - sparse.values.mean()
    exact = np.linalg.solve(design.T @ design + 2.0 * np.eye(16), design.T @ above)
    np.testing.assert_allclose(np.r_[found.of_users, found.of_items], exact, atol=1e-9)
    assert found.predict(np.array([3]), np.array([4])) == pytest.approx(sparse.values.mean())


def test_factors_find_a_matrix_of_their_rank():
    generator = np.random.default_rng(1)
    whole = generator.normal(size=(12, 2)) @ generator.normal(size=(2, 10))
    hidden = whole.copy()
    hidden[[0, 5, 7], [1, 2, 3]] = np.nan
    nothing = Biases(0.0, np.zeros(12), np.zeros(10))
    found = Factors.fit(rated(hidden), nothing, rank=2, damping=1e-9, epochs=200)
    users, items = np.nonzero(np.isnan(hidden))
    np.testing.assert_allclose(found.predict(users, items), whole[users, items], atol=1e-3)


@pytest.mark.parametrize("at_once", [1, 2**15])
def test_factors_of_items_minimise_their_half(sparse, monkeypatch, at_once):
    monkeypatch.setattr(collaborative, "_AT_ONCE", at_once)
    biases = Biases.fit(sparse)
    found = Factors.fit(sparse, biases, rank=3, damping=0.2, epochs=2)
    left = sparse.values - biases.predict(sparse.users, sparse.items)
    for item in range(9):
        own = sparse.items == item
        factors = found.of_users[sparse.users[own]]
        penalty = 0.2 * own.sum() * np.eye(3)
        exact = np.zeros(3)
        if own.any():
            exact = np.linalg.solve(factors.T @ factors + penalty, factors.T @ left[own])
        np.testing.assert_allclose(found.of_items[item], exact, atol=1e-9)
    # Who has rated nothing, and what nobody has rated, has no say.
    assert found.predict(np.array([3]), np.array([4])) == pytest.approx(biases.mean)


def test_neighbours_by_hand():
    nothing = Biases(3.0, np.zeros(4), np.zeros(3))
    table = np.array([[4, 4, np.nan], [2, 2, 4], [5, 4, np.nan], [np.nan, 5, 2]])
    found = ItemKnn.fit(rated(table), nothing, neighbours=2, shrinkage=3.0)
    # Items 0 and 1: users 0, 1, 2 with (1, 1), (−1, −1), (2, 1): 4 / √(6 · 3), shrunk by 3 / 6.
    # Items 0 and 2 have user 1 in common, with (−1, 1): below 0, and so left out.
    likeness = 4 / np.sqrt(18) / 2
    np.testing.assert_allclose(
        found._similarities(np.array([0]))[0, 1:], [likeness, -1 / 4], atol=1e-12
    )
    # Of the items that user 3 has rated, only 1 is like 0: 2 above what was to be expected.
    assert found.predict(np.array([3]), np.array([0])) == pytest.approx(5.0)
    # Of user 0's, 1 is like 2 by its common users 1 and 3, (−1, 1) and (2, −1): below 0.
    assert found.predict(np.array([0]), np.array([2])) == pytest.approx(3.0)


def test_the_nearest_count():
    nothing = Biases(0.0, np.zeros(4), np.zeros(3))
    table = np.array([[1, 1, 1], [2, 2, 2], [3, 3, -1], [np.nan, 4, 2]])
    two = ItemKnn.fit(rated(table), nothing, neighbours=2, shrinkage=1.0)
    one = ItemKnn.fit(rated(table), nothing, neighbours=1, shrinkage=1.0)
    near, far = two._similarities(np.array([0]))[0, 1:]
    assert near > far > 0
    asked = np.array([3]), np.array([0])
    assert one.predict(*asked) == pytest.approx(4.0)
    assert two.predict(*asked) == pytest.approx((4 * near + 2 * far) / (near + far))
