import json
import os

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from fusionrec.errors import ConfigError
from tuning.batches import BATCH, VALUES, Batches
from tuning.journal import AGAIN, JOURNAL, claim, ended, open_study, owned, spent_s, took_s

SPACE = {"x": FloatDistribution(0, 1)}
START = {"x": 0.25}


def opened(directory):
    return open_study(directory, "test", ["maximize"], START, optuna.samplers.RandomSampler, 3)[0]


def test_a_new_study_begins_with_what_is_to_be_beaten(tmp_path):
    study = opened(tmp_path)
    assert study.ask(SPACE).params == {"x": 0.25}
    assert study.ask(SPACE).params != {"x": 0.25}


def test_a_trial_that_was_under_way_is_asked_again_once(tmp_path):
    study = opened(tmp_path)
    study.tell(study.ask(SPACE), 1.0)
    lost = study.ask(SPACE)  # and the driver dies
    study = opened(tmp_path)
    study = opened(tmp_path)  # it dies again before it asks
    again = study.ask(SPACE)
    assert again.params == lost.params
    assert again.user_attrs == {AGAIN: lost.number}
    assert study.ask(SPACE).params != lost.params
    study = opened(tmp_path)  # the second attempt is interrupted, too
    assert study.ask(SPACE).params == lost.params
    assert [trial.number for trial in ended(study)] == [0]


def test_what_ended_is_what_has_a_value_or_failed_by_itself(tmp_path):
    study = opened(tmp_path)
    study.tell(study.ask(SPACE), 1.0)
    study.tell(study.ask(SPACE), state=TrialState.FAIL)
    study.ask(SPACE)
    study = opened(tmp_path)
    assert [trial.number for trial in ended(study)] == [0, 1]
    assert spent_s(study) >= 0


def test_a_line_that_a_crash_cut_short_is_taken_away(tmp_path):
    study = opened(tmp_path)
    study.tell(study.ask(SPACE), 1.0)
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(b'{"op_code":4,"worker')
    study = opened(tmp_path)
    study.tell(study.ask(SPACE), 0.5)
    assert [trial.value for trial in ended(opened(tmp_path))] == [1.0, 0.5]


def test_the_disk_has_a_value_before_the_next_trial_is_asked(tmp_path, monkeypatch):
    """And is waited for once a trial, not once a line of it."""
    study = opened(tmp_path)
    study.ask(SPACE)
    on_disk, sync = [], os.fsync

    def synced(descriptor):
        sync(descriptor)
        on_disk.append((tmp_path / JOURNAL).read_bytes())

    monkeypatch.setattr("tuning.journal.os.fsync", synced)
    for _ in range(3):
        study.tell(study.ask({"x": SPACE["x"], "y": SPACE["x"], "z": SPACE["x"]}), 1.0)
        assert on_disk[-1] == (tmp_path / JOURNAL).read_bytes()
    assert len(on_disk) == 3


def test_a_batch_is_on_disk_together_and_its_time_is_shared(tmp_path, monkeypatch):
    study, _, lines = open_study(
        tmp_path, "test", ["maximize"], START, optuna.samplers.RandomSampler, 3
    )
    waits = []
    monkeypatch.setattr("tuning.journal.os.fsync", waits.append)
    searcher = Batches(study, lines, SPACE, size=4, trials=6)
    first = searcher.suggest("a")
    assert first[BATCH][0] == START
    assert len(searcher.suggest("b")[BATCH]) == 2
    assert searcher.suggest("c") is None
    waits.clear()
    searcher.on_trial_complete("a", {VALUES: [0.1, 0.2, 0.3, 0.4]})
    assert len(waits) == 1
    searcher.on_trial_complete("b", error=True)
    trials = opened(tmp_path).get_trials()
    assert [trial.value for trial in trials] == [0.1, 0.2, 0.3, 0.4, None, None]
    assert [trial.params for trial in trials[:4]] == first[BATCH]
    seconds = trials[0].duration.total_seconds()
    assert took_s(trials[0]) == pytest.approx(seconds / 4)
    assert spent_s(study) < 2 * seconds + sum(t.duration.total_seconds() for t in trials[4:])


def test_a_batch_that_was_under_way_is_asked_again_once(tmp_path):
    study, _, lines = open_study(
        tmp_path, "test", ["maximize"], START, optuna.samplers.RandomSampler, 3
    )
    lost = Batches(study, lines, SPACE, size=3, trials=9).suggest("a")[BATCH]
    study, _, lines = open_study(
        tmp_path, "test", ["maximize"], START, optuna.samplers.RandomSampler, 3
    )
    assert Batches(study, lines, SPACE, size=3, trials=9).suggest("a")[BATCH] == lost


def test_a_directory_has_one_owner(tmp_path):
    busy = pytest.raises(ConfigError, match=r"is in use by a campaign that runs now")
    with owned(tmp_path / "out"), busy, owned(tmp_path / "out"):
        pass
    with owned(tmp_path / "out"):
        pass


def test_a_claim_holds(tmp_path):
    claim(tmp_path, {"seed": 0, "names": ("a", "b")})
    claim(tmp_path, {"seed": 0, "names": ("a", "b")})
    with pytest.raises(ConfigError, match=r"holds a campaign with another seed"):
        claim(tmp_path, {"seed": 1, "names": ("a", "b")})
    assert json.loads((tmp_path / "campaign.json").read_text())["seed"] == 0
