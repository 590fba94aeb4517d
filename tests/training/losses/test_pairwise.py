import math

import pytest
import torch

from fusionrec.training.losses.pairwise import pairwise_logistic

ALL = torch.ones(1, 3, dtype=torch.bool)


def test_a_known_answer():
    # Margins 1 and 2 above the two irrelevant candidates.
    loss = pairwise_logistic(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1, 0, 0]]), ALL)
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_graded_relevance_gives_every_ordered_pair():
    loss = pairwise_logistic(torch.zeros(1, 3), torch.tensor([[2, 1, 0]]), ALL)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_only_the_order_within_a_history_gets_a_gradient():
    scores = torch.tensor([[0.3, -0.2, 1.0]], requires_grad=True)
    pairwise_logistic(scores, torch.tensor([[1, 0, 0]]), ALL).backward()
    assert scores.grad is not None
    assert scores.grad[0, 0] < 0 < scores.grad[0, 1] < scores.grad[0, 2]
    assert scores.grad.sum().item() == pytest.approx(0.0, abs=1e-7)


def test_padding_and_histories_without_a_pair_do_not_count():
    scores = torch.tensor([[1.0, 0.0, 9.0], [5.0, 5.0, 5.0]], requires_grad=True)
    relevance = torch.tensor([[1, 0, 0], [0, 0, 0]])
    present = torch.tensor([[True, True, False], [True, True, True]])
    loss = pairwise_logistic(scores, relevance, present)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[0, 2] == 0
    assert torch.equal(scores.grad[1], torch.zeros(3))


def test_no_pair_at_all_is_zero():
    scores = torch.zeros(1, 3, requires_grad=True)
    loss = pairwise_logistic(scores, torch.zeros(1, 3), ALL)
    loss.backward()
    assert loss.item() == 0.0
