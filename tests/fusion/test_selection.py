import numpy as np

from benchmarks.harness.candidates import made_up
from fusionrec.fusion import selection
from fusionrec.fusion.normalisation import Normalisation, scales
from fusionrec.fusion.objective import Objective
from fusionrec.fusion.refine import Setting, bagged
from fusionrec.fusion.selection import select

SIGNAL = np.array([True, True, True, False])


def problem(seed, num_cases=200):
    """Three sources that tend to like the target, and one that likes anything."""
    material = made_up(num_cases, 60, seed, num_sources=4)
    candidates = material.candidates
    candidates.scores[3] = np.random.default_rng(seed).pareto(2, candidates.items.shape)
    normalised = Normalisation.SCALE, scales(candidates)
    return Objective.of(candidates, material.targets, *normalised, material.cold)


START = Setting(np.ones(4, np.float32))


def test_noise_goes_off_that_bagging_trusts():
    off, turns = [], []
    for seed in range(6):
        objective = problem(seed)
        assert bagged(objective, START, 0).weights[3] > 0
        found = select(objective, START, 0, lambda: turns.append(1))
        assert found.keep[SIGNAL].all()
        assert (found.adds[SIGNAL] > 0.01).all()
        assert found.keep[3] == (found.adds[3] > 0)
        assert found.adds[3] < 0.01
        off.append(not found.keep[3])
    assert np.mean(off) >= 0.5  # a few of 200 cases suffice to speak for it, out of bag as well
    assert len(turns) == 6 * 4


def test_what_most_of_many_cases_say_is_asked_of_a_sample_of_them(monkeypatch):
    objective = problem(0, 400)
    monkeypatch.setattr(selection, "MAX_CASES", 200)
    found = select(objective, START, 0)
    assert found.keep.tolist() == SIGNAL.tolist()
    monkeypatch.setattr(selection, "MAX_CASES", 400)
    of_all = select(objective, START, 0)
    assert of_all.keep.tolist() == SIGNAL.tolist()
    np.testing.assert_allclose(found.adds, of_all.adds, atol=0.04)  # a mean over those asked


def test_a_lone_source_stays():
    found = select(problem(0).of_sources(~SIGNAL), Setting(np.ones(1, np.float32)), 0)
    assert found.keep.tolist() == [True]
