"""The command line: what a user types, sees and gets."""

import json
import re
import signal
from dataclasses import fields

import pytest
from transformers import AutoModelForCausalLM

from runs import complaint, leftovers, prune_arguments, same_gates, secateur
from secateur import __version__, passes, planning, stages, verify
from secateur import export as exporting
from secateur import gates as gating
from secateur import learn as learning
from secateur.card import human
from secateur.cli import COMMANDS
from secateur.progress import Screen

STAGES = ("learn", "plan", "export", "verify", "eval")


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_overview_names_every_command(capsys, arguments):
    assert secateur(*arguments) == 0
    said = capsys.readouterr().out
    assert all(f"secateur {name}" in said for name in COMMANDS)


def test_the_version_is_printed(capsys):
    assert secateur("--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_names_every_field(capsys, name):
    assert secateur(name, "--help") == 0
    said = capsys.readouterr().out
    positional, hidden = {"model", "run", "runs"}, {"learning"}
    for field in fields(COMMANDS[name][0]):
        if field.name not in positional | hidden:
            assert f"--{field.name.replace('_', '-')}" in said
    assert "--learning" not in said and "positional arguments" in said


def test_inspect_lists_units_and_their_share(capsys, dense):
    assert secateur("inspect", dense) == 0
    said = " ".join(capsys.readouterr().out.split())  # lines wrap where the folder's name is long
    assert "35,040 parameters" in said and "30,720 parameters belong to units" in said
    assert re.search(r"heads\W+0–2\W+8\W+512\W+12,288\W+35.1%", said)
    assert re.search(r"channels\W+0–2\W+64\W+96\W+18,432\W+52.6%", said)


def test_inspect_reads_no_weights(capsys, broken):
    (broken / "model.safetensors").unlink()
    assert secateur("inspect", broken) == 0


# --- a run -----------------------------------------------------------------------------------------------------------


def test_prune_writes_every_file_of_a_run_and_nothing_half(finished):
    files = {path.name for path in finished.iterdir()}
    assert files == {
        "config.yaml", "data.safetensors", "gates.safetensors", "metrics.jsonl", "plan.json", "model", "verify.json",
        "eval.json", "timings.json", "report.html",
    }  # fmt: skip
    model = {path.name for path in (finished / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "modeling_pruned.py"} <= model
    assert leftovers(finished) == []


def test_prune_prints_the_figures_dense_against_pruned(capsys, dense, text, tmp_path):
    assert secateur(*prune_arguments(dense, text, tmp_path / "run")) == 0
    said = capsys.readouterr().out
    for label in ("perplexity", "parameters", "FLOPs a token", "KV cache a token", "weights on disk"):
        assert re.search(rf"{label}\W+[\d.]+.*[\d.]+", said), label
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert f"{results['dense']['perplexity']:.2f}" in said and f"{results['pruned']['perplexity']:.2f}" in said
    assert human(results["pruned"]["parameters"]) in said
    removed = 1 - results["pruned"]["block_parameters"] / results["dense"]["block_parameters"]
    assert 0.3 <= removed < 0.31 and f"−{removed:.1%}" in said


def test_prune_removes_the_share_it_was_asked_for(finished):
    results = json.loads((finished / "eval.json").read_text())
    dense, pruned = results["dense"]["block_parameters"], results["pruned"]["block_parameters"]
    assert 0.7 * dense - 96 < pruned <= 0.7 * dense
    exported = AutoModelForCausalLM.from_pretrained(finished / "model", trust_remote_code=True)
    assert sum(p.numel() for p in exported.parameters()) == results["pruned"]["parameters"]


def test_metrics_have_a_line_a_step(finished):
    steps = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, 9))


def test_a_finished_run_is_shown_again_by_resuming_it(capsys, run):
    anew = ("timings.json", "report.html")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in anew}
    assert secateur("prune", "--resume", run) == 0
    assert "perplexity" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_reruns_alone_to_the_same_file(run, finished, stage):
    made = {"learn": "gates.safetensors", "plan": "plan.json", "export": "model/model.safetensors",
            "verify": "verify.json", "eval": "model/README.md"}[stage]  # fmt: skip
    (run / made).unlink()
    assert secateur(stage, run) == 0
    assert (run / made).read_bytes() == (finished / made).read_bytes()
    assert leftovers(run) == []


