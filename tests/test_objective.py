"""The maps and losses of the method equal their formulas, in value and in gradient (method.md section 3)."""

import pytest
import torch
import torch.nn.functional as F

from secateur.objective import (
    CHUNK_BYTES,
    STRETCH_HIGH,
    STRETCH_LOW,
    annealed,
    distillation_loss,
    forward_gate,
    lagrangian,
    retention_score,
)

MUS = (0.5, 0.1, 0.05, 1e-3)


def stretched(z_N, mu):
    return torch.sigmoid((z_N - mu) * 2.4 / mu) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW


@pytest.mark.parametrize("mu", MUS)
def test_retention_score_is_0_at_0_and_1_at_twice_mu(mu):
    score = retention_score(torch.tensor([0.0, mu, 2 * mu]), mu)
    assert score[0] == 0.0
    assert score[1] == pytest.approx(0.5)
    assert score[2] == 1.0


@pytest.mark.parametrize("mu", MUS)
def test_retention_score_is_the_stretched_sigmoid_clamped(mu):
    z_N = torch.linspace(-4 * mu, 6 * mu, 301)
    score_N = retention_score(z_N, mu)
    torch.testing.assert_close(score_N, stretched(z_N, mu).clamp(0, 1))
    assert (score_N[z_N < 0] == 0.0).all() and (score_N[z_N > 2 * mu] == 1.0).all()


def test_retention_score_rises_between_0_and_twice_mu():
    score = retention_score(torch.linspace(0.0, 1.0, 101), 0.5)
    assert (score.diff() > 0).all()


def test_retention_score_tends_to_the_indicator_of_open_gates():
    z_N = torch.tensor([-0.1, -1e-3, 0.0, 0.02, 0.5, 1.0, 7.9])
    distances = [(retention_score(z_N, mu) - (z_N > 0).float()).abs().max() for mu in (0.5, 0.1, 0.05, 0.01)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0.0


def test_gradient_of_the_score_is_that_of_the_unclamped_sigmoid_for_closed_and_saturated_gates_too():
    z_N = torch.tensor([-0.1, -0.01, 0.0, 0.2, 0.9, 1.5], requires_grad=True)
    (grad,) = torch.autograd.grad(retention_score(z_N, 0.4).sum(), z_N)
    (expected,) = torch.autograd.grad(stretched(z_N, 0.4).sum(), z_N)
    torch.testing.assert_close(grad, expected)
    assert (grad > 0).all()


def test_forward_gate_is_relu_with_the_gradient_of_the_identity():
    z_N = torch.tensor([-0.1, -0.03, 0.0, 0.4, 1.0, 7.9], requires_grad=True)
    gate_N = forward_gate(z_N)
    upstream_N = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0, 6.0])
    (grad,) = torch.autograd.grad(gate_N, z_N, upstream_N)
    assert torch.equal(gate_N, z_N.relu())
    assert torch.equal(grad, upstream_N)


def test_annealing_starts_and_ends_where_it_is_told_and_follows_the_square_root():
    assert annealed(0.0, 0.5, 0.05) == 0.5
    assert annealed(1.0, 0.5, 0.05) == pytest.approx(0.05)
    assert annealed(0.25, 0.5, 0.1) == pytest.approx(0.5 - 0.4 * 0.5)


def plain_loss(student_BTV, teacher_BTV, ids_BT, kd_weight, temperature):
    student_RV, teacher_RV = (logits[:, :-1].flatten(0, 1) for logits in (student_BTV, teacher_BTV))
    ce = F.cross_entropy(student_RV, ids_BT[:, 1:].flatten())
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (student_RV, teacher_RV))
    kl = temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return ce + kd_weight * kl, ce, kl


def random_logits(rows=3, length=50, vocabulary=37):
    generator = torch.Generator().manual_seed(0)
    student_BTV = 3 * torch.randn(rows, length, vocabulary, generator=generator)
    teacher_BTV = student_BTV + torch.randn(rows, length, vocabulary, generator=generator)
    ids_BT = torch.randint(vocabulary, (rows, length), generator=generator)
    return student_BTV, teacher_BTV, ids_BT


def test_losses_of_float32_logits_are_not_rounded_where_passes_are_in_bfloat16():
    student_BTV, teacher_BTV, ids_BT = random_logits()
    plain = distillation_loss(student_BTV, teacher_BTV, ids_BT, 2.0, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert distillation_loss(student_BTV, teacher_BTV, ids_BT, 2.0, 1.0) == plain


@pytest.mark.parametrize("kd_weight", [0.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_loss_and_its_gradient_equal_the_plain_formula(kd_weight, temperature, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 64 * 4 * 37)  # 64 rows at a time, of 150: the last chunk is a smaller one
    student_BTV, teacher_BTV, ids_BT = random_logits()
    ours, theirs = (student_BTV.clone().requires_grad_() for _ in range(2))
    loss, ce, kl = distillation_loss(ours, teacher_BTV, ids_BT, kd_weight, temperature)
    expected, expected_ce, expected_kl = plain_loss(theirs, teacher_BTV, ids_BT, kd_weight, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ce, expected_ce.detach(), rtol=1e-5, atol=1e-6)
    if kd_weight:
        torch.testing.assert_close(kl, expected_kl.detach(), rtol=1e-5, atol=1e-6)
    (3.0 * loss).backward()
    (3.0 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
    assert (ours.grad[:, -1] == 0.0).all()  # nothing follows the last token


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_loss_takes_bfloat16_logits(temperature):
    student_BTV, teacher_BTV, ids_BT = (x.bfloat16() if x.is_floating_point() else x for x in random_logits())
    ours, theirs = student_BTV.clone().requires_grad_(), student_BTV.float().requires_grad_()
    loss, _, _ = distillation_loss(ours, teacher_BTV, ids_BT, 2.0, temperature)
    expected, _, _ = plain_loss(theirs, teacher_BTV.float(), ids_BT, 2.0, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    expected.backward()
    assert ours.grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=2e-2, atol=1e-5)


def test_distillation_from_itself_is_cross_entropy_alone():
    student_BTV, _, ids_BT = random_logits()
    loss, ce, kl = distillation_loss(student_BTV, student_BTV, ids_BT, 2.0, 1.0)
    assert abs(kl) < 1e-6
    torch.testing.assert_close(loss, ce)


def test_lagrangian_sums_the_three_terms_over_constraints():
    violation_C, undecided_C = torch.tensor([0.3, -0.1]), torch.tensor([0.05, 0.2])
    lambdas = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    value = lagrangian(violation_C, undecided_C, *lambdas)
    by_hand = (1 * 0.3 + 3 * 0.09 + 5 * 0.05) + (2 * -0.1 + 4 * 0.01 + 6 * 0.2)
    assert value.item() == pytest.approx(by_hand)
