"""Refit: the closed form is least squares, makes up for what can be made up for, and never raises the held-out loss."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from runs import complaint, described, prune_arguments, random_tokens, secateur, small_llama
from secateur import refit as refitting
from secateur.describe import describe
from secateur.export import export
from secateur.plan import Plan
from secateur.refit import normal_equations, refit
from secateur.updates import updates_of
from tiny import MIXTURE, random_plan, tiny

ROWS, HELD_OUT = random_tokens(24, 16), random_tokens(4, 16, seed=5)


@pytest.fixture(scope="module")
def teacher():
    return small_llama()


def exported(teacher, plan, folder, rows=ROWS):
    description, _limits = described(teacher, 0.3)
    export(teacher, None, description, plan, folder / "model")
    student = AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=True).eval()
    return student, normal_equations(teacher, description.groups, plan, rows)


@pytest.fixture
def plan(teacher):
    return random_plan(described(teacher, 0.3)[0], close=("layers.1.channels",))


@pytest.fixture
def pruned(teacher, plan, tmp_path):
    return exported(teacher, plan, tmp_path)


def seen(model, name, rows):
    """Inputs and outputs of a linear map, one line a token."""
    found = []

    def hook(_module, args, output):
        found.append((args[0].flatten(0, -2), output.flatten(0, -2)))

    handle = model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        for row in rows.split(1):
            model(row)
    handle.remove()
    return (torch.cat(parts) for parts in zip(*found, strict=True))


@pytest.mark.parametrize("ridge", [0.1, 3.0])
def test_the_closed_form_is_ridge_regression_on_what_the_output_lacks(teacher, plan, pruned, monkeypatch, ridge):
    student, equations = pruned
    losses = iter([2.0, 1.0])
    monkeypatch.setattr(refitting, "RIDGES", (ridge,))
    monkeypatch.setattr(refitting, "mean_loss", lambda *_: next(losses))
    expected = {}
    for g in described(teacher, 0.3)[0].groups:
        if not len(plan.kept[g.name]):
            continue
        x, dense = seen(teacher, g.gate_at, ROWS)
        x = x.unflatten(1, (g.units, -1))[:, plan.kept[g.name]].flatten(1)
        weight = student.get_submodule(g.gate_at).weight.detach().clone()
        size = (ridge * x.square().sum(0)).sqrt()
        a = torch.cat([x, size.diag()]).double()
        b = torch.cat([dense - x @ weight.T, dense.new_zeros(len(size), dense.shape[1])]).double()
        expected[f"{g.gate_at}.weight"] = weight + torch.linalg.lstsq(a, b).solution.T.float()
    weights, done = refit(student, equations, HELD_OUT)
    assert weights.keys() == expected.keys() and (done.ridge, done.tokens) == (ridge, ROWS.numel())
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)
        assert torch.equal(student.get_parameter(name), weight)


def test_a_bias_of_the_pruned_writer_is_part_of_what_it_gives(teacher, plan, pruned):
    """As after FLAP's compensation: were the bias forgotten, the solution would give it once more."""
    student, equations = pruned
    sums = equations[0]
    linear = student.get_submodule(sums.place.module)
    exact = torch.linalg.lstsq(sums.xx_II.double(), sums.yx_OI.T.double()).solution.T.float()
    linear.bias = torch.nn.Parameter(torch.full((linear.out_features,), 0.5))
    moved = torch.linalg.solve(sums.xx_II.double(), (0.5 * sums.x_I).double()).float()
    torch.testing.assert_close(
        linear.weight + sums.update(linear.weight, linear.bias, 1e-9), exact - moved, rtol=1e-2, atol=1e-2
    )


def test_a_removed_channel_that_a_kept_one_repeats_is_made_up_for(tmp_path, monkeypatch):
    teacher = small_llama(seed=3)
    for layer in teacher.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data[1] = linear.weight[0]
    description, _limits = described(teacher, 0.3)
    kept = {g.name: torch.arange(g.units) for g in description.groups}
    kept |= {name: torch.tensor([0, *range(2, 64)]) for name in kept if name.endswith("channels")}
    plan = Plan(kept, {name: torch.ones(len(index)) for name, index in kept.items()})
    student, equations = exported(teacher, plan, tmp_path, random_tokens(60, 16, seed=8))
    monkeypatch.setattr(refitting, "RIDGES", (1e-6,))
    dense = teacher(HELD_OUT).logits
    monkeypatch.setattr(refitting, "mean_loss", lambda model, ids: (model(ids).logits - dense).abs().max())
    _weights, done = refit(student, equations, HELD_OUT)
    assert done.held_out_before > 0.5 and done.held_out_after < 0.02


