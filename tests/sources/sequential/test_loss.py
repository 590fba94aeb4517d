"""Sampled softmax beside the softmax that it estimates."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from fusionrec.sources.sequential.loss import Negatives, sampled_softmax

NUM_ITEMS, WIDTH = 12, 5
ITEMS = np.repeat(np.arange(NUM_ITEMS - 2, dtype=np.int32), np.arange(1, NUM_ITEMS - 1))
"""Events: item i came i + 1 times, the last two never."""


@pytest.fixture
def generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield np.random.default_rng(0)


def loss_of(events, targets, vectors, negatives, generator):
    codes, log_expected = negatives.draw(generator)
    return sampled_softmax(events, targets, vectors[targets], codes, vectors[codes], log_expected)


def test_with_all_items_it_is_the_softmax(generator):
    vectors, events = torch.randn(NUM_ITEMS, WIDTH), torch.randn(7, WIDTH)
    targets = torch.arange(7)
    negatives = Negatives(ITEMS, NUM_ITEMS, NUM_ITEMS, 0.5)
    expected = functional.cross_entropy((events @ vectors.T)[:, : NUM_ITEMS - 2], targets)
    torch.testing.assert_close(loss_of(events, targets, vectors, negatives, generator), expected)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_sum_over_the_negatives_is_estimated_without_bias(generator, share):
    vectors, event = torch.randn(NUM_ITEMS, WIDTH), torch.randn(1, WIDTH)
    target = torch.tensor([3])
    scores = (event @ vectors.T)[0, : NUM_ITEMS - 2]
    expected = (scores.exp().sum() - scores[3].exp()).item()
    negatives = Negatives(ITEMS, NUM_ITEMS, 6, share)
    draws = 3000
    found = [
        (loss_of(event, target, vectors, negatives, generator).exp() - 1) * scores[3].exp()
        for _ in range(draws)
    ]
    estimates = torch.stack(found)
    error = estimates.std().item() / draws**0.5
    assert estimates.mean().item() == pytest.approx(expected, abs=4 * error)


def test_items_without_events_are_never_drawn(generator):
    for share in (0.0, 0.5, 1.0):
        negatives = Negatives(ITEMS, NUM_ITEMS, 8, share)
        drawn = torch.cat([negatives.draw(generator)[0] for _ in range(50)])
        assert drawn.max() == NUM_ITEMS - 3


def test_no_negative_left_costs_nothing(generator):
    events = torch.randn(2, WIDTH, requires_grad=True)
    vectors = torch.randn(1, WIDTH)
    codes = torch.zeros(1, dtype=torch.long)
    targets = torch.zeros(2, dtype=torch.long)
    loss = sampled_softmax(events, targets, vectors[targets], codes, vectors, torch.zeros(1))
    loss.backward()
    assert loss.item() == 0
    assert not events.grad.any()
