import optuna
import pytest
from optuna.distributions import FloatDistribution

from tuning.journal import open_study
from tuning.population import FIRST, Pass, PopulationSampler, lineage, passes

SPACE = {**passes(4, 5), "rate": FloatDistribution(0.01, 1, log=True)}


def opened(directory):
    def sampler(seed):
        return PopulationSampler(SPACE, 4, seed)

    start = {**FIRST._asdict(), "rate": 0.1}
    return open_study(directory, "test", ["maximize"], start, sampler, 0)[0]


def asked(study):
    trial = study.ask(SPACE)
    return trial, lineage(trial.params), trial.params["rate"]


def test_members_go_on_and_the_worst_goes_on_from_the_best(tmp_path):
    study = opened(tmp_path)
    begun = [asked(study) for _ in range(4)]  # all at a time
    assert [found for _, found, _ in begun] == [Pass(m, 0, m, -1) for m in range(4)]
    assert begun[0][2] == pytest.approx(0.1)
    assert len({rate for *_, rate in begun}) == 4
    for (trial, *_), value in zip(begun, (0.2, 0.9, 0.1, 0.3), strict=True):
        study.tell(trial, value)
    again = [asked(study) for _ in range(4)]
    assert [found for _, found, _ in again] == [
        Pass(0, 1, 0, 0),
        Pass(1, 1, 1, 0),
        Pass(2, 1, 1, 0),
        Pass(3, 1, 3, 0),
    ]
    assert [rate for *_, rate in again][:2] == [rate for *_, rate in begun][:2]
    assert again[2][2] not in (begun[1][2], begun[2][2])
    assert (again[2][1].name, again[2][1].parent, FIRST.parent) == ("2-1", "1-0", None)


def test_one_worker_takes_the_members_in_turn(tmp_path):
    study = opened(tmp_path)
    order = []
    for number in range(12):
        trial, found, _ = asked(study)
        order.append((found.member, found.number))
        study.tell(trial, float(number))
    assert order == [(member, number) for number in range(3) for member in range(4)]


def test_a_pass_that_was_under_way_is_asked_again(tmp_path):
    study = opened(tmp_path)
    for value in (0.1, 0.2, 0.3, 0.4):
        study.tell(asked(study)[0], value)
    lost = asked(study)[0]
    study = opened(tmp_path)
    trial = asked(study)[0]
    assert trial.params == lost.params
    study.tell(trial, 0.5)
    assert asked(study)[1].member == 1
    assert not study.get_trials(states=(optuna.trial.TrialState.WAITING,))
