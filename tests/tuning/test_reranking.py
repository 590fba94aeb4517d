import shutil

import numpy as np
import pytest

from fusionrec.data.splits import split
from fusionrec.errors import ConfigError
from fusionrec.serving.pipeline import Pipeline
from tuning import reranking
from tuning.reranking import RerankingCampaign, weigh


class Oracle:
    """A reranker that knows the targets, or one that knows nothing."""

    def __init__(self, targets, seed=None):
        self.targets, self.generator = targets, np.random.default_rng(seed)

    def scores(self, histories, items):
        top = items[:, :20]
        if self.targets is None:
            return self.generator.random(top.shape).astype(np.float32)
        wanted = [self.targets[tuple(histories.row(row))] for row in range(len(histories))]
        return (top == np.array(wanted)[:, None]).astype(np.float32)


@pytest.fixture
def config(fitted, synthetic, tmp_path):
    directory = shutil.copytree(fitted, tmp_path / "pipeline")
    return RerankingCampaign(pipeline=directory, dataset=synthetic.directory, max_cases=100)


def weights(config, monkeypatch, oracle):
    load = Pipeline.load

    def with_reranker(directory):
        pipeline = load(directory)
        pipeline.reranker = oracle
        pipeline.rerank_scores = oracle.scores
        return pipeline

    monkeypatch.setattr(reranking.Pipeline, "load", with_reranker)
    return [segment.reranker for segment in weigh(config).segments]


def test_a_reranker_that_knows_gets_weight(config, synthetic, monkeypatch):
    cases = split(synthetic).validation
    known = {tuple(cases.histories.row(b)): int(cases.targets.row(b)[0]) for b in range(len(cases))}
    assert min(weights(config, monkeypatch, Oracle(known))) > 0
    monkeypatch.undo()
    assert Pipeline.load(config.pipeline).fusion.segments[0].reranker > 0


def test_a_reranker_that_guesses_gets_none(config, monkeypatch):
    assert max(weights(config, monkeypatch, Oracle(None, seed=1))) == 0


def test_without_a_reranker_the_remedy_is_named(config):
    with pytest.raises(ConfigError, match=r"jobs.finetune --task reranker"):
        weigh(config)
