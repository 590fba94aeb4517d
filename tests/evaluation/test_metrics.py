import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import AP, RR, P, R, ScoredDoc, Success, nDCG

from fusionrec.evaluation.metrics import METRICS, rating_errors
from fusionrec.evaluation.ranks import Ranks

INF = math.inf


def values(ranks, k):
    return {name: metric(Ranks.of([ranks]), k)[0] for name, metric in METRICS.items()}


@pytest.mark.parametrize(
    ("ranks", "k", "expected"),  # in the order of METRICS: ndcg, hr, mrr, map, p, r, f1
    [
        ([1], 10, (1, 1, 1, 1, 0.1, 1, 2 / 11)),
        ([3], 10, (0.5, 1, 1 / 3, 1 / 3, 0.1, 1, 2 / 11)),
        ([10], 10, (1 / math.log2(11), 1, 0.1, 0.1, 0.1, 1, 2 / 11)),
        ([10.5], 10, (0, 0, 0, 0, 0, 0, 0)),
        ([INF], 10, (0, 0, 0, 0, 0, 0, 0)),
        ([2.5], 10, (1 / math.log2(3.5), 1, 0.4, 0.4, 0.1, 1, 2 / 11)),
        (
            [4, 1, INF],
            5,
            (
                (1 + 1 / math.log2(5)) / (1 + 1 / math.log2(3) + 0.5),
                1,
                1,
                (1 / 1 + 2 / 4) / 3,
                2 / 5,
                2 / 3,
                2 * 2 / (5 + 3),
            ),
        ),
        ([1, 2, 3], 2, (1, 1, 1, 1, 1, 2 / 3, 0.8)),
        ([], 10, (0, 0, 0, 0, 0, 0, 0)),
    ],
)
def test_values_worked_out_by_hand(ranks, k, expected):
    assert list(METRICS) == ["ndcg", "hr", "mrr", "map", "precision", "recall", "f1"]
    assert tuple(values(ranks, k).values()) == pytest.approx(expected)


def test_one_value_a_case():
    ranks = Ranks.of([[1], [], [2, INF], [INF]])
    for metric in METRICS.values():
        found = metric(ranks, 5)
        assert found.shape == (4,)
        assert found.dtype == np.float64
    assert METRICS["hr"](ranks, 5).tolist() == [1, 0, 1, 0]
    assert all(metric(Ranks.of([]), 5).shape == (0,) for metric in METRICS.values())
    assert all(metric(Ranks.of([[], []]), 5).tolist() == [0, 0] for metric in METRICS.values())


@pytest.mark.parametrize("k", [1, 3, 10, 25])
def test_the_same_as_an_independent_implementation(k):
    """Against trec_eval and its relatives, through ir_measures."""
    rng = np.random.default_rng(k)
    rows, qrels, run = [], {}, []
    for case in range(60):
        listed = rng.permutation(40)[:30]
        wanted = rng.permutation(40)[: rng.integers(1, 8)]
        qrels[str(case)] = {f"d{item}": 1 for item in wanted}
        run += [
            ScoredDoc(str(case), f"d{item}", float(-place)) for place, item in enumerate(listed)
        ]
        place = {item: rank for rank, item in enumerate(listed, start=1)}
        rows.append([place.get(item, INF) for item in wanted])
    ranks = Ranks.of(rows)
    theirs = {"ndcg": nDCG @ k, "hr": Success @ k, "mrr": RR @ k, "map": AP @ k}
    theirs |= {"precision": P @ k, "recall": R @ k}
    reference = {measure: np.zeros(60) for measure in theirs.values()}
    for found in ir_measures.iter_calc(list(theirs.values()), qrels, run):
        reference[found.measure][int(found.query_id)] = found.value
    for name, measure in theirs.items():
        expected = reference[measure]
        if name == "map":  # trec_eval divides by n, this library by min(n, k)
            expected = expected * ranks.lengths / np.minimum(ranks.lengths, k)
        np.testing.assert_allclose(METRICS[name](ranks, k), expected, atol=1e-9, err_msg=name)
    p, r = reference[P @ k], reference[R @ k]
    f1 = np.divide(2 * p * r, p + r, out=np.zeros(60), where=p + r > 0)
    np.testing.assert_allclose(METRICS["f1"](ranks, k), f1, atol=1e-9)


@st.composite
def rank_lists(draw):
    """Whole, distinct ranks, of which some are not ranked."""
    ranked = draw(st.lists(st.integers(1, 40), min_size=0, max_size=12, unique=True))
    return [float(r) for r in ranked] + [INF] * draw(st.integers(0 if ranked else 1, 3))


@given(rank_lists(), st.integers(1, 20))
@settings(deadline=None)
def test_bounds(ranks, k):
    for name, value in values(ranks, k).items():
        assert 0 <= value <= 1 + 1e-12, name


@given(rank_lists(), st.integers(1, 20), st.randoms())
@settings(deadline=None)
def test_the_order_of_the_targets_does_not_matter(ranks, k, random):
    shuffled = random.sample(ranks, len(ranks))
    assert values(shuffled, k) == pytest.approx(values(ranks, k))


@given(rank_lists(), st.integers(1, 20), st.data())
@settings(deadline=None)
def test_a_better_rank_never_hurts(ranks, k, data):
    index = data.draw(st.integers(0, len(ranks) - 1))
    free = [r for r in range(1, 42) if r not in ranks and r < ranks[index]]
    if not free:
        return
    better = ranks.copy()
    better[index] = float(data.draw(st.sampled_from(free)))
    before, after = values(ranks, k), values(better, k)
    for name in METRICS:
        assert after[name] >= before[name] - 1e-12, name


@given(st.lists(rank_lists(), min_size=1, max_size=6), st.integers(1, 20), st.randoms())
@settings(max_examples=50, deadline=None)
def test_cases_do_not_touch_each_other(rows, k, random):
    order = random.sample(range(len(rows)), len(rows))
    for metric in METRICS.values():
        alone = [metric(Ranks.of([row]), k)[0] for row in rows]
        np.testing.assert_allclose(metric(Ranks.of(rows), k), alone)
        np.testing.assert_allclose(
            metric(Ranks.of([rows[i] for i in order]), k), [alone[i] for i in order]
        )


@given(rank_lists())
@settings(deadline=None)
def test_with_one_target_the_metrics_meet(ranks):
    found = values(ranks[:1], 10)
    assert found["recall"] == found["hr"]
    assert found["map"] == found["mrr"]


def test_k_is_at_least_one():
    with pytest.raises(AssertionError):
        METRICS["hr"](Ranks.of([[1]]), 0)


def test_rating_errors():
    found = rating_errors([1, 2, 5, 3], [1, 4, 4, np.nan])
    assert found["mae"] == 1
    assert found["rmse"] == pytest.approx(math.sqrt(5 / 3))
    assert all(math.isnan(value) for value in rating_errors([], []).values())
    assert math.isnan(rating_errors([np.nan, 1], [2, 2])["mae"])
    assert rating_errors([3, 3], [3, 3]) == {"mae": 0, "rmse": 0}