def test_learning_again_discards_the_plan_of_the_earlier_gates(capsys, run):
    assert secateur("learn", run) == 0
    assert "secateur plan" in complaint(capsys, "export", run)


def test_export_in_uniform_shape_plans_anew_and_needs_no_code_to_load(run):
    assert secateur("export", run, "--shape", "uniform") == 0
    assert json.loads((run / "plan.json").read_text())["shape"] == "uniform"
    config = json.loads((run / "model" / "config.json").read_text())
    assert "auto_map" not in config and "per_layer_config" not in config
    exported = AutoModelForCausalLM.from_pretrained(run / "model")
    assert len({layer.mlp.down_proj.in_features for layer in exported.model.layers}) == 1
    assert secateur("verify", run) == 0 and secateur("eval", run) == 0


def test_eval_takes_another_text_and_other_windows(run, text):
    assert secateur("eval", run, "--eval-data", text, "--eval-windows", "3", "--eval-length", "10") == 0
    dense = json.loads((run / "eval.json").read_text())["dense"]
    assert (dense["windows"], dense["length"]) == (3, 10)


@pytest.mark.parametrize("options", [{"recipe": "paper"}, {"shape": "uniform"}, {"per": "layer"}, {"data": "self"}])
def test_prune_takes_every_recipe_shape_and_budget_and_text_of_its_own(dense, text, tmp_path, options):
    settings = {"data": text, "out": tmp_path / "run"} | options
    assert secateur(*prune_arguments(dense, **settings)) == 0
    assert json.loads((tmp_path / "run" / "verify.json").read_text())["passed"] is True


def test_a_config_file_repeats_a_run_bit_for_bit_elsewhere(finished, tmp_path):
    assert secateur("prune", "--config", finished / "config.yaml", "--out", tmp_path / "again") == 0
    for name in ("gates.safetensors", "plan.json", "model/model.safetensors", "config.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name


# --- interruptions ---------------------------------------------------------------------------------------------------


def send(number):
    return lambda *_args, **_options: signal.raise_signal(number)


def at_step(number, act):
    def step(_screen, reported):
        if reported.step == number:
            act()

    return step


INTERRUPTIONS = {
    "before learning": (learning, "gate_sensitivity", send(signal.SIGINT)),
    "step 2": (Screen, "step", at_step(2, send(signal.SIGINT))),
    "step 2 by SIGTERM": (Screen, "step", at_step(2, send(signal.SIGTERM))),
    "step 7": (Screen, "step", at_step(7, send(signal.SIGINT))),
    "saving gates": (gating, "save_file", send(signal.SIGINT)),
    "planning": (planning, "make_plan", send(signal.SIGINT)),
    "exporting": (exporting, "write_shards", send(signal.SIGINT)),
    "verifying": (verify, "compare", send(signal.SIGINT)),
    "evaluating": (stages, "compared", send(signal.SIGINT)),
}


@pytest.mark.parametrize("moment", INTERRUPTIONS)
def test_an_interrupted_run_leaves_nothing_half_written_and_resumes_to_the_same(
    capsys, monkeypatch, dense, text, tmp_path, finished, moment
):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(*INTERRUPTIONS[moment])
        said = complaint(capsys, *prune_arguments(dense, text, run), code=130)
    assert f"secateur prune --resume {run}" in said
    assert leftovers(run) == []
    assert secateur("prune", "--resume", run) == 0
    assert same_gates(run, finished)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name
    assert not (run / "checkpoints").exists()


def test_metrics_survive_an_interruption_before_the_first_resumed_step(monkeypatch, dense, text, tmp_path, finished):
    run = tmp_path / "run"
    for moment in ("step 7", "before a step"):
        with monkeypatch.context() as patched:
            patched.setattr(*INTERRUPTIONS.get(moment, (passes, "distillation_loss", send(signal.SIGINT))))
            arguments = ("prune", "--resume", run) if run.exists() else prune_arguments(dense, text, run)
            assert secateur(*arguments) == 130
    assert secateur("prune", "--resume", run) == 0
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
