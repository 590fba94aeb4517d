import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionrec.data.numbers import parse, parse_times

WORDS = [
    "1",
    "-2.5",
    "1e5",
    " 7 ",
    "nan",
    "-inf",
    "",
    "  ",
    "x",
    "1,5",
    "0x1",
    "+3",
    ".5",
    "5.",
    "9" * 30,
]


@given(st.lists(st.none() | st.sampled_from(WORDS), min_size=1))
def test_a_value_does_not_depend_on_its_neighbours(words):
    together = parse(pa.array(words, pa.string()))
    for index, word in enumerate(words):
        alone = parse(pa.array([word], pa.string()))
        assert np.array_equal(together.values[index], alone.values[0], equal_nan=True)
        for name in ("missing", "malformed", "not_finite"):
            assert getattr(together, name)[index] == getattr(alone, name)[0]


def test_what_is_wrong():
    numbers = parse(pa.array(["1", None, " ", "x", "nan", "inf", "-2.5e1"]))
    assert numbers.missing.tolist() == [False, True, True, False, False, False, False]
    assert numbers.malformed.tolist() == [False, False, False, True, False, False, False]
    assert numbers.not_finite.tolist() == [False, False, False, False, True, True, False]
    assert numbers.values[[0, 6]].tolist() == [1.0, -25.0]


def test_typed_columns():
    assert parse(pa.array([1, None])).missing.tolist() == [False, True]
    assert parse(pa.array([1.5, math.nan])).not_finite.tolist() == [False, True]
    assert parse(pa.array([True, None])).malformed.tolist() == [True, False]


@pytest.mark.parametrize(
    "texts",
    [
        ["1970-01-02", "86400", "1970-01-02T00:00:00Z", "1970-01-02 01:00:00+0100"],
        ["1970-01-02 00:00", "86400.0", "1970-01-02 00:00:00.000", "1970-01-01T23:00-01:00"],
    ],
)
def test_dates_and_numbers_in_one_column(texts):
    times = parse_times(pa.array(texts), "s")
    assert times.values.tolist() == [86400.0] * 4
    assert not times.malformed.any()


def test_dates_that_are_none():
    times = parse_times(
        pa.array(["1970-01-02", "1970-13-02", "1970-01-02 25:00", "1970-01-02x"]), "s"
    )
    assert times.malformed.tolist() == [False, True, True, True]


def test_typed_times():
    for kind in (pa.timestamp("ns"), pa.timestamp("s", "UTC"), pa.date32()):
        times = parse_times(
            pa.array([1, None])
            .cast(pa.int32())
            .cast(pa.int64())
            .cast(pa.timestamp("s"))
            .cast(kind, safe=False),
            "ms",
        )
        assert times.missing.tolist() == [False, True]
        assert times.values[0] == (0.0 if kind == pa.date32() else 1.0)
