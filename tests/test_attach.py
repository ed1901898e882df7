"""Gates on, gates off: exact, and the model is left as it was."""

import pytest
import torch

from runs import random_tokens, small_llama
from secateur.attach import attached, writer
from secateur.describe import describe


@pytest.fixture
def model():
    return small_llama(num_key_value_heads=4)


@pytest.fixture
def groups(model):
    return describe(model).groups


IDS = random_tokens(2, 10)


def ones(groups):
    return {g.name: torch.ones(g.units) for g in groups}


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_of_one_are_the_dense_model_exactly(model, groups, dtype):
    model = model.to(dtype)
    dense = logits(model)
    with attached(model, groups, ones(groups)):
        assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_gating_a_unit_equals_scaling_its_block_of_the_writers_columns(model, groups, value):
    for group in groups:
        unit = group.units - 2
        gates = ones(groups)
        gates[group.name][unit] = value
        with attached(model, groups, gates):
            gated = logits(model)
        weight = writer(model, group).weight
        dense_weight, block = weight.data.clone(), weight.shape[1] // group.units
        weight.data[:, unit * block : (unit + 1) * block] *= value
        scaled = logits(model)
        weight.data.copy_(dense_weight)
        torch.testing.assert_close(gated, scaled, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(gated, logits(model), atol=1e-3), f"{group.name} does nothing"


def test_hooks_are_gone_after_the_context(model, groups):
    dense = logits(model)
    with attached(model, groups, {g.name: torch.zeros(g.units) for g in groups}):
        assert hooks(model) == len(groups)
    assert hooks(model) == 0
    assert torch.equal(logits(model), dense)


def test_hooks_are_gone_after_an_exception_inside(model, groups):
    with pytest.raises(ZeroDivisionError), attached(model, groups, ones(groups)):
        raise ZeroDivisionError
    assert hooks(model) == 0


def test_hooks_are_gone_when_entering_fails_halfway(model, groups):
    gates = ones(groups)
    del gates[groups[-1].name]
    with pytest.raises(KeyError), attached(model, groups, gates):
        pass
    assert hooks(model) == 0


def test_every_gate_gets_a_gradient_and_no_weight_does(model, groups):
    gates = {name: gate.requires_grad_() for name, gate in ones(groups).items()}
    with attached(model, groups, gates):
        model(IDS).logits.square().mean().backward()
    assert all((gate.grad != 0).all() for gate in gates.values())
    assert all(p.grad is None for p in model.parameters())
