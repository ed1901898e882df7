"""The learning loop: reproducible, resumable bit for bit, on budget, and without a trace in the model."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from runs import described, random_tokens, small_llama
from secateur import learn as learning
from secateur.budget import largest_that_fits
from secateur.checkpoints import Checkpoints
from secateur.learn import LearningDiverged, learn
from secateur.recipes import auto_recipe, paper_recipe

STEPS = 12
FIXED_AT = STEPS - int(auto_recipe(STEPS).settle * STEPS)


@pytest.fixture(scope="module")
def model():
    return small_llama()


def run(model, recipe=auto_recipe, steps=STEPS, sparsity=0.3, scope="model", seed=0, **options):
    description, limits = described(model, sparsity, scope)
    tokens_NT = random_tokens(2 * steps, 12)
    return learn(
        model, description.groups, tokens_NT, random_tokens(2, 12, seed=9), limits, recipe(steps), steps=steps,
        batch_size=2, seed=seed, **options,
    )  # fmt: skip


def steps_kept(checkpoints):
    return sorted(int(path.stem.removeprefix("step-")) for path in checkpoints.folder.iterdir())


def die_at(number, step):
    if step.step == number:
        raise SystemError


def interrupt_at(number):
    def on_step(step):
        if step.step == number:
            raise KeyboardInterrupt

    return on_step


# --- reproducible ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [auto_recipe, paper_recipe])
def test_the_same_seed_gives_bit_identical_gates(model, recipe):
    assert torch.equal(run(model, recipe).z_N, run(model, recipe).z_N)


def test_another_seed_gives_other_gates_where_the_start_is_random(model):
    assert not torch.equal(run(model, paper_recipe).z_N, run(model, paper_recipe, seed=1).z_N)


@pytest.mark.parametrize("recipe", [auto_recipe, paper_recipe])
@pytest.mark.parametrize("step", [1, 2, 5, FIXED_AT, FIXED_AT + 1, FIXED_AT + 2, STEPS])
def test_an_interrupted_run_goes_on_to_the_gates_of_an_uninterrupted_one(model, tmp_path, recipe, step):
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1000)
    with pytest.raises(KeyboardInterrupt):
        run(model, recipe, checkpoints=checkpoints, on_step=interrupt_at(step))
    seen = []
    resumed = run(model, recipe, checkpoints=checkpoints, on_step=lambda s: seen.append(s.step))
    assert seen == list(range(step, STEPS + 1))
    assert torch.equal(resumed.z_N, run(model, recipe).z_N)


def test_a_run_interrupted_twice_goes_on_to_the_same_gates(model, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1000)
    for step in (3, FIXED_AT + 2):
        with pytest.raises(KeyboardInterrupt):
            run(model, checkpoints=checkpoints, on_step=interrupt_at(step))
    assert torch.equal(run(model, checkpoints=checkpoints).z_N, run(model).z_N)


def test_a_run_interrupted_while_the_kept_set_is_fixed_goes_on_to_the_same_gates(model, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1000)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(learning, "mean_loss", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        run(model, checkpoints=checkpoints)
    resumed, whole = run(model, checkpoints=checkpoints), run(model)
    assert torch.equal(resumed.z_N, whole.z_N) and resumed.fixing == whole.fixing


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint_to_the_same_gates(model, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1000)

    with pytest.raises(SystemError):
        run(model, checkpoints=replace(checkpoints, every=4), on_step=lambda step: die_at(9, step))
    assert steps_kept(checkpoints) == [4, 8]
    assert torch.equal(run(model, checkpoints=checkpoints).z_N, run(model).z_N)


def test_a_checkpoint_has_no_half_written_file_beside_it(model, tmp_path):
    run(model, checkpoints=Checkpoints(tmp_path, every=3))
    assert {path.name for path in tmp_path.iterdir()} == {f"step-{step:08d}.safetensors" for step in (9, 12)}


def test_sensitivity_is_not_measured_again_after_it_was(model, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, every=1000)
    with pytest.raises(SystemError):
        run(model, checkpoints=checkpoints, on_step=lambda step: die_at(1, step))
    monkeypatch.setattr(learning, "gate_sensitivity", None)
    resumed = run(model, checkpoints=checkpoints)
    monkeypatch.undo()
    assert torch.equal(resumed.z_N, run(model).z_N)


@pytest.mark.parametrize("measured", [True, False])
def test_the_best_of_the_states_that_can_be_compared_is_kept(model, tmp_path, monkeypatch, measured):
    steps, states, save = [], [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda own, state: (states.append(state), save(own, state)))
    checkpoints = Checkpoints(tmp_path, every=1)
    run(model, checkpoints=checkpoints, measure_every=int(measured), on_step=steps.append)
    if measured:  # gates as they would be deployed fit the budget at every step
        losses = {step.step: step.held_out_deployed for step in steps}
    else:  # before, loss rises with what has been removed
        losses = {step.step: step.loss for step in steps if step.step > FIXED_AT}
    assert {state.step: state.loss for state in states if state.loss is not None} == losses
    assert steps_kept(checkpoints) == sorted({STEPS - 1, STEPS, min(losses, key=losses.get)})


@pytest.mark.parametrize("damaged", [[8], [4, 8]])
def test_a_run_goes_on_from_the_state_before_a_damaged_one_or_starts_over_to_the_same_gates(model, tmp_path, damaged):
    said, seen = [], []
    checkpoints = Checkpoints(tmp_path, every=4, warn=said.append)
    with pytest.raises(SystemError):
        run(model, checkpoints=checkpoints, on_step=lambda step: die_at(9, step))
    for step in damaged:
        (tmp_path / f"step-{step:08d}.safetensors").write_bytes(b"{}")
    resumed = run(model, checkpoints=checkpoints, on_step=lambda s: seen.append(s.step))
    assert seen[0] == (5 if damaged == [8] else 1) and len(said) == len(damaged)
    assert torch.equal(resumed.z_N, run(model).z_N)


# --- on budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [50, 200])
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_the_default_recipe_arrives_at_the_budget_by_itself_and_then_meets_it_exactly(model, steps, sparsity):
    _, limits = described(model, sparsity)
    scores = []
    learned = run(model, steps=steps, sparsity=sparsity, on_step=lambda step: scores.append(step.score))
    fixing = learned.fixing
    assert scores[fixing.step - 1] == pytest.approx(1 - sparsity, abs=0.03)
    assert fixing.kept_before == pytest.approx(1 - sparsity, abs=0.07)  # gates of 0 < z < 2μ count in part in the score
    assert torch.equal(learned.z_N > 0, largest_that_fits(learned.z_N, limits))
    room = int(limits.allowed_C) - int(limits.params_N[learned.z_N > 0].sum())
    assert 0 <= room < int(limits.params_N.min())


@pytest.mark.parametrize("scope", ["kind", "layer"])
def test_the_default_recipe_meets_every_constraint_of_a_scope(model, scope):
    _, limits = described(model, 0.4, scope)
    open_N = run(model, steps=50, sparsity=0.4, scope=scope).z_N > 0
    used_C = torch.zeros_like(limits.allowed_C).index_add(0, limits.constraint_N, limits.params_N * open_N)
    smallest_C = torch.stack([limits.params_N[limits.constraint_N == c].min() for c in range(len(used_C))])
    assert (used_C <= limits.allowed_C).all() and (limits.allowed_C - used_C < smallest_C).all()


def test_fixing_reports_what_it_changed(model):
    learned = run(model)
    fixing = learned.fixing
    assert fixing.step == FIXED_AT
    assert fixing.kept_after == pytest.approx(described(model, 0.3)[1].share_of(learned.z_N > 0))
    assert fixing.held_out_before > 0 and fixing.held_out_after > 0


def test_once_the_kept_set_is_fixed_gate_values_are_learned_that_lower_the_loss(model):
    losses = []
    description, limits = described(model, 0.3)
    one_batch_again_and_again_NT = random_tokens(2, 12).repeat(60, 1)
    learned = learn(
        model, description.groups, one_batch_again_and_again_NT, random_tokens(2, 12), limits, auto_recipe(60),
        steps=60, batch_size=2, on_step=lambda step: losses.append(step.loss),
    )  # fmt: skip
    assert losses[-1] < losses[learned.fixing.step] - 0.1
    assert learned.z_N.max() > 1.02


# --- the model -------------------------------------------------------------------------------------------------------


def test_weights_are_frozen_bit_identical_and_without_gradients_after_learning(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    run(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and not p.requires_grad
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_loss_that_is_not_finite_raises_with_the_step_and_the_last_good_gates(tmp_path):
    model = small_llama()
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1000)

    def break_weights(step):
        if step.step == 4:
            model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")

    with pytest.raises(LearningDiverged, match="at step 5; the gates of step 4 are saved") as error:
        run(model, checkpoints=replace(checkpoints, every=4), on_step=break_weights)
    assert error.value.step == 4
    assert torch.isfinite(error.value.z_N).all()
    assert torch.equal(error.value.z_N, load_file(checkpoints.folder / "step-00000004.safetensors")["z"])


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_model_that_is_broken_from_the_start_raises_before_any_step(value):
    model = small_llama()
    model.lm_head.weight.data[5, 5] = float(value)
    with pytest.raises(LearningDiverged, match="at step 1") as error:
        run(model, paper_recipe)
    assert error.value.step == 0 and torch.isfinite(error.value.z_N).all()
