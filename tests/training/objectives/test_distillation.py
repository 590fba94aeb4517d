import dataclasses

import numpy as np
import pytest
import torch

from fusionrec.training.objectives.distillation import (
    DistillationLoss,
    DistillationSettings,
    DistillationTask,
)

TEACHER = np.tile(np.array([2.0, 0.0, -2.0], np.float32), (8, 1))


@pytest.fixture
def make(still_encoder, catalogue, examples):
    def build(**settings) -> tuple[DistillationTask, torch.nn.Module]:
        taught = dataclasses.replace(examples, scores=TEACHER)
        chosen = DistillationSettings(encoder=str(still_encoder), max_tokens=32, **settings)
        task = DistillationTask(chosen, catalogue, taught)
        return task, task.build_model()

    return build


def test_a_student_without_an_opinion_is_wrong_by_the_teachers_margins(make):
    task, model = make(student="reranker")
    torch.nn.init.zeros_(model.classifier.weight)
    margins = np.array([2.0, 4.0]) / TEACHER.std()
    loss = task.loss(model, task.batch(np.arange(8)))
    assert loss.item() == pytest.approx((margins**2).mean(), rel=1e-5)


def test_divergence_from_a_student_without_an_opinion(make):
    task, model = make(student="reranker", distillation_loss=DistillationLoss.KL)
    torch.nn.init.zeros_(model.classifier.weight)
    share = np.exp(TEACHER[0] / TEACHER.std())
    share /= share.sum()
    loss = task.loss(model, task.batch(np.arange(8)))
    assert loss.item() == pytest.approx((share * np.log(3 * share)).sum(), rel=1e-4)


@pytest.mark.parametrize("student", ["encoder", "reranker"])
@pytest.mark.parametrize("loss", DistillationLoss)
def test_the_student_learns_the_teachers_order(make, student, loss):
    torch.manual_seed(0)
    task, model = make(student=student, distillation_loss=loss, temperature=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        found = task.loss(model, task.batch(np.arange(8)))
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.item())
    assert losses[-1] < 0.7 * losses[0]
