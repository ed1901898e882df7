"""What gates stand for: the formulas of each relaxation, where they start, and what they share."""

import json
import math
from dataclasses import replace

import pytest
import torch

from runs import described, random_tokens, small_llama
from secateur.budget import largest_that_fits
from secateur.checkpoints import Checkpoints
from secateur.learn import learn
from secateur.objective import forward_gate, retention_score
from secateur.optimise import Optimiser
from secateur.recipes import auto_recipe, paper_recipe, recipe_of
from secateur.relaxation import (
    BETA,
    RELAXATIONS,
    calibrated_scale,
    confined_gate,
    log_alpha,
    probability_open,
    projected_gate,
    sampled_gate,
)

STEPS = 12
MU = 0.5
Z = torch.linspace(-0.5, 2.0, 51)
CONFINED = ("hard-concrete", "hard-concrete-deterministic")
METHODS = pytest.mark.parametrize("method", RELAXATIONS)
RECIPES = pytest.mark.parametrize("recipe", ["auto", "paper"])


@pytest.fixture(scope="module")
def model():
    return small_llama(num_key_value_heads=4)


def run(model, method, recipe="auto", steps=STEPS, sparsity=0.3, binarise=True, seed=0, **options):
    description, limits = described(model, sparsity)
    return learn(
        model, description.groups, random_tokens(2 * steps, 12), random_tokens(2, 12, seed=9), limits,
        recipe_of(method, recipe, steps, binarise), steps=steps, batch_size=2, seed=seed, method=method, **options,
    )  # fmt: skip


def gradient(function, z_N):
    z_N = z_N.clone().requires_grad_()
    return torch.autograd.grad(function(z_N).sum(), z_N)[0]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- formulas --------------------------------------------------------------------------------------------------------


def test_hard_concrete_samples_are_those_of_the_formula():
    u_N = torch.rand(Z.shape, generator=generator()).double()
    log_alpha_N = (Z.double() - MU) * 2.4 / MU
    v_N = 1 / (1 + torch.exp(-(u_N.log() - (1 - u_N).log() + log_alpha_N) / (2 / 3)))
    torch.testing.assert_close(
        sampled_gate(Z, MU, generator()).double(), (1.2 * v_N - 0.1).clamp(0, 1), atol=1e-5, rtol=0
    )


def test_the_probability_of_being_open_is_the_share_of_samples_above_zero():
    many_N = torch.linspace(-0.4, 1.2, 5).repeat_interleave(20_000)
    share = (sampled_gate(many_N, MU, generator()) > 0).float().view(5, -1).mean(1)
    torch.testing.assert_close(share, probability_open(many_N[::20_000], MU), atol=0.01, rtol=0)


