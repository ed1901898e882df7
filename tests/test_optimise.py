"""One step of the optimiser: the released recipe to the letter, schedules, bounds, and a state that can be restored."""

import math

import pytest
import torch

from secateur.budget import Budget, largest_that_fits
from secateur.optimise import Optimiser
from secateur.recipes import auto_recipe, paper_recipe
from secateur.relaxation import LOWEST

UNITS = 400
CPU = torch.device("cpu")


def budget(share=0.7, constraints=1, units=UNITS):
    params_N = torch.tensor([64, 96, 512])[torch.arange(units) % 3]
    constraint_N = torch.arange(units) % constraints
    total_C = torch.zeros(constraints, dtype=torch.int64).index_add(0, constraint_N, params_N)
    return Budget(tuple(map(str, range(constraints))), constraint_N, params_N, (share * total_C).long())


def gradients(step, units=UNITS):
    return torch.randn(units, generator=torch.Generator().manual_seed(1000 + step)) * 1e-3


def advance(optimiser, steps):
    return [optimiser.advance(gradients(optimiser.done), 1.0, 0.5, 0.1) for _ in range(steps)]


# --- the released recipe ---------------------------------------------------------------------------------------------


def test_paper_gates_start_at_1_with_normal_noise_of_a_hundredth():
    z_N = Optimiser(paper_recipe(1000), budget(units=30_000), 1000, 0, CPU).z_N
    assert z_N.mean().item() == pytest.approx(1.0, abs=3e-4)
    assert z_N.std().item() == pytest.approx(0.01, rel=0.03)


def test_paper_noise_follows_the_seed():
    first, again, other = (Optimiser(paper_recipe(1000), budget(), 1000, seed, CPU).z_N for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_paper_multipliers_start_at_0_and_ascend_at_2e_2_4e_1_and_2e_2():
    optimiser = Optimiser(paper_recipe(1000), budget(constraints=2), 1000, 0, CPU)
    (first, second) = advance(optimiser, 2)
    for lambdas in (first.lambda1, first.lambda2, first.lambda3):
        assert lambdas == [0.0, 0.0]
    warm = 1 / 100  # Adam's first step is its learning rate, here in the first of 100 warm-up steps
    assert second.lambda1 == pytest.approx([2e-2 * warm] * 2, rel=1e-3)
    assert second.lambda2 == pytest.approx([4e-1 * warm] * 2, rel=1e-3)
    assert second.lambda3 == pytest.approx([2e-2 * warm] * 2, rel=1e-3)


def test_paper_multipliers_keep_ascending_while_too_much_is_kept():
    steps = advance(Optimiser(paper_recipe(1000), budget(share=0.1), 1000, 0, CPU), 30)
    assert steps[-1].score > 0.1
    for name in ("lambda1", "lambda2"):
        values = [getattr(step, name)[0] for step in steps]
        assert values == sorted(values) and values[-1] > values[0]


def test_paper_gates_move_by_2e_2_a_step_after_100_warm_up_steps_then_along_a_cosine_to_zero():
    optimiser = Optimiser(paper_recipe(1000), budget(), 1000, 0, CPU)
    before = optimiser.z_N.clone()
    advance(optimiser, 1)
    moved = (optimiser.z_N - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 2e-2 / 100), rtol=2e-3, atol=1e-7)
    rates = [optimiser._rate() for optimiser.done in range(1000)]
    assert max(rates) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.099)), rel=1e-3)
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] < 1e-4


def test_paper_asks_for_the_whole_budget_at_once_and_never_fixes_the_kept_set():
    optimiser = Optimiser(paper_recipe(1000), budget(0.7), 1000, 0, CPU)
    assert advance(optimiser, 1)[0].target == pytest.approx(0.7, abs=1e-4)
    assert optimiser.settles_at == 1000


# --- any recipe ------------------------------------------------------------------------------------------------------

RECIPES = pytest.mark.parametrize("recipe", [auto_recipe, paper_recipe])


@RECIPES
def test_gates_never_fall_below_minus_a_tenth(recipe):
    optimiser = Optimiser(recipe(100), budget(), 100, 0, CPU)
    for _ in range(60):
        optimiser.advance(torch.ones(UNITS), 1.0, 0.5, 0.1)
        assert optimiser.z_N.min() >= -0.1
    optimiser.theta_N.data -= 100.0  # as far down as any gradient could take them
    optimiser.advance(torch.ones(UNITS), 1.0, 0.5, 0.1)
    assert torch.equal(optimiser.z_N, torch.full((UNITS,), -0.1))


@RECIPES
def test_a_gate_at_the_bound_opens_again_when_its_gradient_says_so(recipe):
    optimiser = Optimiser(recipe(100), budget(0.9), 100, 0, CPU)
    optimiser.z_N = torch.full((UNITS,), LOWEST)
    optimiser.theta_N.data.copy_((optimiser.z_N - 1) / optimiser.step_size_N)
    for _ in range(60):
        optimiser.advance(-torch.ones(UNITS), 1.0, 0.5, 0.1)
    assert (optimiser.z_N > 0).any()


@RECIPES
def test_the_recorded_scores_and_targets_are_those_of_the_gates(recipe):
    optimiser = Optimiser(recipe(100), budget(0.6), 100, 0, CPU)
    for step in advance(optimiser, 70):
        assert 0.0 <= step.score <= 1.0 and 0.0 <= step.kept <= 1.0
    assert step.step == 70 and step.target == pytest.approx(0.6, abs=1e-3)


