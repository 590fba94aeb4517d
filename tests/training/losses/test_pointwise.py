import math

import pytest
import torch

from fusionrec.training.losses.pointwise import pointwise_logistic


def test_a_known_answer():
    # Odds of 3 for what came next and of 1/3 for what did not: both are right with 3/4.
    scores = torch.tensor([[math.log(3.0), -math.log(3.0)]])
    loss = pointwise_logistic(scores, torch.tensor([[1, 0]]), torch.ones(1, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-6)


def test_lists_count_equally_and_padding_not_at_all():
    scores = torch.tensor([[0.0, 50.0], [0.0, 0.0], [7.0, 7.0]], requires_grad=True)
    present = torch.tensor([[True, False], [True, True], [False, False]])
    loss = pointwise_logistic(scores, torch.tensor([[1, 0], [1, 0], [1, 0]]), present)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[0].tolist() == [-0.25, 0.0]
    assert torch.equal(scores.grad[2], torch.zeros(2))


def test_no_candidate_at_all_is_zero():
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert pointwise_logistic(torch.ones(2, 2), torch.ones(2, 2), nothing).item() == 0.0