def test_a_gate_without_noise_is_hard_concretes_and_the_retention_score_and_never_leaves_0_to_1():
    by_hand = (torch.sigmoid(log_alpha(Z, MU)) * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(confined_gate(Z, MU), by_hand)
    torch.testing.assert_close(confined_gate(Z, MU), retention_score(Z, MU))
    wide_N = torch.linspace(-9, 9, 9999)
    assert confined_gate(wide_N, MU).min() == 0.0 and confined_gate(wide_N, MU).max() == 1.0
    assert torch.equal(gradient(lambda z: confined_gate(z, MU), Z), gradient(lambda z: retention_score(z, MU), Z))


def test_saturated_samples_still_hear_the_loss():
    grad_N = gradient(lambda z: sampled_gate(z, MU, generator()), Z)
    assert (grad_N > 0).all()
    m_N = sampled_gate(Z, MU, generator())
    assert ((m_N <= 0) | (m_N >= 1)).any()


def test_a_projected_gate_is_the_mask_with_the_gradient_of_the_keep_probability():
    inside_N = torch.rand(Z.shape, generator=generator()) > 0.5
    torch.testing.assert_close(projected_gate(Z, inside_N), inside_N.float(), atol=1e-6, rtol=0)
    p_N = torch.sigmoid((Z - 1) / 1.5)
    torch.testing.assert_close(gradient(lambda z: projected_gate(z, inside_N), Z), p_N * (1 - p_N) / 1.5)


def test_calibrated_scales_start_at_1_move_as_z_does_and_stay_between_a_half_and_one_and_a_half():
    assert (
        calibrated_scale(torch.ones(1), MU) == 1.0 and gradient(lambda z: calibrated_scale(z, MU), torch.ones(1)) == 1.0
    )
    scale_N = calibrated_scale(torch.linspace(-1, 9, 99), MU)
    assert (scale_N[: 99 // 10] == 0).all() and scale_N[11:].min() > 0.5 and scale_N.max() <= 1.5


@METHODS
def test_units_inside_the_budget_start_whole_and_the_others_nearly_closed(method):
    relaxation = RELAXATIONS[method]
    inside_N = torch.tensor([True, False])
    gates_N = relaxation.train(torch.tensor([1.0, 0.1]), MU, generator(), inside_N)
    if relaxation.sampled:
        gates_N = relaxation.deployed(torch.tensor([1.0, 0.1]), MU)
    assert gates_N[0] == pytest.approx(1.0, abs=1e-3) and 0 <= gates_N[1] < 0.11


# --- recipes ---------------------------------------------------------------------------------------------------------


@RECIPES
def test_the_default_method_takes_the_recipes_as_they_are(recipe):
    whole = {"auto": auto_recipe, "paper": paper_recipe}[recipe](40)
    assert recipe_of("deterministic", recipe, 40, True) == whole
    without = recipe_of("deterministic", recipe, 40, False)
    assert (without.dual_lr[2], without.dual_start[2]) == (0.0, 0.0) and without.dual_lr[:2] == whole.dual_lr[:2]


@RECIPES
@pytest.mark.parametrize("method", [m for m in RELAXATIONS if m.startswith("hard")])
def test_hard_concrete_shares_all_of_the_recipe_but_annealing_and_binarisation(method, recipe):
    whole, own = ({**vars(recipe_of(m, recipe, 40, True))} for m in ("deterministic", method))
    assert (own.pop("mu_start"), own.pop("mu_end"), own["dual_lr"][2], own["dual_start"][2]) == (0.5, 0.5, 0.0, 0.0)
    own["dual_lr"], own["dual_start"] = ((*own[name][:2], whole[name][2]) for name in ("dual_lr", "dual_start"))
    assert own == {name: value for name, value in whole.items() if name in own}


# --- learning --------------------------------------------------------------------------------------------------------


@METHODS
@RECIPES
@pytest.mark.parametrize("step", [2, STEPS // 2, STEPS - 1])
def test_an_interrupted_run_of_any_method_goes_on_to_the_same_gates(model, tmp_path, method, recipe, step):
    def interrupt(reported):
        if reported.step == step:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1000)
    with pytest.raises(KeyboardInterrupt):
        run(model, method, recipe, checkpoints=checkpoints, on_step=interrupt)
    records, whole_records = [], []
    resumed = run(model, method, recipe, checkpoints=checkpoints, on_step=records.append)
    whole = run(model, method, recipe, on_step=whole_records.append)
    assert torch.equal(resumed.z_N, whole.z_N) and torch.equal(resumed.value_N, whole.value_N)
    assert records == whole_records[-len(records) :] and resumed.fixing == whole.fixing


@METHODS
def test_every_method_ends_with_the_largest_set_that_fits_and_values_for_it(model, method):
    _, limits = described(model, 0.3)
    learned = run(model, method)
    open_N = learned.z_N > 0
    assert torch.equal(open_N, largest_that_fits(learned.z_N, limits))
    assert (learned.value_N[~open_N] == 0).all() and (learned.value_N[open_N] >= 0).all()
    assert learned.fixing.kept_after == pytest.approx(limits.share_of(open_N))
    if method in CONFINED:
        assert learned.value_N.max() <= 1.0
    if method in ("deterministic", "hard-concrete-expanded"):
        assert torch.equal(learned.value_N, learned.z_N.relu())


def test_noise_follows_the_seed_and_the_step_and_comes_with_the_sampled_method_only(model):
    _, limits = described(model, 0.3)
    recipe = recipe_of("hard-concrete", "auto", STEPS, True)
    for method, relaxation in RELAXATIONS.items():
        optimiser = Optimiser(recipe, limits, STEPS, 0, torch.device("cpu"), relaxation)
        again, other = (Optimiser(recipe, limits, STEPS, seed, torch.device("cpu"), relaxation) for seed in (0, 4))
        first_N = optimiser.train_gates(optimiser.z_N)
        assert torch.equal(first_N, again.train_gates(again.z_N))
        optimiser.done = 1
        differs = [other.train_gates(other.z_N), optimiser.train_gates(optimiser.z_N), again.train_gates(again.z_N, 1)]
        assert all(torch.equal(first_N, gates_N) != (method == "hard-concrete") for gates_N in differs)


@pytest.mark.parametrize("method", [m for m in RELAXATIONS if RELAXATIONS[m].score is not None])
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_multipliers_bring_every_relaxation_to_the_budget(model, method, sparsity):
    """Against noisy gradients that would open all gates."""
    _, limits = described(model, sparsity)
    recipe = replace(recipe_of(method, "auto", 200, True), settle=0.0)
    optimiser = Optimiser(recipe, limits, 200, 0, torch.device("cpu"), RELAXATIONS[method])
    worth_N = (torch.rand(limits.share_N.shape, generator=generator()) + 0.1) * limits.share_N
    optimiser.start_from(worth_N, worth_N)
    scores = []
    for step in range(200):
        noise_N = torch.randn(worth_N.shape, generator=generator(step))
        scores.append(optimiser.advance((noise_N - 0.2) * worth_N, 1.0, 0.5, 0.1).score)
    assert abs(scores[-1] - (1 - sparsity)) < min(0.03, abs(scores[0] - (1 - sparsity)))


# --- GRASPrune -------------------------------------------------------------------------------------------------------


def test_a_projected_mask_meets_the_budget_at_every_step_and_its_gates_are_all_or_nothing(model):
    _, limits = described(model, 0.3)
    recipe = recipe_of("grasprune", "auto", STEPS, True)
    optimiser = Optimiser(recipe, limits, STEPS, 0, torch.device("cpu"), RELAXATIONS["grasprune"])
    while optimiser.done < optimiser.settles_at:
        gates_N = optimiser.train_gates(optimiser.z_N)
        assert torch.equal(gates_N.round(decimals=5), largest_that_fits(optimiser.z_N, limits).float())
        record = optimiser.advance(torch.randn(gates_N.shape, generator=generator(optimiser.done)), 1.0, 0.5, 0.1)
        assert record.kept == record.score == pytest.approx(limits.share_of(gates_N), abs=1e-5)
        assert record.lambda1 == record.lambda2 == record.lambda3 == [0.0]


def test_when_a_projected_mask_is_fixed_scales_start_at_1_and_ranks_stay_those_of_the_scores(model):
    _, limits = described(model, 0.3)
    recipe = recipe_of("grasprune", "auto", 40, True)
    optimiser = Optimiser(recipe, limits, 40, 0, torch.device("cpu"), RELAXATIONS["grasprune"])
    for step in range(20):
        optimiser.advance(torch.randn(optimiser.z_N.shape, generator=generator(step)), 1.0, 0.5, 0.1)
    scores_N, kept_N = optimiser.z_N.clone(), optimiser.open_N
    optimiser.fix_kept_set()
    assert torch.equal(optimiser.values(), kept_N.float())
    assert optimiser.adam.state_dict()["state"] == {}
    optimiser.advance(torch.ones_like(scores_N), 1.0, 0.5, 0.1)
    assert (optimiser.values()[kept_N] < 1.0).all() and (optimiser.values()[~kept_N] == 0.0).all()
    for part_N in (kept_N, ~kept_N):
        order_N = scores_N[part_N].argsort(descending=True, stable=True)
        assert torch.equal(optimiser.ranking()[part_N].argsort(descending=True), order_N)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_too_short_to_settle_still_ends_with_a_mask(model, steps):
    learned = run(model, "grasprune", "paper", steps=steps)
    assert learned.fixing is None and torch.equal(learned.value_N, (learned.z_N > 0).float())


# --- measuring on the way --------------------------------------------------------------------------------------------


@METHODS
@RECIPES
def test_measuring_changes_nothing_and_reports_trained_and_deployed_losses(model, method, recipe):
    plain, measured = [], []
    first = run(model, method, recipe, on_step=plain.append)
    second = run(model, method, recipe, on_step=measured.append, measure_every=3)
    assert torch.equal(first.z_N, second.z_N) and torch.equal(first.value_N, second.value_N)
    for one, other in zip(plain, measured, strict=True):
        losses = (other.held_out_trained, other.held_out_deployed)
        assert all(math.isfinite(loss) for loss in losses) if other.step % 3 == 0 else losses == (None, None)
        own, others = vars(one).copy(), vars(other).copy()
        for name in ("held_out_trained", "held_out_deployed"):
            assert own.pop(name) is None
            others.pop(name)
        assert json.dumps(own) == json.dumps(others)


def test_trained_and_deployed_losses_are_those_of_the_gates_of_that_moment(model):
    """Once the kept set is fixed, what is trained is what is deployed; before, noise and rounding tell them apart."""
    for method in RELAXATIONS:
        records, learned = [], None
        learned = run(model, method, on_step=records.append, measure_every=1)
        settled = [r.held_out_trained == r.held_out_deployed for r in records[learned.fixing.step :]]
        assert all(settled), method
        before = records[learned.fixing.step - 1]
        if method == "grasprune":
            assert before.held_out_trained == pytest.approx(before.held_out_deployed)
        else:
            assert before.held_out_trained != before.held_out_deployed
        if method in ("deterministic", "hard-concrete-deterministic"):
            assert before.held_out_trained == pytest.approx(learned.fixing.held_out_before)


def test_the_deterministic_maps_are_the_methods_own():
    relaxation = RELAXATIONS["deterministic"]
    for mu in (0.5, 0.1):
        assert torch.equal(relaxation.train(Z, mu, generator(), Z > 0), forward_gate(Z))
        assert torch.equal(relaxation.deployed(Z, mu), Z.relu())
        assert torch.equal(relaxation.score(Z, mu), retention_score(Z, mu))
    assert pytest.approx(2 / 3) == BETA
