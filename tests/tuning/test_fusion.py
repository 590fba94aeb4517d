"""The campaign: what it leaves, and that a killed driver loses and repeats nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import optuna
import pytest

from fusionrec.data.histories import Histories
from fusionrec.data.splits import Cases, split
from fusionrec.errors import ConfigError
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.ranks import list_ranks
from fusionrec.fusion.lambdarank import LambdaRankConfig
from fusionrec.fusion.model import Fusion
from fusionrec.fusion.normalisation import Normalisation
from fusionrec.fusion.refine import Setting
from fusionrec.serving.pipeline import Pipeline
from fusionrec.sources.load import load_source
from jobs.evaluate import EvaluateConfig, evaluate
from tuning.fusion import (
    FusionCampaign,
    campaign,
    equal,
    search,
    segment_bounds,
    setting_of,
    space,
    value,
)
from tuning.journal import ended
from tuning.learned import FusionModel

pytestmark = pytest.mark.ray


@pytest.fixture
def pipeline(fitted, tmp_path):
    return shutil.copytree(fitted, tmp_path / "pipeline")


def validation_ndcg(pipeline, dataset):
    cases = split(dataset).validation
    fused = Pipeline.load(pipeline).retrieve(cases.histories)
    return METRICS["ndcg"](list_ranks(fused.items, fused.scores, cases.targets), 10).mean()


def journal(out):
    backend = optuna.storages.journal.JournalFileBackend(str(out / "journal.log"))
    return optuna.storages.JournalStorage(backend)


def test_space_names_what_the_fusion_holds():
    sources = ("popularity", "ease")
    names = set(space(sources))
    assert names == {"normalisation", "cold_factor", "weight.popularity", "weight.ease"}
    assert {str(n) for n in Normalisation} == set(space(sources)["normalisation"].choices)
    assert equal(sources).keys() == names
    values = {"weight.popularity": 0.25, "weight.ease": 0.5, "cold_factor": 1}
    assert setting_of(values, sources).weights.tolist() == [0.25, 0.5]


def test_segments_hold_about_equally_many_cases():
    histories = Histories.of([[0] * length for length in (1, 1, 1, 2, 3, 4, 9, 9, 9)])
    cases = Cases(np.arange(9), histories, histories)
    assert segment_bounds(cases, 3).tolist() == [1, 4]
    same = Cases(np.arange(3), Histories.of([[0]] * 3), Histories.of([[0]] * 3))
    assert segment_bounds(same, 3).tolist() == []


def test_campaign_beats_equal_weights(ray_cluster, pipeline, synthetic, tmp_path):
    before = validation_ndcg(pipeline, synthetic)
    config = FusionCampaign(
        pipeline=pipeline, dataset=synthetic.directory, out=tmp_path / "campaign", trials=12
    )
    found = campaign(config)
    assert Fusion.load(pipeline / "fusion.json") == found
    assert validation_ndcg(pipeline, synthetic) > before
    assert (config.out / "trials.svg").stat().st_size > 1000
    table = (config.out / "trials.csv").read_text().splitlines()
    assert len(table) == 13
    first = optuna.load_study(storage=journal(config.out), study_name="fusion").trials[0]
    assert first.params == equal(Pipeline.load(pipeline).config.sources)
    assert campaign(config) == found  # nothing left to evaluate, the same answer
    with pytest.raises(ConfigError, match=r"holds a campaign with another k"):
        campaign(config.model_copy(update={"k": 5}))


@pytest.mark.parametrize(("given", "workers"), [({}, None), ({"workers": 3}, 3)])
def test_as_many_batches_at_a_time_as_have_room(given, workers, tmp_path, monkeypatch):
    """Which :func:`tuning.search.fit` finds, on whatever the search runs."""
    asked = []
    monkeypatch.setattr("tuning.fusion.run_search", lambda search, *_, **__: asked.append(search))
    config = FusionCampaign(pipeline=tmp_path, dataset=tmp_path, out=tmp_path, **given)
    search(config, {}, ("popularity",))
    assert asked[0].workers == workers


def here(config, objectives, sources):
    """A search in this process."""
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial(equal(sources))
    for _ in range(config.trials):
        trial = study.ask(space(sources))
        study.tell(trial, value(trial.params, objectives, sources))
    return study


def test_what_gives_nothing_is_off_until_the_next_search(
    pipeline, synthetic, tmp_path, monkeypatch, capsys
):
    votes = [Setting(np.array(w, np.float32)) for w in ((0, 0, 1, 1), (0.1, 0, 1, 1))]
    monkeypatch.setattr("tuning.fusion.polished", lambda *_: votes)
    monkeypatch.setattr("tuning.fusion.search", here)
    config = FusionCampaign(
        pipeline=pipeline,
        dataset=synthetic.directory,
        out=tmp_path / "campaign",
        trials=4,
        model=FusionModel.LAMBDARANK,
        lambdarank=LambdaRankConfig(trees=5, leaves=4, min_leaf_rows=5),
    )
    found = campaign(config)
    assert found.sources == ("transitions", "bm25", "popularity")
    assert found.fallback == "popularity"
    assert found.off == {"popularity": 0.5, "item-knn": 1.0}
    said = capsys.readouterr().out
    assert "item-knn (100%) is off and not asked." in said
    assert "popularity (50%) is asked only where the others propose too few." in said
    loaded = Pipeline.load(pipeline)
    assert loaded.fusion == found
    assert [source.name for source in loaded.sources] == list(found.sources)
    lists = loaded.retrieve(split(synthetic).test.histories.slice(0, 20))
    assert lists.term_names == (*found.sources, "history", "item")
    # People of whom nothing is known get what is popular, whatever the trees say of it.
    nobody = loaded.retrieve(Histories.of([[]]))
    popular = load_source(pipeline / "sources" / "popularity").top(Histories.of([[]]), 30)
    assert set(nobody.items[0].tolist()) >= set(popular.items[0].tolist())
    again = campaign(config)  # it asks all of them
    assert (again.sources, again.off) == (found.sources, found.off)
    report = evaluate(
        EvaluateConfig(pipeline=pipeline, dataset=synthetic.directory, out=tmp_path / "report")
    )
    assert [system.name for system in report.systems][:4] == list(loaded.config.sources)
    assert (report.off, report.fallback) == (found.off, "popularity")


def test_campaign_refuses_another_data_set(pipeline, synthetic, tmp_path):
    other = shutil.copytree(synthetic.directory, tmp_path / "other")
    info = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**info, "fingerprint": "0" * 64}))
    config = FusionCampaign(pipeline=pipeline, dataset=other, out=tmp_path / "campaign")
    with pytest.raises(ConfigError, match=r"is not what .* was fitted on"):
        campaign(config)


@pytest.mark.slow
def test_a_killed_driver_loses_and_repeats_no_trial(pipeline, synthetic, tmp_path):
    out, trials = tmp_path / "campaign", 1500
    command = [sys.executable, "-m", "tuning.fusion", "--pipeline", str(pipeline)]
    command += ["--dataset", str(synthetic.directory), "--out", str(out), "--trials", str(trials)]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    complete = (optuna.trial.TrialState.COMPLETE,)

    def finished():
        if not (out / "journal.log").is_file():
            return []
        try:
            study = optuna.load_study(storage=journal(out), study_name="fusion")
            return study.get_trials(states=complete)
        except KeyError:
            return []

    deadline = time.monotonic() + 240
    while len(before := finished()) < 8:
        assert driver.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = finished()
    assert len(before) < trials, "the campaign was over before it could be killed"

    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    after = finished()
    assert len(after) == trials
    assert [t.params for t in after[: len(before)]] == [t.params for t in before]
    values = [tuple(sorted(trial.params.items())) for trial in after]
    assert len(set(values)) == trials
    # Those that were under way were asked again, and none is left.
    study = optuna.load_study(storage=journal(out), study_name="fusion")
    assert not study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    assert len(ended(study)) == trials
