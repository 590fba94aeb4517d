"""A whole campaign: what it leaves, what it refuses, and that it survives being killed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import optuna
import pytest
import yaml

from fusionrec.config import parse
from fusionrec.errors import ConfigError
from fusionrec.evaluation.significance import Estimate
from fusionrec.serving.pipeline import Pipeline
from jobs.fit import FitConfig, fit
from tests.pages.reading import Page
from tuning.campaign import CampaignConfig, campaign, minutes_of
from tuning.report import CampaignReport, html

SETTINGS = {
    "stages": ["sources", "fusion", "pareto"],
    "sources": {"names": ["transitions", "bm25"], "trials": 6},
    "fusion": {"trials": 12},
    "pareto": {"trials": 8, "max_loss": 0.05},
    "workers": 2,
}


def write(directory, fitted, synthetic):
    """The YAML of a small campaign over a copy of the fitted pipeline."""
    settings = {
        **SETTINGS,
        "pipeline": str(shutil.copytree(fitted, directory / "pipeline")),
        "dataset": str(synthetic.directory),
        "out": str(directory / "out"),
    }
    path = directory / "campaign.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def written(fitted, synthetic, tmp_path):
    return write(tmp_path, fitted, synthetic)


@pytest.fixture(scope="module")
def done(ray_cluster, fitted, synthetic, tmp_path_factory):
    """A campaign that has run, and what it found."""
    path = write(tmp_path_factory.mktemp("campaign"), fitted, synthetic)
    config = parse(CampaignConfig, ["--config", str(path)])
    return config, campaign(config)


@pytest.mark.ray
def test_one_yaml_is_a_campaign(done):
    config, found = done
    assert [search.name for search in found.searches] == ["transitions", "bm25", "fusion", "pareto"]
    assert [len(search.trials) for search in found.searches] == [6, 6, 12, 8]
    for comparison in (found.test, found.validation):
        assert comparison.num_cases == 120
        assert comparison.difference.mean == pytest.approx(comparison.mean_a - comparison.mean_b)
    assert found.equal_before
    assert CampaignReport.model_validate_json((config.out / "report.json").read_text()) == found


@pytest.mark.ray
def test_the_page_is_whole_and_says_what_a_reader_looks_for(done):
    config, found = done
    text = (config.out / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert page.hosts == []
    assert not re.search(r"https?://|url\(|@import|NaN", text)
    assert page.tags.count("svg") == 3 * len(found.searches) + 1
    for search in found.searches:
        assert f"ndcg of {search.name} over time" in text
        assert f"Parallel coordinates of {search.name}" in text
        assert f"Importance in {search.name}" in text
        assert sum(search.importance.values()) == pytest.approx(1, abs=0.01)
    for piece in ("Selection bias", "Best configuration", "Weights by segment", "The front"):
        assert piece in text
    for segment in found.weights:
        assert segment in text
    assert f"{found.test.difference.low:+.4f}" in text
    assert "python -m jobs.fit --config" in text


@pytest.mark.ray
def test_the_page_names_what_is_off(done):
    _, found = done
    fitted = found.settings.keys()
    assert found.off.keys() <= fitted
    text = html(
        found.model_copy(update={"off": {"ials": 0.4, "popularity": 0.5}, "fallback": "popularity"})
    )
    assert "ials (40%) is off and not asked. popularity (50%) is asked only where" in text
    assert "is off and not asked" not in html(
        found.model_copy(update={"off": {}, "fallback": None})
    )


@pytest.mark.ray
@pytest.mark.parametrize(("gain", "told"), [(0.01, "yes"), (-0.01, "no, stays as it was")])
def test_an_encoder_that_was_installed_is_said_to_be(done, gain, told):
    """Even where the first trial won, so that no setting differs from where the search began."""
    _, found = done
    winner = found.winners[0].model_copy(
        update={"name": "finetune", "changed": (), "held_out": Estimate(mean=gain, low=0, high=0)}
    )
    text = html(found.model_copy(update={"winners": (winner,)}))
    assert f'<td class="left">{told}</td>' in text


@pytest.mark.ray
def test_a_campaign_that_is_done_is_not_done_again(done):
    config, found = done
    journals = {path: path.read_bytes() for path in config.out.rglob("journal.log")}
    assert campaign(config) == found
    assert {path: path.read_bytes() for path in journals} == journals
    assert len(journals) == 4
    with pytest.raises(ConfigError, match=r"holds a campaign with another seed"):
        campaign(config.model_copy(update={"seed": 1}))


@pytest.mark.ray
def test_the_commands_of_the_report_make_the_winner_anew(done):
    config, found = done
    (make, copy, measure) = found.commands
    again = config.pipeline.with_name("pipeline-again")
    assert make == f"python -m jobs.fit --config {config.out / 'winner.yaml'} --pipeline {again}"
    settings = yaml.safe_load((config.out / "winner.yaml").read_text())
    fit(FitConfig(**{**settings, "pipeline": again}))
    subprocess.run(copy.split(), check=True)
    assert measure.startswith(f"python -m jobs.evaluate --pipeline {again} ")
    tuned, anew = Pipeline.load(config.pipeline), Pipeline.load(again)
    assert anew.fusion == tuned.fusion
    assert anew.config == tuned.config
    for name in tuned.config.sources:
        for path in (config.pipeline / "sources" / name).iterdir():
            assert path.read_bytes() == (again / "sources" / name / path.name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ["sources", "fusoin"]}, r"stages\.1 = 'fusoin' is wrong: .*'fusion'"),
        ({"sources": {"trails": 3}}, r"setting sources\.trails is unknown"),
        ({"fusion": {"trials": 0}}, r"setting fusion\.trials = 0 is wrong: .* greater than"),
        ({"minutes": "soon"}, r"setting minutes = 'soon' is wrong"),
        ({"pipeline": None}, r"setting pipeline = None is wrong"),
        ({"stages": []}, r"setting stages is empty: name any of finetune, sources, fusion"),
        ({"stages": ["sources"]}, r"stages names sources without fusion"),
        ({"stages": ["fusion", "reranking"]}, r"names reranking, but .* has no reranker"),
        (
            {"minutes": 60, "stages": ["finetune", "fusion"], "finetune": {"minutes": 90}},
            r"finetune\.minutes = 90 leaves nothing of minutes = 60 .* give it less",
        ),
        ({"sources": {"names": ["itemknn"]}}, r"names = 'itemknn' is no source .* among"),
    ],
)
def test_a_mistake_in_the_yaml_gets_one_sentence(written, change, message):
    written.write_text(yaml.safe_dump({**yaml.safe_load(written.read_text()), **change}))
    with pytest.raises(ConfigError, match=message) as found:
        campaign(parse(CampaignConfig, ["--config", str(written)]))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("change", "minutes"),
    [
        ({}, {"sources": None, "pareto": None}),
        ({"minutes": 60}, {"sources": 48, "pareto": 12}),
        ({"minutes": 60, "stages": ["fusion", "pareto"]}, {"pareto": 60}),
        (
            {"minutes": 70, "stages": ["finetune", "sources", "fusion", "pareto"]},
            {"finetune": 20, "sources": 40, "pareto": 10},
        ),
        (
            {"minutes": 60, "stages": ["finetune", "fusion", "pareto"], "finetune": {"minutes": 6}},
            {"finetune": 6, "pareto": 54},
        ),
        ({"stages": ["finetune", "fusion"], "finetune": {"minutes": 6}}, {"finetune": 6}),
    ],
)
def test_minutes_are_shared_by_the_searches_that_take_long(written, change, minutes):
    written.write_text(yaml.safe_dump({**yaml.safe_load(written.read_text()), **change}))
    assert minutes_of(parse(CampaignConfig, ["--config", str(written)])) == minutes


def test_a_file_that_is_no_yaml_is_named(written):
    written.write_text("stages: [sources\nseed: 0")
    with pytest.raises(ConfigError, match=r"campaign.yaml \(line 2\) is not YAML"):
        parse(CampaignConfig, ["--config", str(written)])


def with_a_value(out, name):
    """The trials of one search that have a value: (number, parameters, values) of each."""
    path = next(out.rglob(f"{name}/journal.log"), None)
    if path is None:
        return set()
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    try:
        study = optuna.load_study(storage=storage, study_name=name)
    except KeyError:  # it is being made
        return set()
    trials = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    return {(t.number, tuple(sorted(t.params.items())), tuple(t.values)) for t in trials}


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_campaign_loses_and_repeats_no_trial(ray_cluster, written, tmp_path, monkeypatch):
    """Stopped in its first search, as `ray job stop` does it, and killed in its last."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address_info["address"])
    out = tmp_path / "out"
    wanted = {"transitions": 16, "bm25": 16, "fusion": 12, "pareto": 16}
    command = [sys.executable, "-m", "tuning.campaign", "--config", str(written)]
    command += ["--sources.trials", "16", "--pareto.trials", "16"]
    known = {}
    for name, count, how in (
        ("transitions", 2, signal.SIGTERM),
        ("pareto", 2, signal.SIGKILL),
    ):
        with (tmp_path / "log").open("w") as log:
            driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 240
        while len(with_a_value(out, name)) < count:
            assert driver.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(driver.pid, how)
        assert driver.wait(timeout=60) != 0
        now = {each: with_a_value(out, each) for each in wanted}
        assert len(now[name]) < wanted[name], f"{name} was over before it could be killed"
        for each, trials in known.items():
            assert trials <= now[each]
        known = now
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    final = {name: with_a_value(out, name) for name in wanted}
    assert {name: len(trials) for name, trials in final.items()} == wanted
    for name, trials in final.items():
        assert known[name] <= trials  # nothing is lost
        assert len({parameters for _, parameters, _ in trials}) == len(trials)  # nor repeated
    assert "gain" in done.stdout
    assert (out / "report.html").is_file()
