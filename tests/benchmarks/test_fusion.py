import pytest

from benchmarks.fusion import FusionBenchmark, drawn, measure, ranx_ms
from benchmarks.harness.candidates import made_up
from fusionrec.fusion.normalisation import scales
from tuning.fusion import space


def test_settings_are_drawn_from_the_space_that_is_searched():
    sources = ("a", "b")
    settings = drawn(sources, 8, seed=0)
    for each in settings:
        assert each.keys() == space(sources).keys()
        assert all(space(sources)[name].to_internal_repr(each[name]) is not None for name in each)
    assert {each["normalisation"] for each in settings} == set(
        space(sources)["normalisation"].choices
    )


@pytest.mark.ray
def test_the_ways_are_measured_on_the_same_candidates(ray_cluster, tmp_path):
    report = measure(FusionBenchmark(cases=40, out=tmp_path, trials=50, ranx=False))
    assert "40 cases, 7 sources, 580 candidates a case" in report
    assert "| a trial of tuning.fusion, one thread |" in report
    assert "| one Ray task per trial |" in report
    assert "A trial under 25 ms: held." in report


@pytest.mark.slow  # it compiles itself first
@pytest.mark.filterwarnings("ignore")  # of numba, which it compiles with
def test_ranx_weighs_the_same_candidates():
    pytest.importorskip("ranx")
    material = made_up(20, 30, seed=0, num_sources=2, num_items=100)
    assert 0 < ranx_ms(material, scales(material.candidates)) < 60_000
