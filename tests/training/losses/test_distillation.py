import math

import pytest
import torch

from fusionrec.training.losses.distillation import list_kl, margin_mse

ALL = torch.ones(1, 3, dtype=torch.bool)


def test_margins_have_a_known_answer():
    # Margins of the student: 1, 2; of the teacher: 3, 2.
    student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[9.0, 6.0, 7.0]])
    assert margin_mse(student, teacher, ALL).item() == pytest.approx((2**2 + 0) / 2)


def test_divergence_has_a_known_answer():
    # p = (3/4, 1/4) and q = (1/2, 1/2).
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert list_kl(student, teacher, ALL[:, :2]).item() == pytest.approx(expected, rel=1e-5)
    flat = list_kl(student, teacher * 5, ALL[:, :2], temperature=5.0)
    assert flat.item() == pytest.approx(25 * expected, rel=1e-5)


@pytest.mark.parametrize("loss", [margin_mse, list_kl])
def test_a_constant_added_to_the_teacher_changes_nothing(loss):
    teacher = torch.tensor([[0.5, -1.0, 2.0]])
    assert loss(teacher + 3.0, teacher, ALL).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("loss", [margin_mse, list_kl])
def test_padding_has_no_influence_and_the_teacher_no_gradient(loss):
    student = torch.tensor([[1.0, 0.5, 40.0]], requires_grad=True)
    teacher = torch.tensor([[0.2, 0.9, -7.0]], requires_grad=True)
    found = loss(student, teacher, torch.tensor([[True, True, False]]))
    whole = loss(student[:, :2], teacher[:, :2], ALL[:, :2])
    assert found.item() == pytest.approx(whole.item(), rel=1e-6)
    found.backward()
    assert student.grad is not None
    assert student.grad[0, 2] == 0
    assert teacher.grad is None


@pytest.mark.parametrize("loss", [margin_mse, list_kl])
def test_lists_of_one_teach_nothing(loss):
    alone = torch.tensor([[True, False, False]])
    found = loss(torch.zeros(1, 3, requires_grad=True), torch.ones(1, 3), alone)
    found.backward()
    assert found.item() == pytest.approx(0.0, abs=1e-6)
