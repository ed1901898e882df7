"""The command line: what a user types, sees and gets; every mistake ends in one line and exit code 2."""

import errno
import json
import re
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, T5Config

from runs import prune_arguments, secateur, small_tokenizer, write_checkpoint, write_texts
from secateur import __version__, stages
from secateur import export as exporting
from secateur import gates as gating
from secateur import learn as learning
from secateur.card import human
from secateur.cli import COMMANDS
from secateur.progress import Screen

STAGES = ("learn", "plan", "export", "verify", "eval")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_checkpoint(folder / "dense")
    write_texts(folder / "text.jsonl")
    return folder


@pytest.fixture
def dense(base):
    return base / "dense"


@pytest.fixture
def text(base):
    return base / "text.jsonl"


@pytest.fixture(scope="module")
def finished(base):
    assert secateur(*prune_arguments(base / "dense", base / "text.jsonl", base / "run")) == 0
    return base / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to work on."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def broken(dense, tmp_path):
    """A copy of the model, to break."""
    return shutil.copytree(dense, tmp_path / "broken")


def complaint(capsys, *arguments, code=2):
    """Runs a command that must fail; the one line it says."""
    capsys.readouterr()
    assert secateur(*arguments) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("\n") and "Traceback" not in said, said
    return said


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


def gates_of(folder):
    return load_file(folder / "gates.safetensors")


def same_gates(folder, other):
    first, second = gates_of(folder), gates_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


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
    positional, hidden = {"model", "run"}, {"learning"}
    for field in fields(COMMANDS[name][0]):
        if field.name not in positional | hidden:
            assert f"--{field.name.replace('_', '-')}" in said
    assert "--learning" not in said and "positional arguments" in said


def test_inspect_lists_units_and_their_share(capsys, dense):
    assert secateur("inspect", dense) == 0
    said = capsys.readouterr().out
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
        "eval.json", "timings.json",
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
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "timings.json"}
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
    "planning": (stages, "make_plan", send(signal.SIGINT)),
    "exporting": (exporting, "save_file", send(signal.SIGINT)),
    "verifying": (stages, "compare", send(signal.SIGINT)),
    "evaluating": (stages, "perplexity", send(signal.SIGINT)),
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
    assert not (run / "checkpoint.safetensors").exists()


def test_metrics_survive_an_interruption_before_the_first_resumed_step(monkeypatch, dense, text, tmp_path, finished):
    run = tmp_path / "run"
    for moment in ("step 7", "before a step"):
        with monkeypatch.context() as patched:
            patched.setattr(*INTERRUPTIONS.get(moment, (learning, "_losses", send(signal.SIGINT))))
            arguments = ("prune", "--resume", run) if run.exists() else prune_arguments(dense, text, run)
            assert secateur(*arguments) == 130
    assert secateur("prune", "--resume", run) == 0
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["0", "1", "1.5", "-0.1", "nan"])
def test_a_sparsity_outside_of_0_to_1_is_refused(capsys, dense, text, tmp_path, sparsity):
    said = complaint(capsys, *prune_arguments(dense, text, tmp_path / "run", sparsity=sparsity))
    assert "--sparsity must lie between 0 and 1" in said and not (tmp_path / "run").exists()


def test_contradicting_options_are_both_named(capsys, dense, text, tmp_path):
    said = complaint(capsys, *prune_arguments(dense, text, tmp_path / "run", shape="uniform", per="model"))
    assert "--shape uniform" in said and "--per model" in said


def test_an_unknown_command_is_answered_with_the_known_ones(capsys):
    said = complaint(capsys, "trim")
    assert "'trim'" in said and all(name in said for name in COMMANDS)


@pytest.mark.parametrize("options", [("--frobnicate", "1"), ("--steps", "many"), ("--recipe", "best")])
def test_an_unknown_option_or_value_ends_with_code_2_and_names_it(capsys, dense, options):
    assert secateur("prune", dense, "--sparsity", "0.2", *options) == 2
    said = capsys.readouterr().err
    assert options[0] in said and "Traceback" not in said


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_data_is_refused(capsys, dense, tmp_path, content):
    (tmp_path / "empty.txt").write_text(content)
    assert "empty.txt" in complaint(capsys, *prune_arguments(dense, tmp_path / "empty.txt", tmp_path / "run"))


