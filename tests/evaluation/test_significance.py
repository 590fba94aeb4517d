import numpy as np
import pytest
from pydantic import ValidationError

from fusionrec.evaluation.significance import (
    BootstrapConfig,
    Comparison,
    bootstrap_means,
    compare,
    estimate,
    p_value,
)

CONFIG = BootstrapConfig(draws=1000, seed=3)


def pair(size, gain, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    hard = rng.random(size)  # what makes a case hard for both
    return np.stack([hard + gain + noise * rng.standard_normal(size), hard], axis=1)


def test_draws_are_resamples_with_replacement():
    values = np.eye(4)  # the mean of column b is the share of case b in the draw
    draws = bootstrap_means(values, CONFIG)
    assert draws.shape == (1000, 4)
    np.testing.assert_allclose(draws.sum(axis=1), 1)
    np.testing.assert_allclose(draws.mean(axis=0), 0.25, atol=0.02)
    np.testing.assert_allclose((draws * 4) % 1, 0, atol=1e-12)


def test_the_seed_decides_and_columns_are_paired():
    values = pair(50, 0)
    np.testing.assert_array_equal(bootstrap_means(values, CONFIG), bootstrap_means(values, CONFIG))
    other = bootstrap_means(values, CONFIG.model_copy(update={"seed": 4}))
    assert not np.array_equal(other, bootstrap_means(values, CONFIG))
    alone = bootstrap_means(values[:, :1], CONFIG)[:, 0]
    np.testing.assert_allclose(alone, bootstrap_means(values, CONFIG)[:, 0])


def test_blocks_change_nothing(monkeypatch):
    values = pair(50, 0)
    whole = bootstrap_means(values, CONFIG)
    monkeypatch.setattr("fusionrec.evaluation.significance.BLOCK_BYTES", 50 * 8 * 7)
    np.testing.assert_allclose(bootstrap_means(values, CONFIG), whole)


def test_the_interval_is_as_wide_as_the_standard_error_says():
    values = np.random.default_rng(1).standard_normal((400, 1))
    draws = bootstrap_means(values, CONFIG)[:, 0]
    found = estimate(values.mean(), draws, 0.95)
    error = values.std() / np.sqrt(400)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_intervals_cover_as_often_as_they_promise():
    rng = np.random.default_rng(5)
    config = BootstrapConfig(draws=300, level=0.8)
    hits = 0
    for _ in range(200):
        values = rng.exponential(size=(80, 1))
        found = estimate(values.mean(), bootstrap_means(values, config)[:, 0], 0.8)
        hits += found.low <= 1 <= found.high
    assert 0.7 <= hits / 200 <= 0.88


def test_pairing_finds_what_two_separate_intervals_hide():
    values = pair(200, gain=0.03)
    draws = bootstrap_means(values, CONFIG)
    a, b = (estimate(values[:, i].mean(), draws[:, i], 0.95) for i in range(2))
    assert a.low < b.high  # the intervals overlap
    found = compare("ndcg", ("a", "b"), values, CONFIG)
    assert found.significant
    assert found.p_value < 0.05
    assert found.difference.low < found.difference.mean < found.difference.high
    assert found.ratio is not None
    assert found.ratio.mean == pytest.approx(found.mean_a / found.mean_b)


def test_a_system_is_not_better_than_itself():
    values = np.repeat(np.random.default_rng(0).random((30, 1)), 2, axis=1)
    found = compare("ndcg", ("a", "a"), values, CONFIG)
    assert found.difference.mean == found.difference.low == found.difference.high == 0
    assert found.p_value == 1
    assert not found.significant
    assert found.ratio.low == found.ratio.high == 1


def test_noise_is_rarely_significant():
    found = [compare("m", ("a", "b"), pair(60, 0, seed=s), CONFIG).significant for s in range(100)]
    assert sum(found) <= 12


def test_p_values():
    assert p_value(np.array([1.0] * 99)) == pytest.approx(0.02)
    assert p_value(np.array([-1.0, 1.0])) == 1
    assert p_value(np.zeros(10)) == 1
    assert p_value(np.array([-1.0] * 5 + [1.0] * 94)) == pytest.approx(0.12)


def test_a_ratio_to_nothing_is_left_out():
    found = compare("m", ("a", "b"), np.array([[1.0, 0.0], [0.0, 0.0]]), CONFIG)
    assert found.ratio is None
    assert found.difference.mean == 0.5


def test_one_case():
    found = compare("m", ("a", "b"), np.array([[0.5, 0.25]]), CONFIG)
    assert found.difference.low == found.difference.high == 0.25


def test_no_case():
    with pytest.raises(AssertionError):
        bootstrap_means(np.empty((0, 2)), CONFIG)


def test_round_trip():
    found = compare("ndcg", ("a", "b"), pair(50, 0.1), CONFIG)
    assert Comparison.model_validate_json(found.model_dump_json()) == found
    with pytest.raises(ValidationError):
        BootstrapConfig(draws=3)
