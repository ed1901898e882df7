"""Every `--method` from the command line to a verified export, over the same units and budget."""

import json
import shutil
from typing import get_args

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from runs import complaint, gates_of, prune_arguments, same_gates, secateur, write_checkpoint, write_texts
from secateur import importance
from secateur.progress import Screen
from secateur.recipes import EQUAL_WIDTHS, OF_EXPERTS, ONE_SHOT, Method
from secateur.relaxation import RELAXATIONS

METHODS = tuple(m for m in get_args(Method) if m not in OF_EXPERTS)
ADDED = ("value.", "mean.", "order.", "sensitivity.")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A model with grouped queries, and text."""
    folder = tmp_path_factory.mktemp("grouped")
    write_checkpoint(folder / "dense", num_key_value_heads=4)
    write_texts(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="module")
def runs(grouped):
    """One finished run a method."""
    for method in METHODS:
        assert secateur(*arguments(grouped, method, grouped / method)) == 0, method
    return grouped


def arguments(folder, method, out, **options):
    return prune_arguments(folder / "dense", folder / "text.jsonl", out, method=method, **options)


def about(run):
    with safe_open(run / "gates.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["secateur"])


def read(path):
    return json.loads(path.read_text())


def test_every_method_has_its_function_and_no_function_is_without_a_method():
    assert set(get_args(Method)) == {*RELAXATIONS, *importance.ONE_SHOT} and set(ONE_SHOT) == set(importance.ONE_SHOT)
    assert set(EQUAL_WIDTHS) < set(ONE_SHOT) and METHODS[0] == "deterministic"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_prunes_to_the_budget_and_its_export_computes_what_its_gates_do(runs, method):
    run = runs / method
    assert read(run / "verify.json")["passed"] is True
    results = read(run / "eval.json")
    share = results["pruned"]["block_parameters"] / results["dense"]["block_parameters"]
    assert 0.68 < share <= 0.7 and results["rounding"]["kept"] == pytest.approx(share)
    assert results["pruned"]["perplexity"] != results["dense"]["perplexity"]
    exported = AutoModelForCausalLM.from_pretrained(run / "model", trust_remote_code=True)
    assert sum(p.numel() for p in exported.parameters()) == results["pruned"]["parameters"]


@pytest.mark.parametrize("method", METHODS)
def test_the_method_is_written_wherever_the_run_speaks_of_itself(runs, method):
    run = runs / method
    assert yaml.safe_load((run / "config.yaml").read_text())["method"] == method
    assert about(run)["method"] == method and read(run / "eval.json")["method"] == method
    assert f"`{method}`" in (run / "model" / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_gates_close_what_goes_and_have_values_of_their_own_where_these_are_not_the_ranks(runs, method):
    tensors, plan = gates_of(runs / method), read(runs / method / "plan.json")
    groups = [name for name in tensors if not name.startswith(ADDED)]
    assert any(name.startswith("value.") for name in tensors) == (
        method not in ("deterministic", "hard-concrete-expanded")
    )
    assert any(name.startswith("mean.") for name in tensors) == (method == "flap")
    for name in groups:
        assert (tensors[name] > 0).nonzero().flatten().tolist() == plan["kept"][name]
        values = tensors.get(f"value.{name}", tensors[name])[plan["kept"][name]]
        torch.testing.assert_close(values, torch.tensor(plan["scales"][name]), rtol=1e-6, atol=0)
        if method in ONE_SHOT:
            assert (values == 1.0).all()
        elif method.startswith("hard-concrete") and method != "hard-concrete-expanded":
            assert values.max() <= 1.0


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_that_learn_have_a_line_a_step(runs, method):
    assert (runs / method / "metrics.jsonl").exists() == (method not in ONE_SHOT)
    assert about(runs / method)["tokens"] == (0 if method == "magnitude" else 8 * 2 * 16)


@pytest.mark.parametrize("method", METHODS)
def test_learning_or_scoring_again_gives_the_same_gates(runs, method, tmp_path):
    run = shutil.copytree(runs / method, tmp_path / "run")
    (run / "gates.safetensors").unlink()
    assert secateur("learn", run) == 0 and same_gates(run, runs / method)


@pytest.mark.parametrize("method", [m for m in EQUAL_WIDTHS if m not in OF_EXPERTS])
def test_methods_whose_papers_do_so_prune_all_layers_alike_unless_told_otherwise(runs, grouped, method, tmp_path):
    def widths(run):
        kept = read(run / "plan.json")["widths"]
        return {len({kept[name] for name in kept if name.endswith(kind)}) for kind in ("channels", "kv_groups")}

    assert widths(runs / method) == {1}
    assert secateur(*arguments(grouped, method, tmp_path / "run", per="model")) == 0
    assert widths(tmp_path / "run") != {1}


@pytest.mark.parametrize("method", [m for m in METHODS if m != "flap"])
def test_gates_of_any_method_can_be_planned_for_equal_widths(runs, method, tmp_path):
    run = shutil.copytree(runs / method, tmp_path / "run")
    assert secateur("export", run, "--shape", "uniform") == 0
    assert secateur("verify", run) == 0 and secateur("eval", run) == 0


@pytest.mark.parametrize("method", ["taylor-vector", "flap"])
def test_interrupted_scoring_starts_over_and_ends_the_same(runs, grouped, method, tmp_path, monkeypatch, capsys):
    def stop(_screen, rows, _of):
        if rows == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Screen, "measured", stop)
        said = complaint(capsys, *arguments(grouped, method, tmp_path / "run"), code=130)
    assert f"secateur prune --resume {tmp_path / 'run'}" in said
    assert secateur("prune", "--resume", tmp_path / "run") == 0 and same_gates(tmp_path / "run", runs / method)


@pytest.mark.parametrize("method", RELAXATIONS)
def test_interrupted_learning_goes_on_to_the_same_gates_and_metrics(runs, grouped, method, tmp_path, monkeypatch):
    def stop(_screen, step):
        if step.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Screen, "step", stop)
        assert secateur(*arguments(grouped, method, tmp_path / "run")) == 130
    assert secateur("prune", "--resume", tmp_path / "run") == 0
    assert same_gates(tmp_path / "run", runs / method)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (runs / method / "metrics.jsonl").read_bytes()


def test_held_out_losses_on_the_way_are_lines_of_the_metrics_and_change_no_gate(runs, grouped, tmp_path):
    run = tmp_path / "run"
    assert secateur(*arguments(grouped, "hard-concrete", run, measure_every=4)) == 0
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = {step["step"] for step in steps if {"held_out_trained", "held_out_deployed"} <= step.keys()}
    assert measured == {4, 8} and same_gates(run, runs / "hard-concrete")


@pytest.mark.parametrize("options", [{"kd_weight": 0}, {"recipe": "paper"}])
@pytest.mark.parametrize("method", ["grasprune", "hard-concrete"])
def test_learned_baselines_take_other_losses_and_the_papers_recipe(grouped, method, options, tmp_path):
    assert secateur(*arguments(grouped, method, tmp_path / "run", **options)) == 0
    assert read(tmp_path / "run" / "verify.json")["passed"] is True


def test_without_binarisation_gates_come_out_otherwise(runs, grouped, tmp_path):
    assert secateur(*arguments(grouped, "deterministic", tmp_path / "run", steps=16), "--no-binarise") == 0
    assert secateur(*arguments(grouped, "deterministic", tmp_path / "other", steps=16)) == 0
    assert not same_gates(tmp_path / "run", tmp_path / "other")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(step["lambda3"] == [0.0] for step in steps)


def test_scores_by_sensitivity_save_memory_as_learning_does(grouped, tmp_path, monkeypatch):
    """Layers are computed once more in the backward pass, of as few rows at once as was asked for."""
    forward, measure, calls, counted = LlamaMLP.forward, importance.gate_sensitivity, [], []

    def measuring(*positional, **named):
        calls.clear()
        found = measure(*positional, **named)
        counted.append((sum(calls), max(calls)))
        return found

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    monkeypatch.setattr(importance, "gate_sensitivity", measuring)
    for name, more in (("plain", ()), ("saving", ("--gradient-checkpointing", "--micro-batch-size", "1"))):
        assert secateur(*arguments(grouped, "sensitivity", tmp_path / name), *more) == 0
    (plain, two), (saving, one) = counted
    assert (two, one) == (2, 1) and saving == plain + 8 * 2 * 3, "every row once more in each layer"
    first, second = gates_of(tmp_path / "plain"), gates_of(tmp_path / "saving")
    assert all(torch.equal(first[name] > 0, second[name] > 0) for name in first)


def test_taylor_scores_take_gradient_checkpointing_at_its_word(grouped, tmp_path, monkeypatch):
    forward, calls = LlamaMLP.forward, []
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or forward(self, x))
    counted = []
    for name, more in (("plain", ()), ("saving", ("--gradient-checkpointing",))):
        calls.clear()
        assert secateur(*arguments(grouped, "taylor-element", tmp_path / name), *more) == 0
        counted.append(sum(calls))
    assert counted[1] == 2 * counted[0] > 0, "every row once more in each layer"
    first, second = gates_of(tmp_path / "plain"), gates_of(tmp_path / "saving")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_with_broken_weights_cannot_be_scored(capsys, grouped, tmp_path):
    broken = shutil.copytree(grouped, tmp_path / "broken")
    path = broken / "dense" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    said = complaint(capsys, *arguments(broken, "wanda-sp", tmp_path / "run"))
    assert "scores of --method wanda-sp are NaN or infinite" in said
    assert not (tmp_path / "run" / "gates.safetensors").exists()
