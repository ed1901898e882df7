"""The diagonal Fisher information of the gates, against computations that know nothing of the hooks."""

import pytest
import torch
import torch.nn.functional as F

from runs import described, random_tokens, small_llama
from secateur import sensitivity
from secateur.attach import attached
from secateur.describe import describe
from secateur.gates import by_group
from secateur.sensitivity import ROWS_AT_ONCE, balanced, drawn, gate_sensitivity, weighted
from secateur.units import Group
from secateur.vocabulary import LOGITS_AT_ONCE


def brute_force(model, groups, ids_NT, seed):
    """The squared gradient by the gates of the log-likelihood of labels the model draws, averaged over rows."""
    tokens = ids_NT.shape[1] - 1
    generator = torch.Generator().manual_seed(seed)
    total_N = torch.zeros(sum(g.units for g in groups))
    for ids_T in ids_NT:
        gate_N = torch.ones_like(total_N, requires_grad=True)
        with attached(model, groups, by_group(gate_N, groups)):
            logits_TV = model(ids_T[None]).logits[0, :-1]
        distribution_TV = logits_TV.softmax(-1).cumsum(-1)
        labels_T = (distribution_TV < torch.rand(tokens, 1, generator=generator) * distribution_TV[:, -1:]).sum(-1)
        (grad_N,) = torch.autograd.grad(F.cross_entropy(logits_TV, labels_T, reduction="sum"), gate_N)
        total_N += grad_N.square()
    return total_N / tokens / len(ids_NT)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}])
def test_sensitivity_equals_squared_gradients_of_sequences_that_the_model_labels(changes, monkeypatch):
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", 4 * 64 * 5)  # 5 rows at a time, of 8 a sequence
    model = small_llama(**changes)
    groups = describe(model).groups
    ids_NT = random_tokens(3, 9)
    expected_N = brute_force(model, groups, ids_NT, seed=5)
    torch.testing.assert_close(gate_sensitivity(model, groups, ids_NT, seed=5), expected_N, rtol=1e-4, atol=1e-9)
    assert (expected_N > 0).all()


def test_half_the_sensitivity_is_the_kl_divergence_of_a_gate_that_moves_a_little():
    model = small_llama()
    groups = describe(model).groups
    ids_NT = random_tokens(400, 9)
    sensitivity_N = gate_sensitivity(model, groups, ids_NT)
    for unit in (0, 40, 150):
        gate_N = torch.ones_like(sensitivity_N)
        gate_N[unit] = 0.9
        with torch.no_grad():
            teacher_NTV = model(ids_NT).logits[:, :-1].log_softmax(-1)
            with attached(model, groups, by_group(gate_N, groups)):
                student_NTV = model(ids_NT).logits[:, :-1].log_softmax(-1)
        kl = (teacher_NTV.exp() * (teacher_NTV - student_NTV)).sum(-1).mean().item()
        assert 0.5 * sensitivity_N[unit].item() * 0.1**2 == pytest.approx(kl, rel=0.35)


def test_sensitivity_leaves_no_trace_in_the_model():
    model = small_llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    gate_sensitivity(model, describe(model).groups, random_tokens(2, 9))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and not p.requires_grad
    assert not any(m._forward_pre_hooks for m in model.modules())


GROUPS = tuple(
    Group(f"layers.{layer}.{kind}", layer, kind, units, "", (), ())
    for layer in range(2)
    for kind, units in (("heads", 2), ("channels", 3))
)


def test_heads_count_more_than_channels_by_the_weight():
    ones_N = torch.ones(10)
    assert weighted(ones_N, GROUPS, 3.0).tolist() == [3, 3, 1, 1, 1, 3, 3, 1, 1, 1]


def test_balancing_evens_out_layers_and_keeps_the_order_within_each():
    sensitivity_N = torch.tensor([5.0, 6.0, 1.0, 2.0, 4.0, 7.0, 8.0, 100.0, 200.0, 400.0])
    even_N = balanced(sensitivity_N, GROUPS, 1.0)
    torch.testing.assert_close(even_N[2:5], even_N[7:10])
    torch.testing.assert_close(even_N[2:5], torch.tensor([10.0, 20.0, 40.0]))
    half_N = balanced(sensitivity_N, GROUPS, 0.5)
    torch.testing.assert_close(half_N[9] / half_N[4], torch.tensor(10.0))
    assert half_N[:2].tolist() == [5.0, 6.0] and half_N[5:7].tolist() == [7.0, 8.0]
    torch.testing.assert_close(balanced(sensitivity_N, GROUPS, 0.0), sensitivity_N)


def test_labels_are_drawn_as_the_model_predicts_them():
    p_V = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    luck_R1 = torch.rand((20_000, 1), generator=torch.Generator().manual_seed(0))
    drawn_R = drawn(p_V.expand(20_000, 5), luck_R1)[:, 0]
    shares_V = torch.bincount(drawn_R, minlength=5) / len(drawn_R)
    assert shares_V[1] == 0 and (shares_V - p_V).abs().max() < 0.015


def test_rows_that_go_through_together_count_one_by_one(monkeypatch):
    model = small_llama()
    groups, rows_NT = described(model, 0.3)[0].groups, random_tokens(6, 16)
    together = gate_sensitivity(model, groups, rows_NT)
    assert ROWS_AT_ONCE > 1
    monkeypatch.setattr(sensitivity, "ROWS_AT_ONCE", 1)
    seen = []
    alone = gate_sensitivity(model, groups, rows_NT, seen.append)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-7)
    assert seen == [1, 2, 3, 4, 5, 6]
