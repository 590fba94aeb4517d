import math

import pytest
import torch

from fusionrec.training.losses.info_nce import info_nce


def unit(*rows: list[float]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


def test_a_known_answer():
    # Scores are 1 on the diagonal and 0 off it, so each row's share is e/(e+1).
    vectors = torch.eye(2)
    loss = info_nce(vectors, vectors, torch.zeros(2, 2, dtype=torch.bool), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)


def test_uniform_scores_cost_the_logarithm_of_the_batch():
    vectors = unit([1.0, 0.0]).expand(5, 2)
    loss = info_nce(vectors, vectors, torch.zeros(5, 5, dtype=torch.bool))
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)


def test_a_masked_negative_has_no_influence_and_gets_no_gradient():
    torch.manual_seed(0)
    histories = torch.nn.functional.normalize(torch.randn(3, 4), dim=-1)
    items = torch.nn.functional.normalize(torch.randn(3, 4), dim=-1).requires_grad_()
    masked = torch.ones(3, 3, dtype=torch.bool)
    loss = info_nce(histories, items, masked)
    assert loss.item() == 0.0  # every other item is a false negative: nothing to tell apart
    loss.backward()
    assert torch.equal(items.grad, torch.zeros_like(items))


def test_further_negatives_beyond_the_batch_count():
    vectors = torch.eye(3)
    none = torch.zeros(2, 3, dtype=torch.bool)
    loss = info_nce(vectors[:2], vectors, none, temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-1)), rel=1e-6)


def test_correction_equals_sampling_from_the_uniform_distribution():
    # Item 1 is three times as popular as items 0 and 2: dividing exp(score) by its share, it counts
    # as a negative a third as much.
    vectors = torch.eye(3)
    share = torch.tensor([0.2, 0.6, 0.2])
    none = torch.zeros(3, 3, dtype=torch.bool)
    rows = []
    for i in range(3):
        weights = torch.exp(vectors[i] @ vectors.T) / share
        rows.append(-torch.log(weights[i] / weights.sum()))
    loss = info_nce(vectors, vectors, none, temperature=1.0, log_popularity=share.log())
    assert loss.item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-5)


def test_gradient_pulls_the_positive_and_pushes_the_negative():
    histories = unit([1.0, 0.2], [0.2, 1.0])
    items = unit([1.0, 1.0], [1.0, 0.9]).requires_grad_()
    info_nce(histories, items, torch.zeros(2, 2, dtype=torch.bool), temperature=0.5).backward()
    toward = -(items.grad @ histories.T)  # change of the scores under a step downhill
    assert toward[0, 0] > 0 > toward[0, 1]
    assert toward[1, 1] > 0 > toward[1, 0]


def test_gradient_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(1)
    histories = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    items = torch.randn(4, 3, generator=generator, requires_grad=True)
    masked = torch.rand(4, 4, generator=generator) < 0.3
    info_nce(histories.float(), items, masked, temperature=1.0).backward()
    step = 1e-2
    for place in [(0, 0), (2, 1), (3, 2)]:
        moved = items.detach().clone()
        moved[place] += step
        up = info_nce(histories.float(), moved, masked, temperature=1.0)
        moved[place] -= 2 * step
        down = info_nce(histories.float(), moved, masked, temperature=1.0)
        assert (up - down).item() / (2 * step) == pytest.approx(items.grad[place].item(), abs=2e-3)


def test_no_rows_give_zero():
    empty = torch.empty(0, 3, requires_grad=True)
    loss = info_nce(empty, empty, torch.empty(0, 0, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
