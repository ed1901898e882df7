"""FLAP's biases: gated model, export, figures and a second pruning agree about what stands for removed units."""

import json
import shutil
from dataclasses import replace
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file

from runs import complaint, prune_arguments, secateur, write_checkpoint, write_texts
from secateur.attach import attached, compensating_bias, compensation, writer
from secateur.budget import figures, make_budget
from secateur.describe import describe
from secateur.export import export
from secateur.files import InputError
from secateur.importance import flap
from secateur.plan import Plan
from secateur.slicing import added_biases
from secateur.verify import folded
from tiny import dense_logits, load, random_plan, tiny, tokens

ONE_OF_EACH = ("layers.0.kv_groups", "layers.0.heads", "layers.1.channels")
A_WHOLE_LAYER = ("layers.1.kv_groups", "layers.1.heads", "layers.1.channels")
MODELS = {
    "no biases": ("llama", {}),
    "writers with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "multi-head": ("qwen2", {"num_key_value_heads": 6}),
    "multi-query": ("llama", {"num_key_value_heads": 1}),
    "plain MLP": ("starcoder2", {}),
}


def compensated(model, close=(), keep=(), seed=2):
    """The model, its description, and a plan with means; groups in `keep` stay whole."""
    model.requires_grad_(False)
    description = describe(model)
    limits = make_budget(description.groups, description.shapes, 0.3, "model")
    means = flap(model, description.groups, tokens(3, 12, seed=5), limits, lambda _: None).means
    plan = random_plan(description, close=close, seed=seed)
    for group in description.groups:
        if group.name in keep:
            plan.kept[group.name], plan.scales[group.name] = torch.arange(group.units), torch.ones(group.units)
    return description, replace(plan, means=means)


def compensated_logits(model, description, plan, ids):
    gates = plan.gates(description.groups)
    with attached(model, description.groups, gates, compensation(model, description.groups, gates, plan.means)):
        return dense_logits(model, ids)


@pytest.mark.parametrize("close", [(), ONE_OF_EACH, A_WHOLE_LAYER], ids=["half", "closed sublayers", "closed layer"])
@pytest.mark.parametrize("name", MODELS)
def test_exported_logits_equal_gated_ones_and_every_parameter_is_counted(tmp_path, name, close):
    model_type, changes = MODELS[name]
    model = tiny(model_type, **changes)
    description, plan = compensated(model, close)
    gated = compensated_logits(model, description, plan, tokens())
    without = compensated_logits(model, description, replace(plan, means=None), tokens())
    export(model, None, description, plan, tmp_path / "model")
    exported = load(tmp_path / "model", dtype=torch.float32)
    assert (gated - dense_logits(exported, tokens())).abs().max() < 1e-5 < 1e-3 < (gated - without).abs().max()
    added = added_biases(description, plan)
    counted = figures(description, plan.sizes(description.groups), 4, sum(map(prod, added.values()))).parameters
    assert counted == sum(p.numel() for p in exported.parameters())
    assert bool(added) == (name in ("no biases", "multi-head", "multi-query"))