def test_data_that_is_too_short_is_refused_with_the_tokens_needed_and_found(capsys, dense, text, tmp_path):
    said = complaint(capsys, *prune_arguments(dense, text, tmp_path / "run", steps=500))
    assert "16,000 tokens" in said and re.search(r"1,[45]\d\d were found", said)


def test_missing_data_is_refused(capsys, dense, tmp_path):
    assert "nowhere.txt" in complaint(capsys, *prune_arguments(dense, tmp_path / "nowhere.txt", tmp_path / "run"))


@pytest.mark.parametrize("length", ["99999", "10"])
def test_evaluation_text_that_is_missing_or_too_short_is_refused_before_learning(capsys, dense, text, tmp_path, length):
    other = text if length == "99999" else tmp_path / "nowhere.txt"
    options = {"eval_data": other, "eval_length": length}
    said = complaint(capsys, *prune_arguments(dense, text, tmp_path / "run", **options))
    assert other.name in said and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tokenizer_with_more_words_than_the_model_is_refused(capsys, broken, tmp_path):
    small_tokenizer(words=90).save_pretrained(broken)
    (tmp_path / "text.txt").write_text("w1 w89 " * 500)
    said = complaint(capsys, *prune_arguments(broken, tmp_path / "text.txt", tmp_path / "run"))
    assert "token 92" in said and "64 rows" in said


@pytest.mark.parametrize("command", ["inspect", "prune"])
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(d_model=16, num_layers=1, num_heads=2), "encoder–decoder"),
        (BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32), "both ways"),
    ],
    ids=["t5", "bert"],
)
def test_models_that_are_no_causal_language_models_are_refused(capsys, text, tmp_path, command, config, reason):
    config.save_pretrained(tmp_path / "other")
    arguments = prune_arguments(tmp_path / "other", text, tmp_path / "run")
    assert reason in complaint(capsys, *(arguments if command == "prune" else ("inspect", tmp_path / "other")))


def test_a_folder_without_weights_is_refused(capsys, broken, text, tmp_path):
    (broken / "model.safetensors").unlink()
    assert "model.safetensors" in complaint(capsys, *prune_arguments(broken, text, tmp_path / "run"))


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_weights_are_refused(capsys, broken, text, tmp_path, keep):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    said = complaint(capsys, *prune_arguments(broken, text, tmp_path / "run"))
    assert str(broken) in said and "truncated or broken" in said


