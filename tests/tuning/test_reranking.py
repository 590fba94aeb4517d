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


def test_lists_without_a_target_are_not_read(config, synthetic):
    """The weights are those that would come of reading all: the others gain nothing."""
    pipeline = Pipeline.load(config.pipeline)
    cases = split(synthetic).validation
    items = pipeline.recommend(cases.histories, rerank=False).items[:, :5]
    read = []

    def score(histories, own):
        read.extend(own.tolist())
        return np.random.default_rng(0).random(own.shape).astype(np.float32)

    pipeline.rerank_scores = score
    scores = reranking.hit_scores(pipeline, cases.histories, items, cases.targets)
    held = (items == cases.targets.items[:, None]).any(axis=1)  # leave-one-out: one of each
    assert read == items[held].tolist()
    assert 0 < held.sum() < len(cases)
    assert scores[held].all()
    assert not scores[~held].any()


def test_without_a_reranker_the_remedy_is_named(config):
    with pytest.raises(ConfigError, match=r"jobs.finetune --task reranker"):
        weigh(config)
