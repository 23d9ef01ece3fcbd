"""Label-row losses against the formulas over whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saccade.dualspeed.loss import cross_entropy_and_kl_sum, cross_entropy_sum, label_rows


@pytest.fixture
def batch():
    torch.manual_seed(0)
    hidden = torch.randn(3, 12, 8, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 12, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 20, (3, 12))
    labels[torch.rand(3, 12) < 0.5] = -100
    labels[2] = -100  # a sample without any label
    head = nn.Linear(8, 20, bias=False).double()
    return hidden, teacher, labels, head


def naive_sums(hidden, teacher, labels, head, temperature):
    """Token by token, from the formulas."""
    ce = kl = 0.0
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if labels[b, t + 1] == -100:
                continue
            ce = ce - head(hidden[b, t]).log_softmax(-1)[labels[b, t + 1]]
            p = (head(teacher[b, t]) / temperature).softmax(-1)
            q = (head(hidden[b, t]) / temperature).softmax(-1)
            kl = kl + (p * (p.log() - q.log())).sum()
    return ce, kl


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 1024])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sums_and_gradients_equal_the_formula(batch, chunk_rows: int, temperature: float) -> None:
    hidden, teacher, labels, head = batch
    rows, targets = label_rows(hidden, labels)
    teacher_rows, teacher_targets = label_rows(teacher, labels)
    assert torch.equal(targets, teacher_targets)
    ce, kl = cross_entropy_and_kl_sum(rows, teacher_rows, targets, head, temperature, chunk_rows)
    alone = cross_entropy_sum(rows, targets, head, chunk_rows)
    expected_ce, expected_kl = naive_sums(hidden, teacher.detach(), labels, head, temperature)
    # The losses are computed in float32, whatever the dtype of the hidden rows.
    torch.testing.assert_close(ce.double(), expected_ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl.double(), expected_kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, ce)

    got = torch.autograd.grad(ce + 0.7 * kl, (hidden, head.weight))
    want = torch.autograd.grad(expected_ce + 0.7 * expected_kl, (hidden, head.weight))
    # The teacher's distribution is a constant: no gradient flows through its use of the head either.
    p = [(head(teacher_row.detach()) / temperature).softmax(-1).detach() for teacher_row in teacher_rows]
    naive_kl = sum(
        (p_row * (p_row.log() - (head(row) / temperature).log_softmax(-1))).sum()
        for p_row, row in zip(p, rows, strict=True)
    )
    want_head = torch.autograd.grad(naive_sums(hidden, teacher, labels, head, 1.0)[0] + 0.7 * naive_kl, head.weight)[0]
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], want_head, rtol=1e-4, atol=1e-5)


def test_teacher_gets_no_gradient_and_equals_student_at_zero(batch) -> None:
    hidden, _, labels, head = batch
    rows, targets = label_rows(hidden, labels)
    teacher = rows.detach().clone().requires_grad_()
    _, kl = cross_entropy_and_kl_sum(rows, teacher, targets, head)
    assert kl.abs() < 1e-6
    grads = torch.autograd.grad(kl, (teacher,), allow_unused=True)
    assert grads[0] is None


def test_no_label_at_all_is_a_differentiable_zero() -> None:
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    rows, targets = label_rows(hidden, torch.full((2, 5), -100))
    head = nn.Linear(8, 20)
    loss = cross_entropy_sum(rows, targets, head)
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_logits_of_several_chunks_are_not_kept() -> None:
    """What autograd saves grows with the chunk, not with rows times vocabulary."""
    rows = torch.randn(4096, 16, requires_grad=True)
    head = nn.Linear(16, 5000, bias=False)
    targets = torch.randint(0, 5000, (4096,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = cross_entropy_sum(rows, targets, head, chunk_rows=256)
    assert sum(saved) < 256 * 5000
    assert F.cross_entropy(head(rows), targets, reduction="sum").allclose(loss, rtol=1e-4)
