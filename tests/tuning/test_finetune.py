"""Searching the encoder's fine-tuning: what is measured, kept, decided and installed."""

import importlib.util
import json
import shutil

import numpy as np
import pytest

from fusionrec.data.splits import split
from fusionrec.data.text import item_texts
from fusionrec.errors import ConfigError
from fusionrec.language.encoder import Encoder
from fusionrec.serving.pipeline import Pipeline
from fusionrec.training.config import Method, TrainingConfig
from jobs.fit import FitConfig, fit
from tuning import history
from tuning.finetune import FinetuneCampaign, campaign, kept_model, space_of
from tuning.finetune_trial import MEMBERS, EncoderRun, keep, lists_gain


@pytest.fixture(scope="module")
def with_encoder(synthetic, tiny_encoder, tmp_path_factory):
    """A pipeline of two sources, one of which searches the vectors of an untrained encoder."""
    directory = tmp_path_factory.mktemp("with-encoder") / "pipeline"
    directory.mkdir()
    encoder = Encoder.load(tiny_encoder)
    encoder.save(directory / "encoder")
    np.save(directory / "vectors.npy", encoder.encode(item_texts(synthetic.catalogue)))
    sources = ("popularity", "semantic")
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
        cpus=1,
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

    # A driver that died between decision and installation: the same command carries it out.
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
    assert lists_gain(encoder, vectors, synthetic.catalogue, cases, 10).mean() > 0


@pytest.mark.ray
def test_members_of_a_population_go_on_from_each_other(ray_cluster, config):
    config = config.model_copy(update={"population": 2, "out": config.out.with_name("population")})
    campaign(config)
    found = history.read(config.out, "finetune", "ndcg")
    made = [tuple(int(each.params[name]) for name in ("member", "number")) for each in found.trials]
    assert made == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert all(each.params["of_number"] == 0 for each in found.trials[2:])
    assert not (config.out / "models" / MEMBERS).exists()