def test_equations_are_summed_and_solved_in_float32_whatever_the_passes_compute_in(teacher, plan, pruned):
    student, equations = pruned
    place = equations[0].place
    with torch.autocast("cpu", torch.bfloat16):
        narrow = equations[0].update(place.read(student), place.bias(student), 0.1)
    assert torch.equal(narrow, equations[0].update(place.read(student), place.bias(student), 0.1))


def test_what_experts_give_is_summed_in_float32_whatever_the_passes_compute_in():
    model = tiny("mixtral", **MIXTURE)
    description = describe(model)
    group, plan = next(g for g in description.groups if g.experts), random_plan(description)
    x_TC, routing_T1 = torch.randn(7, group.width), torch.rand(7, 1)
    sums = []
    for narrow in (False, True):
        found = refitting._of_experts(model, group, plan)
        expert = min(found)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            refitting._seeing(model.get_submodule(group.gate_at), found)(expert, x_TC, routing_T1)
        sums.append(found[expert].yx_OI)
    assert torch.equal(*sums) and sums[0].any()


def test_weights_stay_where_no_ridge_lowers_the_held_out_loss(teacher, pruned, monkeypatch):
    student, equations = pruned
    before = {name: p.clone() for name, p in student.named_parameters()}
    losses = iter([1.0, 1.0])
    monkeypatch.setattr(refitting, "mean_loss", lambda *_: next(losses))
    weights, done = refit(student, equations, HELD_OUT)
    assert weights == {} and done.ridge is None and done.held_out_after == done.held_out_before == 1.0
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())


def test_the_ridge_with_the_lowest_held_out_loss_is_taken(teacher, pruned, monkeypatch):
    student, equations = pruned
    losses = iter([5.0, 4.0, 3.0, 3.5])
    monkeypatch.setattr(refitting, "mean_loss", lambda *_: next(losses))
    _weights, done = refit(student, equations, HELD_OUT)
    assert (done.ridge, done.held_out_before, done.held_out_after) == (refitting.RIDGES[1], 5.0, 3.0)
    assert next(losses, None) is None


def test_the_teacher_is_left_as_it_was(teacher, pruned):
    student, equations = pruned
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    refit(student, equations, HELD_OUT)
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in (teacher, student) for m in model.modules())


# --- as a stage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def welcome(monkeypatch):
    """Every refit lowers the held-out loss: on a random model whether it does is chance."""
    falling = iter(range(1000, 0, -1))
    monkeypatch.setattr(refitting, "mean_loss", lambda *_: float(next(falling)))


def test_prune_refits_after_verification_and_says_so(dense, text, tmp_path, capsys, welcome):
    out = tmp_path / "run"
    assert secateur(*prune_arguments(dense, text, out, refit_rounds=2), "--refit") == 0
    assert updates_of(out / "model") == ["refit"] and json.loads((out / "verify.json").read_text())["passed"]
    rounds = json.loads((out / "refit.json").read_text())
    assert len(rounds) == 2 and all(r["tokens"] == 32 and r["ridge"] == 0.1 for r in rounds)
    assert json.loads((out / "eval.json").read_text())["refit"] == rounds
    assert "solved anew" in (out / "model" / "README.md").read_text()
    assert "(refit)" in complaint(capsys, "verify", out)


