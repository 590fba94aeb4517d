import numpy as np

from benchmarks.harness.candidates import made_up
from benchmarks.polishing import compare, questions
from fusionrec.data.histories import Histories
from fusionrec.fusion.normalisation import Normalisation, scales
from fusionrec.fusion.objective import Objective


def test_questions_are_the_newest_events_after_what_came_before_them():
    histories = Histories.of([[1, 2, 3, 4], [5, 6]])
    newest, before = questions(histories, 2)
    assert newest.users.tolist() == before.users.tolist() == [0]
    assert newest.histories.items.tolist() == [1, 2, 3]
    assert newest.targets.items.tolist() == [4]
    assert before.histories.items.tolist() == [1, 2]
    assert before.targets.items.tolist() == [3]


def test_ways_are_measured_where_they_did_not_choose():
    found = []
    for seed in range(3):
        material = made_up(40, 100, seed, num_sources=3)
        normalised = Normalisation.SCALE, scales(material.candidates)
        of_seed = Objective.of(material.candidates, material.targets, *normalised, material.cold)
        found.append(of_seed)
    values = compare(found, trials=20, seeds=1)
    own, elsewhere = zip(*values.values(), strict=True)
    assert values["polished"][0] >= max(values["best trial"][0], values["equal weights"][0])
    assert np.mean(own) > np.mean(elsewhere)
