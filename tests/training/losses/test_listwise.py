import math

import pytest
import torch

from fusionrec.training.losses.listwise import listwise_softmax


def test_a_known_answer():
    scores = torch.tensor([[math.log(3.0), 0.0]])
    assert listwise_softmax(scores, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(
        math.log(4 / 3), rel=1e-6
    )


def test_one_relevant_candidate_is_the_cross_entropy():
    scores = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(6)
    relevance = torch.nn.functional.one_hot(targets, 9)
    expected = torch.nn.functional.cross_entropy(scores, targets)
    assert listwise_softmax(scores, relevance).item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradient_is_the_difference_of_the_two_distributions():
    scores = torch.tensor([[0.5, -1.0, 2.0]], requires_grad=True)
    relevance = torch.tensor([[2.0, 0.0, 1.0]])
    listwise_softmax(scores, relevance).backward()
    expected = torch.softmax(scores.detach(), 1) - relevance / 3
    torch.testing.assert_close(scores.grad, expected)


def test_padding_has_no_influence():
    scores = torch.tensor([[1.0, 0.5, 99.0]], requires_grad=True)
    relevance = torch.tensor([[0.0, 1.0, 1.0]])
    present = torch.tensor([[True, True, False]])
    loss = listwise_softmax(scores, relevance, present)
    assert loss.item() == pytest.approx(
        listwise_softmax(torch.tensor([[1.0, 0.5]]), torch.tensor([[0.0, 1.0]])).item(), rel=1e-6
    )
    loss.backward()
    assert scores.grad[0, 2].item() == 0.0


def test_histories_without_a_relevant_candidate_do_not_count():
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    relevance = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 1.0, 0, 0]])
    present = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    loss = listwise_softmax(scores, relevance, present)
    kept = listwise_softmax(scores[[0, 2]], relevance[[0, 2]])
    assert loss.item() == pytest.approx(kept.item(), rel=1e-6)
    loss.backward()
    assert torch.isfinite(scores.grad).all()
    assert torch.equal(scores.grad[1], torch.zeros(4))


def test_no_relevant_candidate_at_all_is_zero():
    scores = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = listwise_softmax(scores, torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(scores.grad, torch.zeros(2, 3))
