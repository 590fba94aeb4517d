import math
import re

import pytest

from fusionrec.pages.lines import Line, line_chart, smoothed, thinned
from fusionrec.pages.svg import ticks


def points_of(chart: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline class="line \w+" points="([^"]*)"', chart)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in found]


@pytest.mark.parametrize(
    ("bottom", "top", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 0.07, [0, 0.02, 0.04, 0.06, 0.08]),
        (3.9, 4.1, [3.9, 3.95, 4.0, 4.05, 4.1]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_enclose(bottom, top, expected):
    assert ticks(top, bottom) == pytest.approx(expected)


def test_a_line_goes_from_corner_to_corner():
    [line] = points_of(line_chart("loss", [Line("loss", [(1, 0.0), (2, 0.5), (3, 1.0)])]))
    assert line == [(60, 210), (480, 120), (900, 30)]


def test_what_is_not_finite_is_left_out():
    points = [(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)]
    [line] = points_of(line_chart("loss", [Line("loss", points)]))
    assert len(line) == 2
    chart = line_chart("loss", [Line("loss", [(1, math.nan)])])
    assert points_of(chart) == []


def test_names_stand_at_the_ends_and_are_escaped():
    lines = [Line("a < b", [(1, 1.0), (9, 2.0)]), Line("c", [(1, 1.0), (9, 2.0)], "best")]
    chart = line_chart("x & y", lines, at=(5,))
    assert "a &lt; b" in chart
    assert "x &amp; y" in chart
    assert chart.count('class="mark"') == 1
    heights = re.findall(r'<text class="label \w+" x="798.0" y="([\d.]+)"', chart)
    assert len(heights) == 2
    assert abs(float(heights[0]) - float(heights[1])) >= 16


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_constant_is_drawn(value):
    [line] = points_of(line_chart("skipped", [Line("skipped", [(1, value), (2, value)])]))
    assert all(30 <= y <= 210 for _, y in line)
    chart = line_chart("skipped", [Line("skipped", [(1, value)])])
    assert "<circle" in chart


def test_thinning_keeps_ends_order_and_spikes():
    points = [(float(i), 0.0) for i in range(10_000)]
    points[4_321] = (4_321.0, 9.0)
    found = thinned(points)
    assert len(found) <= 400
    assert found == sorted(found)
    assert (4_321.0, 9.0) in found
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert thinned(points[:400]) == points[:400]


def test_smoothing_is_a_mean_of_the_last():
    points = [(1, 1.0), (2, 3.0), (3, math.nan), (4, 5.0), (5, 1.0)]
    assert smoothed(points, 2) == [(2, 2.0), (4, 4.0), (5, 3.0)]
    assert smoothed(points, 9) == []