def test_a_layer_that_loses_nothing_gets_no_bias_and_the_configuration_names_the_others(tmp_path):
    model = tiny("llama")
    description, plan = compensated(model, keep=("layers.0.kv_groups", "layers.2.channels"))
    export(model, None, description, plan, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["secateur"]["biases"] == {
        "0": ["mlp.down_proj"], "1": ["self_attn.o_proj", "mlp.down_proj"], "2": ["self_attn.o_proj"],
    }  # fmt: skip
    stored = {n for n in load_file(tmp_path / "model" / "model.safetensors") if n.endswith("bias")}
    assert stored == added_biases(description, plan).keys() and len(stored) == 4


def test_an_export_without_means_is_what_it_was(tmp_path):
    model = tiny("llama")
    description, plan = compensated(model)
    export(model, None, description, replace(plan, means=None), tmp_path / "model")
    assert "biases" not in json.loads((tmp_path / "model" / "config.json").read_text())["secateur"]
    assert not any(n.endswith("bias") for n in load_file(tmp_path / "model" / "model.safetensors"))


def test_the_bias_is_the_removed_columns_times_their_means_and_is_rounded_once(tmp_path):
    model = tiny("llama", mlp_bias=True)
    description, plan = compensated(model)
    export(model, None, description, plan, tmp_path / "model", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for group in description.groups:
        module, mean_I = writer(model, group), plan.means[group.name]
        removed = [k for k in range(group.units) if k not in plan.kept[group.name].tolist()]
        expected = torch.zeros(48) if module.bias is None else module.bias.clone()
        for j in range(module.in_features):
            if j // (module.in_features // group.units) in removed:
                expected += module.weight[:, j] * mean_I[j]
        torch.testing.assert_close(stored[f"{group.gate_at}.bias"].float(), expected, rtol=2**-8, atol=1e-6)
        exact = compensating_bias(module.weight, mean_I, plan.gates([group])[group.name])
        whole = exact if module.bias is None else module.bias.float() + exact
        assert torch.equal(stored[f"{group.gate_at}.bias"], whole.bfloat16())


@pytest.mark.parametrize("changes", [{}, {"mlp_bias": True, "attention_bias": True}])
def test_folded_biases_equal_attached_ones_and_leave_no_trace(changes):
    model = tiny("llama", **changes)
    description, plan = compensated(model)
    gates = plan.gates(description.groups)
    biases = compensation(model, description.groups, gates, plan.means)
    before = {g.name: writer(model, g).bias for g in description.groups}
    with folded(model, description.groups, gates, torch.float32, biases):
        by_folding = dense_logits(model, tokens())
    torch.testing.assert_close(by_folding, compensated_logits(model, description, plan, tokens()), rtol=1e-4, atol=1e-5)
    assert all(writer(model, g).bias is before[g.name] for g in description.groups)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("again", ["with means", "without"])
def test_a_compensated_model_can_be_pruned_again(tmp_path, again):
    model = tiny("llama", num_key_value_heads=6)
    description, plan = compensated(model, ONE_OF_EACH, keep=("layers.2.channels",))
    export(model, None, description, plan, tmp_path / "once")
    once = load(tmp_path / "once", dtype=torch.float32)
    description, plan = compensated(once, seed=7)
    assert {g.name for g in description.groups} == {
        "layers.0.channels", "layers.1.heads", "layers.2.heads", "layers.2.channels",
    }  # fmt: skip
    plan = plan if again == "with means" else replace(plan, means=None)
    gated = compensated_logits(once, description, plan, tokens())
    export(once, None, description, plan, tmp_path / "twice")
    twice = load(tmp_path / "twice", dtype=torch.float32)
    assert (gated - dense_logits(twice, tokens())).abs().max() < 1e-5


def test_a_uniform_shape_has_no_place_for_biases(tmp_path):
    model = tiny("llama")
    description, plan = compensated(model)
    even = random_plan(description, shape="uniform")
    with pytest.raises(InputError, match=r"no place for the biases.*--shape ragged"):
        export(model, None, description, Plan(even.kept, even.scales, "uniform", plan.means), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# --- from the command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flap")
    write_checkpoint(folder / "dense", request.param, num_key_value_heads=4)
    write_texts(folder / "text.jsonl")
    arguments = prune_arguments(folder / "dense", folder / "text.jsonl", folder / "run", method="flap", sparsity=0.6)
    assert secateur(*arguments) == 0
    return folder


def test_a_run_is_verified_and_its_biases_are_in_the_figures(finished):
    run = finished / "run"
    verified, results = (json.loads((run / f"{name}.json").read_text()) for name in ("verify", "eval"))
    assert verified["passed"] and verified["comparisons"][-1]["dtype"] == "float32"
    dense, pruned = results["dense"], results["pruned"]
    biases = [t for n, t in load_file(run / "model" / "model.safetensors").items() if n.endswith(".bias")]
    assert biases and all((t != 0).any() for t in biases)
    removed = dense["block_parameters"] - pruned["block_parameters"]
    assert dense["parameters"] - pruned["parameters"] == removed - sum(t.numel() for t in biases)


@pytest.mark.parametrize("command", ["plan", "export"])
def test_a_uniform_plan_is_refused_in_one_line(finished, tmp_path, capsys, command):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    said = complaint(capsys, command, run, "--shape", "uniform")
    assert "--method flap" in said and "--shape ragged" in said
    assert secateur("verify", run) == 0


def test_an_export_whose_bias_is_off_fails_verification(finished, tmp_path):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    path = run / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("down_proj.bias"))
    tensors[name][0] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    assert secateur("verify", run) == 1
