"""Runs with `--budget` through the command line: learned, exported, shown against their bounds, interrupted."""

import json
from math import floor

import pytest
import torch

from runs import complaint, prune_arguments, random_tokens, same_gates, secateur, small_llama, write_checkpoint
from secateur.api import open_session
from secateur.budget import make_budget
from secateur.checkpoints import Checkpoints
from secateur.config import Config
from secateur.config_file import load_config, save_config
from secateur.costs import bounds_of
from secateur.describe import describe
from secateur.files import InputError
from secateur.importance import ONE_SHOT
from secateur.learn import learn
from secateur.options import Prune, parse
from secateur.recipes import auto_recipe
from secateur.stages import plan_stage
from secateur.wanted import read_budgets
from test_budgets import counted
from test_mixtures import mixture  # noqa: F401


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A model whose heads share keys in groups."""
    return write_checkpoint(tmp_path_factory.mktemp("grouped") / "dense", num_key_value_heads=4)


def arguments(model, data, out, *budgets, **options):
    """Of `prune`, with budgets in the place of a sparsity."""
    name, *rest = prune_arguments(model, data, out, **options)
    at = rest.index("--sparsity")
    words = [word for budget in budgets for word in ("--budget", budget)]
    return [name, *rest[:at], *rest[at + 2 :], *words]


def results_of(run):
    return json.loads((run / "eval.json").read_text())


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["deterministic", "grasprune", "hard-concrete", "sensitivity"])
def test_two_budgets_are_learned_exported_verified_and_shown_against_their_bounds(
    grouped, text, tmp_path, capsys, method
):
    run = tmp_path / "run"
    assert secateur(*arguments(grouped, text, run, "params=0.7", "kv=0.5", method=method, steps=20)) == 0
    said = " ".join(capsys.readouterr().out.split())
    found, results = counted(run / "model"), results_of(run)
    dense = results["dense"]
    assert found["kv"] == results["pruned"]["kv_bytes_per_token"] <= 0.5 * dense["kv_bytes_per_token"]
    assert found["params"] == results["pruned"]["parameters"] <= 0.7 * dense["parameters"]
    unit = 3 * 32  # a channel
    assert 0.7 * dense["parameters"] - found["params"] < unit
    first, second = results["rounding"]["budgets"]
    bound = floor(round(0.7 * dense["parameters"], 6))
    counts = {"budget": "params=0.7", "counts": "parameters a token meets", "bound": bound}
    assert first == counts | {"dense": dense["parameters"], "pruned": found["params"]}
    assert (second["budget"], second["pruned"]) == ("kv=0.5", found["kv"])
    assert "params=0.7, kv=0.5" in said and "budget kv=0.5: at most 192 B" in said
    card = (run / "model" / "README.md").read_text()
    assert "pruned to params=0.7, kv=0.5" in card and "| budget kv=0.5: at most 192 B KV cache a token |" in card
    assert json.loads((run / "verify.json").read_text())["passed"]
    if method in ONE_SHOT:
        return
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(set(line["budgets"]) == {"params", "kv"} and "target" not in line for line in lines)
    assert all(len(line["lambda1"]) == 2 for line in lines)
    if method == "deterministic":
        assert all(held <= 1 + 1e-6 for held in lines[-1]["budgets"].values())


def test_a_sparsity_and_a_budget_hold_together_and_a_plan_for_another_shape_keeps_them(grouped, text, tmp_path, capsys):
    run = tmp_path / "run"
    assert secateur(*prune_arguments(grouped, text, run), "--budget", "flops=0.6") == 0
    dense = results_of(run)["dense"]
    for shape in ("ragged", "aligned:16", "tp:2", "uniform"):
        capsys.readouterr()
        assert secateur("plan", run, "--shape", shape) == 0 and secateur("export", run) == 0
        said = " ".join(capsys.readouterr().out.split())
        found = counted(run / "model")
        assert 0.5 * dense["flops_per_token"] < found["flops"] <= 0.6 * dense["flops_per_token"]
        assert f"budget flops=0.6: {found['flops']:,} of at most" in said and "budget units=0.7:" in said


def test_a_share_of_units_is_a_sparsity_to_the_bit(grouped, text, tmp_path):
    assert secateur(*prune_arguments(grouped, text, tmp_path / "a")) == 0
    assert secateur(*arguments(grouped, text, tmp_path / "b", "units=0.7")) == 0
    assert same_gates(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "plan.json").read_bytes() == (tmp_path / "b" / "plan.json").read_bytes()


@pytest.mark.parametrize("method", ["deterministic", "reap", "camera"])
def test_a_mixture_is_held_by_what_is_active_and_by_what_is_stored(mixture, tmp_path, method):  # noqa: F811
    run, text = tmp_path / "run", mixture / "text.jsonl"
    told = arguments(mixture / "dense", text, run, "params=0.9", "total-params=0.8", method=method, steps=12)
    assert secateur(*told) == 0
    dense, found = results_of(run)["dense"], counted(run / "model")
    assert found["params"] <= 0.9 * dense["active_parameters"]
    assert found["total-params"] <= 0.8 * dense["parameters"]
    assert json.loads((run / "verify.json").read_text())["passed"]


# --- interruption ----------------------------------------------------------------------------------------------------


def learned(model, checkpoint, words, on_step=lambda _: None, recipe=auto_recipe):
    description = describe(model)
    bounds = bounds_of(description, read_budgets(words), 4)
    limits = make_budget(description.groups, description.shapes, 0.0, "model", "rows", bounds=bounds)
    ids = random_tokens(22, 16)
    return learn(
        model, description.groups, ids[:20], ids[20:], limits, recipe(10), steps=10, batch_size=2,
        checkpoints=checkpoint and Checkpoints(checkpoint, every=3), on_step=on_step,
    )  # fmt: skip


@pytest.mark.parametrize("at", [2, 5, 8])
def test_an_interrupted_run_with_two_budgets_goes_on_bit_for_bit(tmp_path, at):
    model, words = small_llama(num_key_value_heads=4), ("params=0.6", "kv=0.5")
    whole, parts = [], []

    def until(step):
        parts.append(step)
        if step.step == at:
            raise KeyboardInterrupt

    expected = learned(model, None, words, whole.append)
    with pytest.raises(KeyboardInterrupt):
        learned(model, tmp_path / "checkpoint", words, until)
    found = learned(model, tmp_path / "checkpoint", words, parts.append)
    assert torch.equal(found.z_N, expected.z_N) and torch.equal(found.value_N, expected.value_N)
    again = {step.step: step for step in parts}  # the step at which it was interrupted is done once more
    assert [again[n] for n in range(1, 11)] == whole
    with pytest.raises(InputError, match="belongs to other settings"):
        learned(model, tmp_path / "checkpoint", ("params=0.6", "bytes=0.9"))


# --- settings --------------------------------------------------------------------------------------------------------


def test_budgets_are_written_as_they_were_said_and_a_file_repeats_them(tmp_path):
    file = tmp_path / "config.yaml"
    options = parse("prune", Prune, ["m", "--budget", "params=0.7", "--budget", "kv = 1.5KiB"])
    assert options.budget == ("params=0.7", "kv = 1.5KiB") and options.sparsity is None
    config = Config("m", budget=options.budget).resolved()
    save_config(config, file)
    assert load_config(file) == config and config.budget == ("params=0.7", "kv=1.5KiB")
    assert parse("prune", Prune, ["--config", str(file)]).budget == config.budget
    assert parse("prune", Prune, ["--config", str(file), "--budget", "flops=0.5"]).budget == ("flops=0.5",)


@pytest.mark.parametrize(
    ("settings", "per"),
    [({}, "model"), ({"recipe": "paper"}, "model"), ({"recipe": "paper", "sparsity": 0.2}, "kind"),
     ({"method": "magnitude"}, "layer"), ({"method": "reap"}, "model"), ({"shape": "uniform"}, "expert")],
)  # fmt: skip
def test_a_budget_is_the_models_unless_widths_are_equal(settings, per):
    assert Config("m", budget=("params=0.7",), **settings).resolved().per == per


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "say what to remove, e.g. --sparsity 0.2, or what to keep, e.g. --budget params=0.8"),
        ({"sparsity": 0.3, "budget": ("units=0.6",)}, "--sparsity 0.3 contradicts --budget units=0.6"),
        ({"per": "kind", "budget": ("kv=0.5",)}, "--per kind asks for the same share of every kind"),
        ({"per": "kind", "budget": ("units=9M", "kv=0.5")}, "so it needs --sparsity"),
        ({"method": "flap", "budget": ("bytes=9MB",)}, "--method flap adds biases, which --budget bytes=9MB"),
    ],
)
def test_settings_that_contradict_budgets_are_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        Config("m", **settings)
    assert Config("m", method="flap", budget=("kv=0.5",)).budget == ("kv=0.5",)


def test_bad_budgets_end_in_one_line_and_exit_code_2(capsys, grouped, text, tmp_path):
    run = tmp_path / "run"
    assert "'x' is no budget" in complaint(capsys, *arguments(grouped, text, run, "x=0.5")) and not run.exists()
    assert "say kv once" in complaint(capsys, *arguments(grouped, text, run, "kv=0.5", "kv=90B"))
    said = complaint(capsys, *arguments(grouped, text, run, "params=0.5", "bytes=10kB"))
    assert "--budget bytes=10kB cannot be met" in said and "the nearest is --budget bytes=17664" in said
    told = arguments(grouped, text, run, "kv=0.5")
    assert "belong to what is pruned (channels)" in complaint(capsys, *told, "--units", "channels")
    assert secateur(*arguments(grouped, text, run, "bytes=18kB")) == 0  # in the same folder
    assert counted(run / "model")["bytes"] <= 18_000
    plan, _ = plan_stage(open_session(run))
    assert sum(map(len, plan.kept.values())) > 0
