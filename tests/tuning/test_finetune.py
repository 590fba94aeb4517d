"""Searching the encoder's fine-tuning: what is measured, kept, decided and installed."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fusionrec.data.splits import split
from fusionrec.data.text import item_texts
from fusionrec.errors import ConfigError
from fusionrec.language.encoder import Encoder
from fusionrec.serving.pipeline import Pipeline
from fusionrec.sources.content import Content
from fusionrec.sources.load import load_source
from fusionrec.sources.protocol import TrainingData
from fusionrec.training.config import Method, TrainingConfig
from fusionrec.training.examples import Examples
from jobs.fit import FitConfig, fit
from tuning import history
from tuning.finetune import FinetuneCampaign, campaign, kept_model, space_of
from tuning.finetune_trial import (
    MEMBERS,
    RUNS,
    EncoderRun,
    FinetuneData,
    FinetuneTask,
    keep,
    lists_gain,
    measured,
)
from tuning.workers import Runs

# Ray copies its own settings, deprecated ones among them, whenever it starts something.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning")


@pytest.fixture(scope="module")
def with_encoder(synthetic, tiny_encoder, tmp_path_factory):
    """A pipeline of three sources, two of which read the vectors of an untrained encoder."""
    directory = tmp_path_factory.mktemp("with-encoder") / "pipeline"
    directory.mkdir()
    encoder = Encoder.load(tiny_encoder)
    encoder.save(directory / "encoder")
    np.save(directory / "vectors.npy", encoder.encode(item_texts(synthetic.catalogue)))
    sources = ("popularity", "semantic", "content")
    fit(FitConfig(dataset=synthetic.directory, pipeline=directory, sources=sources, candidates=30))
    return directory


@pytest.fixture
def config(with_encoder, synthetic, tiny_encoder, tmp_path):
    return FinetuneCampaign(
        pipeline=shutil.copytree(with_encoder, tmp_path / "pipeline"),
        dataset=synthetic.directory,
        out=tmp_path / "campaign",
        encoder=str(tiny_encoder),
        epochs=2,
        batch_size=32,
        trials=2,
        max_examples=64,
        max_cases=80,
        cpus=2,
        workers=1,
    )


def test_adapters_are_searched_where_they_are_trained():
    full = space_of(EncoderRun())
    assert set(full) == {
        "task.temperature",
        *(f"training.{name}" for name in ("learning_rate", "warmup", "weight_decay")),
    }
    for method in ("lora", "dora", "qlora"):
        adapted = space_of(EncoderRun(training=TrainingConfig(method=method)))
        assert set(adapted) - set(full) == {"training.lora.rank"}


def test_the_best_model_is_kept(tmp_path):
    for value, name in ((0.1, "a"), (0.3, "b"), (0.2, "c"), (0.3, "b")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "weights").write_text(name)
        keep(tmp_path / name, value, tmp_path / "models")
    [kept] = (tmp_path / "models").iterdir()
    assert kept == kept_model(tmp_path)
    assert (kept / "weights").read_text() == "b"


def test_what_cannot_be_searched_is_said(config, fitted, monkeypatch):
    with pytest.raises(ConfigError, match=r"has no encoder to be better than: run `python -m jobs"):
        campaign(config.model_copy(update={"pipeline": fitted}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="method = qlora needs the Python package bitsandbytes"):
        campaign(config.model_copy(update={"method": Method.QLORA}))


@pytest.mark.ray
def test_a_trial_that_would_never_start_is_refused(ray_cluster, config):
    config = config.model_copy(update={"num_workers": 3, "cpus": 2})
    with pytest.raises(ConfigError, match=r"would never start on this cluster, .* set num_workers"):
        campaign(config)
    assert not (config.out / "campaign.json").exists()


@pytest.fixture
def trial(ray_cluster, config, synthetic):
    """What the trials of ``config`` share, and the data that their workers read."""
    import ray

    runs = Runs.actor(1)
    start, parts = config.start, split(synthetic)
    data = FinetuneData(
        catalogue=synthetic.catalogue,
        examples=Examples.of(
            parts.train, per_user=2, limit=64, generator=np.random.default_rng(0)
        ).newest(start.task.history_items),
        cases=parts.validation,
        k=10,
    )
    task = FinetuneTask(
        settings=start, data=ray.put(data), runs=runs, out=config.out, num_workers=2, cpus=2
    )
    yield task, data
    ray.kill(runs)


def free_cpus():
    """CPUs that nobody has reserved, once Ray has heard of it."""
    import ray

    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    return ray.available_resources().get("CPU", 0)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_that_take_all_cpus_measure_together(trial, synthetic):
    task, data = trial
    found = list(measured(task, task.settings))
    assert [(epochs, last) for epochs, last, _ in found] == [(1, False), (2, True)]
    [kept] = task.models.iterdir()
    encoder = Encoder.load(kept)
    vectors = encoder.encode(item_texts(synthetic.catalogue))
    value = lists_gain(encoder, vectors, synthetic.catalogue, data.cases, data.k).mean()
    assert found[-1][2] == pytest.approx(value, abs=1e-6)
    assert float(kept.name) == pytest.approx(value, abs=1e-6)
    assert free_cpus() == 4
    assert list((task.out / RUNS).iterdir()) == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_is_given_up_gives_its_cpus_back(trial):
    task, _ = trial
    long = task.settings.model_copy(
        update={"training": task.settings.training.model_copy(update={"epochs": 81})}
    )
    steps = measured(task, long)
    assert next(steps)[0] == 3  # the first rung
    steps.close()
    assert free_cpus() == 4
    assert list((task.out / RUNS).iterdir()) == []


@pytest.mark.ray
@pytest.mark.slow
def test_the_best_trial_is_decided_about_and_installed(ray_cluster, config, synthetic):
    winner = campaign(config)
    found = history.read(config.out, "finetune", "ndcg")
    assert [trial.whole for trial in found.trials] == [True, True]
    assert found.trials[0].params["training.learning_rate"] == pytest.approx(1e-4)
    assert winner.value_best == max(trial.value for trial in found.trials)
    kept = kept_model(config.out)
    assert float(kept.name) == pytest.approx(winner.value_best)

    journal = (config.out / "journal.log").read_bytes()
    assert campaign(config) == winner
    assert (config.out / "journal.log").read_bytes() == journal
    with pytest.raises(ConfigError, match=r"holds a campaign with another k"):
        campaign(config.model_copy(update={"k": 5}))

    # A driver that died between decision and installation, of which a part had been made: the same
    # command carries it out.
    for place in (config.pipeline / "encoder", config.pipeline / "sources" / "content"):
        place.rename(place.with_name(f".{place.name}.new"))  # killed between two renames
    (config.out / "installed").unlink(missing_ok=True)
    document = winner.model_dump(mode="json")
    document["held_out"]["mean"] = 0.01
    (config.out / "winner.json").write_text(json.dumps(document))
    (config.pipeline / "fusion.json").write_text("weights found for other scores")
    assert campaign(config).taken
    assert not (config.pipeline / "fusion.json").exists()
    encoder = Encoder.load(kept)
    vectors = encoder.encode(item_texts(synthetic.catalogue))
    np.testing.assert_allclose(np.load(config.pipeline / "vectors.npy"), vectors, atol=1e-5)
    cases = split(synthetic).validation
    pipeline = Pipeline.load(config.pipeline)
    semantic = pipeline.candidates(pipeline.embed(cases.histories)).scores[1]
    assert 0.9 < semantic.max() <= 1 + 1e-5
    data = TrainingData(synthetic.catalogue, split(synthetic).train, item_vectors=vectors)
    content = load_source(config.pipeline / "sources" / "content").top(cases.histories, 5)
    expected = Content().fit(data).top(cases.histories, 5)
    np.testing.assert_allclose(content.scores, expected.scores, atol=1e-5)
    assert not list(config.pipeline.rglob(".*"))  # nothing half done is left
    assert lists_gain(encoder, vectors, synthetic.catalogue, cases, 10).mean() > 0


@pytest.mark.ray
@pytest.mark.slow
def test_members_of_a_population_go_on_from_each_other(ray_cluster, config):
    config = config.model_copy(update={"population": 2, "out": config.out.with_name("population")})
    campaign(config)
    found = history.read(config.out, "finetune", "ndcg")
    made = [tuple(int(each.params[name]) for name in ("member", "number")) for each in found.trials]
    assert made == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert all(each.params["of_number"] == 0 for each in found.trials[2:])
    assert not (config.out / "models" / MEMBERS).exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_whose_time_is_up_leaves_no_workers(ray_cluster, config):
    long = {"epochs": 20_000, "minutes": 0.75, "trials": 20, "num_workers": 2}
    winner = campaign(config.model_copy(update=long))
    assert winner.value_best is None
    assert free_cpus() == 4
    assert not (config.out / RUNS).exists()


def ended_trials(out: Path) -> dict[int, history.TrialRecord]:
    """By number; none until a model is there, before which there may be no journal."""
    if not kept_model(out):
        return {}
    return {each.number: each for each in history.read(out, "finetune", "ndcg").trials}


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_search_leaves_no_workers_and_is_gone_on_with(
    ray_cluster, config, monkeypatch, tmp_path
):
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address_info["address"])
    names = ("pipeline", "dataset", "out", "encoder", "epochs", "batch_size", "max_examples")
    names += ("max_cases", "trials", "num_workers", "cpus")
    config = config.model_copy(update={"num_workers": 2, "trials": 3})
    command = [sys.executable, "-m", "tuning.finetune"]
    for name in names:
        command += ["--" + name.replace("_", "-"), str(getattr(config, name))]
    log = tmp_path / "log"
    with log.open("w") as file:
        driver = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 240
    # The model is kept before the driver hears of it: only the journal says that a trial ended.
    while not list(config.out.glob(f"{RUNS}/*/progress.json")) or not ended_trials(config.out):
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait(timeout=60) != 0
    assert free_cpus() == 4  # which the workers of a trial had
    before = ended_trials(config.out)
    assert 0 < len(before) < 3
    campaign(config)
    after = ended_trials(config.out)
    assert len(after) == 3
    assert {number: after[number] for number in before} == before
    assert not (config.out / RUNS).exists()
