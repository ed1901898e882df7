"""The diagonal Fisher information of the gates, against a computation that knows nothing of the trick."""

import pytest
import torch
import torch.nn.functional as F

from runs import random_tokens, small_llama
from secateur.attach import writer
from secateur.describe import describe
from secateur.sensitivity import balanced, gate_sensitivity, weighted
from secateur.units import Group


def brute_force(model, groups, ids_NT):
    """Every token has gates of its own; the squared gradient by each, summed over tokens, averaged over rows."""
    tokens = ids_NT.shape[1] - 1
    totals = [torch.zeros(g.units) for g in groups]
    for ids_T in ids_NT:
        gates = [torch.ones(len(ids_T), g.units, requires_grad=True) for g in groups]
        handles = []
        for group, gate_TK in zip(groups, gates, strict=True):
            module = writer(model, group)

            def scale(_module, args, gate_TK=gate_TK, block=module.in_features // group.units):
                return (args[0] * gate_TK.repeat_interleave(block, dim=1),)

            handles.append(module.register_forward_pre_hook(scale))
        logits_TV = model(ids_T[None]).logits[0]
        loss = F.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="sum")
        for total, grad_TK in zip(totals, torch.autograd.grad(loss, gates), strict=True):
            total += (grad_TK / tokens).square().sum(0)
        for handle in handles:
            handle.remove()
    return torch.cat(totals) * tokens / len(ids_NT)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}])
def test_sensitivity_equals_squared_per_token_gradients_of_the_gates(changes):
    model = small_llama(**changes)
    groups = describe(model).groups
    ids_NT = random_tokens(3, 9)
    expected = brute_force(model, groups, ids_NT)
    torch.testing.assert_close(gate_sensitivity(model, groups, ids_NT), expected, rtol=1e-4, atol=1e-9)
    assert (expected > 0).all()


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
