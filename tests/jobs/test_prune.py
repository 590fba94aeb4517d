"""Layers dropped from the models of a real pipeline directory with tiny models of two layers."""

import json
import shutil
from pathlib import Path

import pytest

from fusionrec.bundles.gate import write_cases
from fusionrec.errors import ConfigError
from fusionrec.fusion.model import Fusion
from fusionrec.language.encoder import Encoder
from fusionrec.language.reranker import Reranker
from jobs import prune as job
from jobs.optimise import Served
from jobs.prune import PruneConfig, prune


@pytest.fixture
def config(fitted, synthetic, tmp_path) -> PruneConfig:
    place = shutil.copytree(fitted, tmp_path / "pipeline")
    return PruneConfig(
        pipeline=place,
        dataset=synthetic.directory,
        model="reranker",
        num_layers=1,
        out=tmp_path / "out",
        compared_cases=10,
        max_cases=40,
    )


@pytest.mark.parametrize(("after", "kept"), [(0.3981, True), (0.39, False)])
def test_a_reranker_that_is_as_good_replaces_the_whole_one(config, monkeypatch, after, kept):
    found = iter([Served(0.4, 0.0, 0.2), Served(after, 0.0, 0.1)])
    monkeypatch.setattr(job, "measure", lambda *_: next(found))
    write_cases(config.pipeline, ["of the whole one"], [0.5])
    pruning = prune(config)
    assert pruning.kept == kept
    (dropped,) = pruning.dropped
    assert 0 < dropped.likeness <= 1
    assert json.loads((config.out / "pruning.json").read_text())["after"]["ndcg"] == after
    assert Reranker.load(config.out / "model").model.config.num_hidden_layers == 1
    served = Reranker.load(config.pipeline / "reranker", frozen=True)
    assert served.model.config.num_hidden_layers == (1 if kept else 2)
    # What was measured of another reranker must not mislead the gate.
    assert (config.pipeline / "validation.parquet").exists() != kept


def test_both_towers_of_an_encoder_lose_layers(config):
    folder = config.pipeline / "encoder"
    shutil.copytree(folder, config.pipeline / "item")
    (config.pipeline / "item").rename(folder / "item")
    pruning = prune(config.model_copy(update={"model": "encoder"}))
    assert len(pruning.dropped) == 2
    assert pruning.before is None
    for items in (False, True):
        small = Encoder.load(config.out / "model", items=items)
        assert small.model.config.num_hidden_layers == 1
    assert Encoder.load(folder).model.config.num_hidden_layers == 2


def test_what_is_printed(config, monkeypatch, capfd):
    """Nothing is scripted: the figures are those of the served lists."""
    flags = {"pipeline": config.pipeline, "dataset": config.dataset, "out": config.out}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    arguments += ["--model=reranker", "--num-layers=1", "--compared-cases=5", "--max-cases=20"]
    monkeypatch.setattr("sys.argv", ["prune", *arguments])
    job.main()
    said = capfd.readouterr()
    assert "with all layers" in said.err
    assert said.out.endswith(f"model: {config.out / 'model'}\n")


def test_a_model_that_is_not_there(config):
    shutil.rmtree(Path(config.pipeline) / "encoder")
    with pytest.raises(ConfigError, match="setting model = encoder"):
        prune(config.model_copy(update={"model": "encoder"}))


def test_a_reranker_without_weight(config):
    fusion = Fusion.load(config.pipeline / "fusion.json")
    segments = tuple(each.model_copy(update={"reranker": 0.0}) for each in fusion.segments)
    fusion.model_copy(update={"segments": segments}).save(config.pipeline / "fusion.json")
    with pytest.raises(ConfigError, match=r"tuning.reranking"):
        prune(config)
