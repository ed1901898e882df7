"""Runs in shapes that kernels, quantisation and tensor parallelism want: gates are learned for the very set that is
planned, and the command line says what a shape costs.
"""

import json
from dataclasses import replace
from io import StringIO
from math import exp

import pytest
import torch
from rich.console import Console

from runs import gates_of as gates_file
from runs import prune_arguments, secateur, small_llama, small_tokenizer
from secateur.api import open_session
from secateur.budget import largest_that_fits
from secateur.checkpoints import Checkpoints
from secateur.describe import describe
from secateur.files import InputError
from secateur.gates import Gates, by_group
from secateur.importance import ONE_SHOT
from secateur.learn import learn
from secateur.optimise import Optimiser
from secateur.plan import make_plan
from secateur.planning import compare_shapes, shapes_table
from secateur.policy import permitted
from secateur.recipes import auto_recipe
from secateur.relaxation import RELAXATIONS
from test_mixtures import small_mixture
from test_shapes import MODELS, budget
from tiny import load

# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["deterministic", "grasprune", "hard-concrete"])
@pytest.mark.parametrize("shape", ["aligned:16", "tp:2"])
def test_values_are_learned_for_the_set_that_is_planned(shape, method):
    model = small_llama(num_key_value_heads=4)
    description = describe(model)
    limits = budget(description, shape, 0.3)
    ids = torch.randint(3, 64, (18, 16), generator=torch.Generator().manual_seed(1))
    learned = learn(
        model, description.groups, ids[:16], ids[16:], limits, auto_recipe(8), steps=8, batch_size=2, method=method
    )
    assert learned.fixing is not None and learned.fixing.kept_after <= 0.7
    assert torch.equal(learned.z_N > 0, largest_that_fits(learned.z_N, limits))
    plan, rounding = make_plan(
        Gates(learned.z_N, description.groups, {}, learned.value_N), limits, shape, lambda _: 1.0
    )
    assert rounding.closed == rounding.reopened == 0
    for g in description.groups:
        assert len(plan.kept[g.name]) in (0, *permitted(g, limits.policy))


def test_learning_does_not_go_on_from_a_checkpoint_for_another_shape(tmp_path):
    model = small_llama(num_key_value_heads=4)
    description = describe(model)
    ids = torch.randint(3, 64, (10, 16), generator=torch.Generator().manual_seed(1))

    def learned(shape, on_step=lambda _: None):
        limits = budget(description, shape, 0.3)
        return learn(
            model, description.groups, ids[:8], ids[8:], limits, auto_recipe(4), steps=4, batch_size=2,
            checkpoints=Checkpoints(tmp_path / "checkpoints"), on_step=on_step,
        )  # fmt: skip

    def interrupt(step):
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned("aligned:16", interrupt)
    with pytest.raises(InputError, match="belongs to other settings"):
        learned("aligned:8")
    assert torch.equal(learned("aligned:16").z_N, learned("aligned:16").z_N)


