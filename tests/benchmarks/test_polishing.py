import numpy as np

from benchmarks.harness.candidates import made_up
from benchmarks.polishing import Asked, compare, questions
from fusionrec.data.histories import Histories


def test_questions_are_the_newest_events_after_what_came_before_them():
    histories = Histories.of([[1, 2, 3, 4], [5, 6]])
    newest, before = questions(histories, 2)
    assert newest.users.tolist() == before.users.tolist() == [0]
    assert newest.histories.items.tolist() == [1, 2, 3]
    assert newest.targets.items.tolist() == [4]
    assert before.histories.items.tolist() == [1, 2]
    assert before.targets.items.tolist() == [3]


def asked(seed):
    material = made_up(60, 60, seed, num_sources=3)
    material.candidates.scores[2] = np.random.default_rng(seed).pareto(2, (60, 60))  # noise
    proposed = material.candidates.scores > 0
    proposed[2] = True
    return Asked(material.candidates, proposed, material.targets, material.cold)


def test_ways_are_measured_where_they_did_not_choose():
    values = compare([asked(seed) for seed in range(3)], 3, trials=20, seeds=1)
    assert values["polished"].own >= max(values["best trial"].own, values["equal weights"].own)
    assert np.mean([row.own for row in values.values()]) > np.mean(
        [row.elsewhere for row in values.values()]
    )
    *whole, fewer = values.values()
    assert not any(row.off.any() for row in whole)
    assert fewer.off[2] > 0
    assert not fewer.off[:2].any()


def test_what_only_a_source_proposed_goes_with_it():
    found = asked(0)
    every, two = np.ones(3, dtype=bool), np.array([True, True, False])
    assert found.objective(two) is found.objective(two)
    assert (
        np.isfinite(found.objective(two).terms[0]).sum()
        < np.isfinite(found.objective(every).terms[0]).sum()
    )