def test_refit_reruns_alone_and_changes_output_projections_only(run, capsys, welcome):
    before = load_file(run / "model" / "model.safetensors")
    capsys.readouterr()
    assert secateur("refit", run, "--refit-tokens", "64") == 0
    assert "ridge 0.1" in capsys.readouterr().out
    after = load_file(run / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    writers = {name for name in before if name.endswith(("o_proj.weight", "down_proj.weight"))}
    assert changed == writers and not (run / "eval.json").exists()
    assert json.loads((run / "refit.json").read_text())[0]["tokens"] == 64


@pytest.mark.parametrize(("second", "kept"), [(4.0, True), (5.0, False), (7.0, False)])
def test_a_further_round_learns_gate_values_and_stays_only_if_they_help(run, monkeypatch, capsys, second, kept):
    """With no ridge that helps, all that a second round can change is a factor for each input of the writers."""
    losses = iter([5.0, 6.0, second, 9.0])
    monkeypatch.setattr(refitting, "mean_loss", lambda *_: next(losses))
    before = load_file(run / "model" / "model.safetensors")
    assert secateur("refit", run, "--refit-rounds", "3" if not kept else "2") == 0
    after = load_file(run / "model" / "model.safetensors")
    moved = 0
    for name in before:
        if name.endswith("down_proj.weight"):
            factor = after[name] / before[name]
            torch.testing.assert_close(factor, factor[:1].expand_as(factor), rtol=1e-4, atol=1e-4)
            moved += int((factor[0] - 1).abs().max() > 1e-4)
        elif not name.endswith("o_proj.weight"):
            assert torch.equal(after[name], before[name])
    assert bool(moved) == kept and next(losses, None) is None
    if not kept:
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert f"round 2 is left out, which would have changed the held-out loss from 5.0000 to {second}" in (
            " ".join(capsys.readouterr().out.split())
        )
    assert len(json.loads((run / "refit.json").read_text())) == 1 + kept


def test_a_round_that_is_left_out_leaves_what_was_solved_before(run, tmp_path, monkeypatch):
    exports = []
    for rounds in ("1", "2"):
        losses = iter([5.0, 4.0, 4.5, 9.0, 9.5])  # one ridge, none weaker; then values that are worse
        monkeypatch.setattr(refitting, "mean_loss", lambda *_, losses=losses: next(losses))
        copy = shutil.copytree(run, tmp_path / rounds)
        assert secateur("refit", copy, "--refit-rounds", rounds) == 0
        exports.append(load_file(copy / "model" / "model.safetensors"))
    before = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(exports[0][name], exports[1][name]) for name in before)
    assert any(not torch.equal(exports[0][name], before[name]) for name in before)


def test_a_refit_that_helped_nothing_is_done_and_changes_nothing(run, monkeypatch):
    rising = iter(range(1, 1000))
    monkeypatch.setattr(refitting, "mean_loss", lambda *_: float(next(rising)))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("refit: false", "refit: true"))
    before = {path.name: path.read_bytes() for path in (run / "model").iterdir() if path.is_file()}
    assert secateur("refit", run) == 0
    assert before == {path.name: path.read_bytes() for path in (run / "model").iterdir() if path.is_file()}
    assert secateur("verify", run) == 0 and secateur("eval", run) == 0
    evaluation = json.loads((run / "eval.json").read_text())
    assert evaluation["updates"] == [] and evaluation["refit"][0]["ridge"] is None
    card = (run / "model" / "README.md").read_text()
    assert "solved anew" not in card and "nothing was fine-tuned" in card
    counted = next(rising)
    assert secateur("prune", "--resume", run) == 0 and next(rising) == counted + 1  # it is not tried again
    assert secateur("push", run, "--repo", "owner/name", "--dry-run") == 0
    (run / "refit.json").unlink()
    assert secateur("push", run, "--repo", "owner/name", "--dry-run") == 2


def test_refit_then_recover_are_listed_in_order(dense, text, tmp_path):
    out = tmp_path / "run"
    assert secateur(*prune_arguments(dense, text, out, recover="lora", recover_steps=2), "--refit") == 0
    assert updates_of(out / "model") == ["refit", "recover-lora"]


@pytest.mark.parametrize(
    ("options", "named"), [({"refit_rounds": 0}, "--refit-rounds"), ({"refit_tokens": 3}, "--refit-tokens")]
)
def test_settings_out_of_range_are_named(dense, text, tmp_path, capsys, options, named):
    assert named in complaint(capsys, *prune_arguments(dense, text, tmp_path / "run", **options))