def test_a_hard_mask_has_permitted_widths_at_every_step():
    description = describe(MODELS["gqa"]())
    limits = budget(description, "aligned:16")
    recipe = replace(auto_recipe(10), dual_lr=(0.0, 0.0, 0.0), dual_start=(0.0, 0.0, 0.0))
    optimiser = Optimiser(recipe, limits, 10, 0, torch.device("cpu"), RELAXATIONS["grasprune"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimiser.advance(torch.randn(len(limits.params_N), generator=generator), 1.0, 1.0, 0.0)
        open_units = by_group(optimiser.open_N, description.groups)
        for g in description.groups:
            assert int(open_units[g.name].sum()) in (0, *permitted(g, limits.policy))


def test_scores_are_kept_in_rows_and_the_gates_file_repeats_them(dense, text, tmp_path):
    run = tmp_path / "run"
    assert "sensitivity" in ONE_SHOT
    assert secateur(*prune_arguments(dense, text, run, method="sensitivity", shape="aligned:16")) == 0
    plan = json.loads((run / "plan.json").read_text())
    assert all(w % 16 == 0 for name, w in plan["widths"].items() if name.endswith("channels"))
    gates = gates_file(run)
    assert {n: int((z > 0).sum()) for n, z in gates.items() if n in plan["widths"]} == plan["widths"]


# --- the command line ------------------------------------------------------------------------------------------------


def test_prune_learns_exports_and_verifies_an_aligned_model(capsys, dense, text, tmp_path):
    run = tmp_path / "run"
    assert secateur(*prune_arguments(dense, text, run, shape="aligned:16")) == 0
    plan = json.loads((run / "plan.json").read_text())
    assert plan["shape"] == "aligned:16" and (plan["rounding"]["closed"], plan["rounding"]["reopened"]) == (0, 0)
    assert all(w % 16 == 0 for name, w in plan["widths"].items() if name.endswith("channels"))
    assert 0.6 < plan["rounding"]["kept"] <= 0.7 + 1e-6
    assert json.loads((run / "verify.json").read_text())["passed"]
    assert "multiples of 16" in (run / "model" / "README.md").read_text()
    capsys.readouterr()
    assert secateur("plan", run) == 0
    assert "aligned:16 beside ragged" in capsys.readouterr().out
    assert json.loads((run / "plan.json").read_text()) == plan


def test_plan_and_export_take_another_shape_and_say_what_it_costs(capsys, run):
    capsys.readouterr()
    assert secateur("plan", run, "--shape", "aligned:8,tp:2") == 0
    said = " ".join(capsys.readouterr().out.split())
    planned_loss = json.loads((run / "plan.json").read_text())["rounding"]["held_out_planned"]
    session = open_session(run)
    costs, _ = compare_shapes(session, "tp:2,aligned:8")
    by_shape = {c.shape: c for c in costs}
    rise = by_shape["tp:2,aligned:8"].held_out - by_shape["ragged"].held_out
    assert by_shape["tp:2,aligned:8"].held_out == pytest.approx(planned_loss, abs=1e-6)
    assert f"held-out loss {rise:+.4f} (perplexity × {torch.tensor(rise).exp().item():.4f})" in said
    for shape in ("ragged", "tp:2,aligned:8"):
        assert f"{by_shape[shape].kept:.2%}" in said
    assert secateur("export", run, "--shape", "aligned:8,tp:2", "--low-memory") == 0  # which does not plan anew
    assert secateur("verify", run) == 0
    widths_of = json.loads((run / "plan.json").read_text())["widths"]
    assert all(w % (16 if name.endswith("channels") else 2) == 0 for name, w in widths_of.items())
    assert secateur("export", run, "--shape", "uniform,aligned:16") == 0 and secateur("verify", run) == 0
    config = json.loads((run / "model" / "config.json").read_text())
    assert "auto_map" not in config and config["intermediate_size"] % 16 == 0


def test_ragged_is_compared_with_nothing(capsys, run):
    capsys.readouterr()
    assert secateur("plan", run) == 0
    assert "beside" not in capsys.readouterr().out


def test_compare_lists_the_usual_shapes_and_the_one_asked_for(capsys, run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "timings.json"}
    capsys.readouterr()
    assert secateur("plan", run, "--compare", "--shape", "aligned:16") == 0
    said = " ".join(capsys.readouterr().out.split())
    for shape in ("dense", "ragged", "uniform", "aligned:32", "aligned:64", "tp:2", "aligned:16"):
        assert shape in said
    assert "not possible: aligned:128: --shape aligned:128: layers.0.channels has 64 channels, fewer than 128" in said
    assert {path: path.read_bytes() for path in before} == before
    assert "experts gone" not in said and "active" not in said, "what only mixtures have"
    costs, _ = compare_shapes(open_session(run), "aligned:16")
    assert [c.shape for c in costs] == ["dense", "ragged", "uniform", "aligned:32", "aligned:64", "tp:2", "aligned:16"]
    wide = Console(width=200, file=StringIO())
    wide.print(shapes_table(costs))
    said = wide.file.getvalue()
    for c in costs[1:]:
        rise = c.held_out - costs[0].held_out
        assert f"{c.held_out:.3f} ({rise:+.3f})" in said and f"{exp(c.held_out):.4g} (× {exp(rise):.3f})" in said
        assert f"{c.kept:.2%}" in said and c.kept <= 0.7 + 1e-6
        assert f"(−{1 - c.sizes.flops_per_token / costs[0].sizes.flops_per_token:.1%})" in said


def test_the_card_of_an_aligned_run_whose_widths_turn_out_equal_asks_for_no_code(run):
    assert secateur("plan", run, "--shape", "uniform,aligned:16") == 0
    path = run / "plan.json"
    path.write_text(path.read_text().replace('"uniform,aligned:16"', '"aligned:16"'))
    assert secateur("export", run) == 0
    for command in ("verify", "eval"):
        card = (run / "model" / "README.md").read_text()
        assert "no code is needed" in card and "trust_remote_code" not in card
        assert secateur(command, run) == 0
    assert "no code is needed" in (run / "model" / "README.md").read_text()
    load(run / "model", trust_remote_code=False)


def test_a_mixture_goes_the_whole_way_in_multiples(tmp_path, text):
    small_mixture(moe_intermediate_size=48).save_pretrained(tmp_path / "dense")
    small_tokenizer().save_pretrained(tmp_path / "dense")
    run = tmp_path / "run"
    assert secateur(*prune_arguments(tmp_path / "dense", text, run, shape="aligned:16", sparsity=0.4)) == 0
    assert json.loads((run / "verify.json").read_text())["passed"]
    model = load(run / "model")
    assert all(layer.mlp.experts.down_proj.shape[2] % 16 == 0 for layer in model.model.layers)