def test_a_folder_without_a_tokenizer_is_refused(capsys, broken, text, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    assert "cannot load the tokenizer" in complaint(capsys, *prune_arguments(broken, text, tmp_path / "run"))


@pytest.mark.parametrize(
    "config",
    ["{", "{}", '{"model_type": "unheard-of"}', '{"model_type": "llama", "hidden_size": "wide"}',
     '{"model_type": "llama", "hidden_size": 33, "num_attention_heads": 4}', None],
)  # fmt: skip
@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_a_broken_configuration_is_refused(capsys, broken, text, tmp_path, config, command):
    if config is None:
        (broken / "config.json").unlink()
    else:
        (broken / "config.json").write_text(config)
    arguments = prune_arguments(broken, text, tmp_path / "run") if command == "prune" else ("inspect", broken)
    assert str(broken) in complaint(capsys, *arguments)


@pytest.mark.parametrize("name", ["nowhere/at/all", "/nowhere", "./nowhere", "nobody/nothing", "nowhere.gguf"])
@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_a_missing_model_is_refused(capsys, text, tmp_path, name, command):
    arguments = prune_arguments(name, text, tmp_path / "run") if command == "prune" else ("inspect", name)
    assert name in complaint(capsys, *arguments)


def test_a_folder_that_holds_another_run_is_refused_and_left_alone(capsys, dense, text, run):
    before = (run / "config.yaml").read_bytes()
    said = complaint(capsys, *prune_arguments(dense, text, run, sparsity=0.5))
    assert f"{run} holds another run" in said and "--resume" in said
    assert (run / "config.yaml").read_bytes() == before


def test_a_folder_that_holds_something_else_is_refused(capsys, dense, text, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    assert "is not empty" in complaint(capsys, *prune_arguments(dense, text, tmp_path))


def test_a_command_that_failed_before_its_run_began_may_use_the_folder_again(capsys, dense, text, tmp_path):
    complaint(capsys, *prune_arguments(dense, tmp_path / "nowhere.txt", tmp_path / "run"))
    assert secateur(*prune_arguments(dense, text, tmp_path / "run")) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_of_no_run_is_refused(capsys, tmp_path, stage):
    assert str(tmp_path / "nowhere") in complaint(capsys, stage, tmp_path / "nowhere")
    assert "config.yaml is missing" in complaint(capsys, stage, tmp_path)


@pytest.mark.parametrize(
    ("stage", "missing", "first"),
    [("plan", "gates.safetensors", "secateur learn"), ("export", "plan.json", "secateur plan"),
     ("verify", "model", "secateur export"), ("eval", "model", "secateur export")],
)  # fmt: skip
def test_a_stage_whose_input_is_missing_names_the_stage_before(capsys, run, stage, missing, first):
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert first in complaint(capsys, stage, run)


def test_gates_of_another_model_are_refused(capsys, run):
    gates = gates_of(run)
    gates["layers.0.heads"] = gates["layers.0.heads"][:4].contiguous()
    save_file(gates, run / "gates.safetensors", metadata={"secateur": '{"format": 1}'})
    assert "another architecture" in complaint(capsys, "plan", run)


@pytest.mark.parametrize("option", ["--resume", "--config"])
def test_a_missing_run_or_file_of_settings_is_refused(capsys, tmp_path, option):
    assert str(tmp_path / "nowhere") in complaint(capsys, "prune", option, tmp_path / "nowhere")


def test_weights_that_are_not_numbers_end_in_one_line_and_the_last_good_gates(capsys, broken, text, tmp_path):
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][7, 7] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    said = complaint(capsys, *prune_arguments(broken, text, tmp_path / "run", recipe="paper"))
    assert "NaN or infinite at step 1" in said
    assert all(torch.isfinite(z).all() for z in load_file(tmp_path / "run" / "gates-step-0.safetensors").values())


# --- disks -----------------------------------------------------------------------------------------------------------

FULL = {
    "system": OSError(errno.ENOSPC, "No space left on device"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize(
    ("module", "file"),
    [(learning, "checkpoint.safetensors"), (gating, "gates.safetensors"), (exporting, "model")],
)
def test_a_full_disk_ends_in_one_line_that_names_the_file_and_leaves_nothing_half_written(
    capsys, monkeypatch, dense, text, tmp_path, finished, module, file, error
):
    def save_half(_tensors, path, *_args, **_options):
        Path(path).write_bytes(b"half")
        raise FULL[error]

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(module, "save_file", save_half)
        said = complaint(capsys, *prune_arguments(dense, text, run))
    assert str(run / file) in said and "No space left on device" in said
    assert leftovers(run) == [] and not (run / file).exists()
    assert secateur("prune", "--resume", run) == 0 and same_gates(run, finished)


def test_a_file_that_cannot_be_renamed_keeps_the_old_one(capsys, monkeypatch, run):
    rename = Path.replace

    def refuse(source, target):
        if target.name == "plan.json":
            raise OSError(errno.EROFS, "Read-only")
        return rename(source, target)

    before = (run / "plan.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuse)
        assert "plan.json: Read-only" in complaint(capsys, "plan", run)
    assert (run / "plan.json").read_bytes() == before and leftovers(run) == []


def test_an_output_folder_that_cannot_be_made_is_refused(capsys, dense, text, tmp_path):
    (tmp_path / "file").write_text("")
    said = complaint(capsys, *prune_arguments(dense, text, tmp_path / "file" / "run"))
    assert str(tmp_path / "file") in said
