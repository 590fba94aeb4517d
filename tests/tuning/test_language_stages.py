"""A campaign whose stages search the language models, too, and the commands that repeat it."""

import importlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from fusionrec.config import parse
from fusionrec.data.splits import split
from fusionrec.data.text import item_texts
from fusionrec.language.encoder import Encoder
from fusionrec.language.reranker import Reranker, RerankerConfig
from fusionrec.serving.pipeline import Pipeline
from fusionrec.sources.load import load_source
from fusionrec.sources.sasrec import SASRecConfig
from jobs.fit import FitConfig, fit
from tuning.campaign import CampaignConfig, campaign

# Ray copies its own settings, deprecated ones among them, whenever it starts something.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning"),
]

SOURCES = ("popularity", "semantic", "sasrec", "content")
SASREC = SASRecConfig(width=16, num_blocks=1, learning_rate=0.01, num_negatives=16, epochs=2)


@pytest.fixture
def pipeline(synthetic, tiny_encoder, tmp_path):
    """With every part that a language model has in one; its encoder is blind: any other is better.

    Three of the four sources read its vectors.
    """
    directory = tmp_path / "pipeline"
    directory.mkdir()
    blind = Encoder.load(tiny_encoder, device="cpu")
    with torch.no_grad():
        blind.model.get_input_embeddings().weight.zero_()
    blind.save(directory / "encoder")
    np.save(directory / "vectors.npy", blind.encode(item_texts(synthetic.catalogue)))
    untrained = Reranker.load(tiny_encoder, device="cpu")
    settings = RerankerConfig(model="tiny", max_tokens=64)
    (directory / "reranker").mkdir()
    Reranker(untrained.model, untrained.tokenizer, settings).save(directory / "reranker")
    fit(
        FitConfig(
            dataset=synthetic.directory,
            pipeline=directory,
            sources=SOURCES,
            candidates=30,
            rerank_top=5,
            sasrec=SASREC,
        )
    )
    return directory


def files(directory):
    """Name → bytes of all below ``directory``."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory): path.read_bytes() for path in found}


def test_the_commands_make_the_winner_of_all_stages_anew(
    ray_cluster, pipeline, synthetic, tiny_encoder, tmp_path, monkeypatch
):
    settings = {
        "pipeline": str(pipeline),
        "dataset": str(synthetic.directory),
        "out": str(tmp_path / "out"),
        "stages": ["finetune", "sources", "fusion", "reranking"],
        "finetune": {
            "encoder": str(tiny_encoder),
            "epochs": 1,
            "batch_size": 32,
            "trials": 1,
            "cpus": 2,
            "max_examples": 64,
            "max_cases": 80,
        },
        # Not those that read vectors: what was searched on the new ones would be fitted on them.
        "sources": {"names": ["popularity"], "trials": 2},
        "fusion": {"trials": 25},
        "reranking": {"max_cases": 50},
    }
    (tmp_path / "campaign.yaml").write_text(yaml.safe_dump(settings))
    config = parse(CampaignConfig, ["--config", str(tmp_path / "campaign.yaml")])
    before = {name: files(pipeline / "sources" / name) for name in SOURCES[1:]}
    found = campaign(config)

    assert found.stages == ("finetune", "sources", "fusion", "reranking")
    assert [search.name for search in found.searches] == ["finetune", "popularity", "fusion"]
    assert [len(search.trials) for search in found.searches] == [1, 2, 25]
    assert (config.out / "reranking.done").is_file()
    assert found.winners[0].taken
    for name, former in before.items():  # each is fitted on the vectors of the new encoder
        assert files(pipeline / "sources" / name) != former
    assert campaign(config) == found

    # Nothing but what the campaign kept is left to make it anew from.
    tuned = pipeline.rename(tmp_path / "tuned")
    monkeypatch.chdir(tmp_path)
    for command in found.commands:
        program, *arguments = shlex.split(command)
        if program == "cp":
            subprocess.run([program, *arguments], check=True)
            continue
        module = importlib.import_module(arguments[1])  # python -m MODULE …
        monkeypatch.setattr(sys, "argv", arguments[1:])
        module.main()
    again = pipeline.with_name("pipeline-again")
    assert files(again / "encoder") == files(tuned / "encoder")
    assert files(again / "reranker") == files(tuned / "reranker")

    one, other = Pipeline.load(tuned), Pipeline.load(again)
    assert (other.config, other.fusion) == (one.config, one.fusion)
    # Equal up to rounding: jobs.embed encodes in other batches.
    np.testing.assert_allclose(other.item_vectors, one.item_vectors, atol=1e-5)
    histories = one.embed(split(synthetic).test.histories)
    every = np.tile(np.arange(len(synthetic.catalogue), dtype=np.int32), (len(histories), 1))
    for name in SOURCES:
        scores = [
            load_source(place / "sources" / name).score(histories, every)
            for place in (tuned, again)
        ]
        np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-3)
    lists = [each.recommend(histories).scores[:, :10] for each in (one, other)]
    np.testing.assert_allclose(*lists, rtol=1e-3, atol=1e-3)
