import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from fusionrec.space import Choice, Range
from tuning.search import distributions, fit, rungs


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (1, [1]),
        (2, [1, 2]),
        (15, [1, 3, 9, 15]),
        (81, [3, 9, 27, 81]),
        (200, [7, 21, 63, 189, 200]),
    ],
)
def test_rungs_end_with_the_whole_fit(epochs, expected):
    assert rungs(epochs) == expected


def test_distributions_are_those_of_the_space():
    space = {"a": Range(1, 9, log=True), "b": Range(1, 9, whole=True), "c": Choice(("x", "y"))}
    assert distributions(space) == {
        "a": FloatDistribution(1, 9, log=True),
        "b": IntDistribution(1, 9),
        "c": CategoricalDistribution(("x", "y")),
    }


@pytest.mark.ray
def test_a_search_asks_for_no_more_than_there_is(ray_cluster):
    assert fit(1, None) == (1, 4)
    assert fit(1, 3) == (1, 3)
    assert fit(1, 100) == (1, 4)
    assert fit(2, None) == (2, 2)
    assert fit(64, None) == (4, 1)
