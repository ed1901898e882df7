"""The plan meets the budget exactly, changes as little as it must, and is refused when it does not fit."""

import json

import pytest
import torch

from runs import described, small_llama
from secateur.files import InputError
from secateur.gates import Gates, by_group
from secateur.plan import load_plan, make_plan, save_plan


@pytest.fixture(scope="module")
def model():
    return small_llama(num_key_value_heads=4)


@pytest.fixture(scope="module")
def groups(model):
    return described(model, 0.3)[0].groups


def gates_of(z_N, groups):
    return Gates(z_N, groups, {})


def random_z(groups, seed=0):
    return torch.randn(sum(g.units for g in groups), generator=torch.Generator().manual_seed(seed)) + 0.5


def planned(model, z_N, sparsity, scope="model", loss=lambda gates: 1.0):
    description, limits = described(model, sparsity, scope)
    plan, rounding = make_plan(gates_of(z_N, description.groups), limits, "ragged", loss)
    return plan, rounding, limits, description.groups


def kept_mask(plan, groups):
    return torch.cat([torch.zeros(g.units, dtype=torch.bool).index_fill(0, plan.kept[g.name], True) for g in groups])


# --- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["model", "kind", "layer"])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.8])
def test_a_plan_meets_its_budget_to_within_one_smallest_unit(model, groups, scope, sparsity):
    plan, rounding, limits, groups = planned(model, random_z(groups), sparsity, scope)
    kept_N = kept_mask(plan, groups)
    for c, allowed in enumerate(limits.allowed_C.tolist()):
        inside_N = limits.constraint_N == c
        room = allowed - int(limits.params_N[inside_N & kept_N].sum())
        assert 0 <= room < int(limits.params_N[inside_N].min())
    assert rounding.kept == pytest.approx(limits.share_of(kept_N))
    assert rounding.kept <= rounding.allowed + 1e-6


def test_open_gates_that_fit_exactly_are_kept_as_they_are(model, groups):
    z_N = random_z(groups).abs() + 0.1
    first, _, _, _ = planned(model, z_N, 0.3)
    z_N = torch.where(kept_mask(first, groups), z_N, torch.tensor(-0.1))
    plan, rounding, _, _ = planned(model, z_N, 0.3)
    assert all(torch.equal(plan.gates(groups)[name], z.relu()) for name, z in by_group(z_N, groups).items())
    assert (rounding.closed, rounding.reopened, rounding.cost) == (0, 0, 0.0)
    assert rounding.open_gates == pytest.approx(rounding.kept)


def test_when_too_many_are_open_the_lowest_gates_go(model, groups):
    z_N = random_z(groups).abs() + 0.1
    plan, rounding, limits, _ = planned(model, z_N, 0.4)
    kept_N = kept_mask(plan, groups)
    assert rounding.closed == int((~kept_N).sum()) and rounding.reopened == 0
    for size in set(limits.params_N.tolist()):
        same_N = limits.params_N == size
        assert z_N[same_N & kept_N].min() >= z_N[same_N & ~kept_N].max()


@pytest.mark.parametrize(("loss_reopened", "value"), [(0.9, 1.0), (1.1, 0.0)])
def test_units_reopened_for_lack_of_open_ones_get_1_or_0_by_held_out_loss(model, groups, loss_reopened, value):
    z_N = torch.full_like(random_z(groups), -0.1)
    z_N[::5] = 2.0  # fewer than the budget allows

    def loss(gates):
        return loss_reopened if any((gate == 1.0).any() for gate in gates.values()) else 1.0

    plan, rounding, _, _ = planned(model, z_N, 0.3, loss=loss)
    reopened_N = kept_mask(plan, groups) & (z_N <= 0)
    gates_N = torch.cat(list(plan.gates(groups).values()))
    assert rounding.reopened == int(reopened_N.sum()) > 0 and rounding.closed == 0
    assert rounding.reopened_scale == value and (gates_N[reopened_N] == value).all()
    assert (gates_N[z_N > 0] == 2.0).all()
    assert rounding.held_out_planned == min(loss_reopened, 1.0)


def test_held_out_losses_are_those_of_the_learned_and_of_the_planned_gates(model, groups):
    z_N = random_z(groups)

    def loss(gates):
        return float(sum(gate.sum() for gate in gates.values()))

    plan, rounding, _, _ = planned(model, z_N, 0.7, loss=loss)
    assert rounding.held_out_learned == pytest.approx(float(z_N.relu().sum()), rel=1e-5)
    assert rounding.held_out_planned == pytest.approx(loss(plan.gates(groups)), rel=1e-5)
    assert rounding.cost == rounding.held_out_planned - rounding.held_out_learned


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(model, groups, tmp_path):
    plan, rounding, _, _ = planned(model, random_z(groups), 0.3)
    save_plan(tmp_path / "plan.json", plan, rounding, "abc")
    return tmp_path / "plan.json", plan, rounding


def test_a_plan_survives_saving_and_loading_bit_for_bit(saved, groups):
    path, plan, rounding = saved
    loaded, same_rounding = load_plan(path, groups, "abc")
    for name, index in plan.kept.items():
        assert torch.equal(loaded.kept[name], index)
        assert torch.equal(loaded.scales[name], plan.scales[name])
    assert (loaded.shape, same_rounding) == (plan.shape, rounding)


def change(values, key, value):
    *parents, last = key
    inside = values
    for parent in parents:
        inside = inside[parent]
    inside[last] = value


CHANNELS = "layers.1.channels"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (("format",), 2, "not a plan of format 1"),
        (("architecture",), "other", "another architecture"),
        (("kept", CHANNELS), [1, 0], "does not list units of 0 to 63 in order"),
        (("kept", CHANNELS), [3, 3], "in order"),
        (("kept", CHANNELS), [0, 64], "in order"),
        (("kept", CHANNELS), [-1, 2], "in order"),
        (("kept", CHANNELS), [[0, 1]], "not a valid plan"),
        (("kept", CHANNELS), [0, 2**70], "not a valid plan"),
        (("kept", CHANNELS), [0, 1.5], "not a valid plan"),
        (("scales", CHANNELS), [0.5, None], "not a valid plan"),
        (("scales", CHANNELS), [0.5, float("nan")], "not finite"),
        (("scales", CHANNELS), [0.5, -1.0], "negative"),
        (("rounding", "kept"), None, "not a valid plan"),
        (("rounding", "budgets"), [{"budget": 3}], "not a valid plan"),
        (("scales", CHANNELS), [1.0], "in order"),
        (("kept", CHANNELS), "all", "not a valid plan"),
        (("kept",), {}, "not a valid plan"),
        (("scales",), None, "not a valid plan"),
        (("rounding",), {"kept": 1}, "not a valid plan"),
    ],
)
def test_a_plan_that_is_no_plan_of_this_model_is_refused(saved, groups, key, value, reason):
    path, _, _ = saved
    values = json.loads(path.read_text())
    values["scales"][CHANNELS] = [1.0, 1.0]
    values["kept"][CHANNELS] = [0, 1]
    change(values, key, value)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=reason) as error:
        load_plan(path, groups, "abc")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"plan"'])
def test_a_file_that_is_no_plan_at_all_is_refused(saved, groups, text):
    path, _, _ = saved
    path.write_text(text)
    with pytest.raises(InputError, match="secateur plan RUN"):
        load_plan(path, groups, "abc")


def test_a_missing_plan_names_the_command_that_writes_it(tmp_path, groups):
    with pytest.raises(InputError, match="missing; `secateur plan RUN` writes it"):
        load_plan(tmp_path / "plan.json", groups, "abc")
