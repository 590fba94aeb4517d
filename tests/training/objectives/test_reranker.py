import math

import numpy as np
import pytest
import torch

from fusionrec.training.objectives.reranker import RankingLoss, RerankerSettings, RerankerTask

EXPECTED = {
    RankingLoss.LISTWISE: math.log(3),
    RankingLoss.PAIRWISE: math.log(2),
    RankingLoss.POINTWISE: math.log(2),
}


@pytest.mark.parametrize("kind", RankingLoss)
def test_equal_scores_cost_what_chance_does(kind, still_encoder, catalogue, examples):
    settings = RerankerSettings(encoder=str(still_encoder), max_tokens=32, ranking_loss=kind)
    task = RerankerTask(settings, catalogue, examples)
    model = task.build_model()
    torch.nn.init.zeros_(model.classifier.weight)
    loss = task.loss(model, task.batch(np.arange(8)))
    assert loss.item() == pytest.approx(EXPECTED[kind], rel=1e-6)


def test_missing_negatives_are_not_scored(still_encoder, catalogue, examples):
    short = examples.with_negatives(examples.negatives[:, :1].repeat(3, axis=1), 3)
    short.negatives[:, 1:] = -1
    task = RerankerTask(RerankerSettings(encoder=str(still_encoder)), catalogue, short)
    model = task.build_model()
    batch = task.batch(np.arange(4))
    assert len(batch["pair.place"]) == 8
    scores = task.scores(model, batch)
    assert (scores[:, :2] != 0).all()
    assert torch.equal(scores[:, 2:], torch.zeros(4, 2))
