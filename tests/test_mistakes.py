"""What a user can get wrong: every mistake ends in one line and exit code 2, and loses nothing."""

import errno
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, T5Config

from runs import (
    complaint,
    gates_of,
    leftovers,
    prune_arguments,
    same_gates,
    secateur,
    small_tokenizer,
)
from secateur import checkpoints
from secateur import export as exporting
from secateur import gates as gating
from secateur.cli import COMMANDS

STAGES = ("learn", "plan", "export", "verify", "eval")


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
    ("module", "writer", "file"),
    [
        (checkpoints, "save_file", "checkpoints"),
        (gating, "save_file", "gates.safetensors"),
        (exporting, "write_shards", "model"),
    ],
)
def test_a_full_disk_ends_in_one_line_that_names_the_file_and_leaves_nothing_half_written(
    capsys, monkeypatch, dense, text, tmp_path, finished, module, writer, file, error
):
    def save_half(*arguments, **_options):
        path = next(Path(a) for a in arguments if isinstance(a, str | Path))
        (path / "model.safetensors" if path.is_dir() else path).write_bytes(b"half")
        raise FULL[error]

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(module, writer, save_half)
        said = complaint(capsys, *prune_arguments(dense, text, run))
    assert str(run / file) in said and "No space left on device" in said
    assert leftovers(run) == [] and not list(run.glob(f"{file}/*"))
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