def test_gates_that_the_loss_minds_less_take_larger_steps():
    optimiser = Optimiser(auto_recipe(100), budget(), 100, 0, CPU)
    density_N = 10.0 ** torch.linspace(-8, -2, UNITS)
    sensitivity_N = density_N * optimiser.limits.share_N
    optimiser.start_from(sensitivity_N, sensitivity_N)
    steps_N = optimiser.step_size_N
    assert (steps_N.diff() <= 0).all() and steps_N[0] > steps_N[-1]
    before_N = optimiser.z_N.clone()
    optimiser.advance(torch.ones(UNITS), 1.0, 0.5, 0.1)
    moved_N = before_N - optimiser.z_N
    torch.testing.assert_close(moved_N / moved_N[0], steps_N / steps_N[0], rtol=1e-3, atol=1e-4)


def test_units_that_fit_the_budget_by_sensitivity_start_whole_and_the_others_lower_but_open():
    optimiser = Optimiser(auto_recipe(100), budget(0.6), 100, 0, CPU)
    density_N = torch.rand(UNITS, generator=torch.Generator().manual_seed(0)) + 0.1
    sensitivity_N = density_N * optimiser.limits.share_N
    optimiser.start_from(sensitivity_N, sensitivity_N)
    inside_N = largest_that_fits(density_N, optimiser.limits)
    assert (optimiser.z_N[inside_N] == 1.0).all()
    outside_N = optimiser.z_N[~inside_N]
    assert (outside_N > 0).all() and (outside_N < 1).all()


def test_gates_that_go_on_start_with_the_set_that_sensitivity_says_whatever_their_values():
    optimiser = Optimiser(auto_recipe(100), budget(0.5), 100, 0, CPU)
    density_N = torch.rand(UNITS, generator=torch.Generator().manual_seed(0)) + 0.1
    sensitivity_N = density_N * optimiser.limits.share_N
    within_N = largest_that_fits(density_N, budget(0.8))
    learned_N = torch.linspace(0.3, 1.7, UNITS)
    optimiser.go_on_from(torch.where(within_N, learned_N, 0.0), within_N)
    optimiser.start_from(sensitivity_N, sensitivity_N)
    inside_N = largest_that_fits(density_N, optimiser.limits)
    assert (inside_N <= within_N).all() and (inside_N < within_N).any()
    torch.testing.assert_close(optimiser.z_N[inside_N], learned_N[inside_N])
    assert (optimiser.z_N[~inside_N] < 0.3).all()


def test_fixing_keeps_the_largest_set_that_fits_and_holds_it():
    optimiser = Optimiser(auto_recipe(100), budget(0.5), 100, 0, CPU)
    advance(optimiser, optimiser.settles_at)
    expected_N = largest_that_fits(optimiser.z_N, optimiser.limits)
    optimiser.fix_kept_set()
    assert torch.equal(optimiser.z_N > 0, expected_N)
    while optimiser.done < 100:
        optimiser.advance(torch.randn(UNITS), 1.0, 0.5, 0.1)
        assert torch.equal(optimiser.z_N > 0, expected_N)


def test_what_may_not_be_kept_stays_closed_whatever_the_gradient_and_the_room():
    optimiser = Optimiser(auto_recipe(40), budget(0.9), 40, 0, CPU)
    within_N = torch.arange(UNITS) % 2 == 0
    before_N = torch.rand(UNITS, generator=torch.Generator().manual_seed(0)) + 0.5
    optimiser.go_on_from(before_N, within_N)
    optimiser.start_from(torch.ones(UNITS), torch.ones(UNITS))
    assert torch.equal(optimiser.z_N[within_N], before_N[within_N]), "there is room for all of them"
    for _ in range(20):
        optimiser.advance(-torch.ones(UNITS), 1.0, 0.5, 0.1)
        assert (optimiser.z_N[~within_N] == LOWEST).all() and (optimiser.z_N[within_N] > 0).all()
    optimiser.fix_kept_set()
    assert torch.equal(optimiser.kept_N, within_N)


@RECIPES
@pytest.mark.parametrize("interrupted_at", [0, 1, 13, 50, 51, 75, 90])
def test_a_restored_state_goes_on_bit_for_bit(recipe, interrupted_at):
    def until(optimiser, end):
        records = []
        while optimiser.done < end:
            if optimiser.done == optimiser.settles_at and optimiser.kept_N is None:
                optimiser.fix_kept_set()
            records += advance(optimiser, 1)
        return records

    def fresh():
        optimiser = Optimiser(recipe(100), budget(constraints=2), 100, 0, CPU)
        sensitivity_N = torch.rand(UNITS, generator=torch.Generator().manual_seed(5))
        optimiser.start_from(sensitivity_N, sensitivity_N)
        return optimiser

    whole, first, second = fresh(), fresh(), Optimiser(recipe(100), budget(constraints=2), 100, 0, CPU)
    records = until(whole, 100)
    until(first, interrupted_at)
    second.restore(first.state())
    assert until(second, 100) == records[interrupted_at:]
    assert torch.equal(second.z_N, whole.z_N)
    final = whole.state()
    assert final.keys() == second.state().keys()
    assert all(torch.equal(value, final[name]) for name, value in second.state().items())
