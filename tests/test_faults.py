"""Runs on disks, in folders and under signals as they come: what is told, what is left, how they go on.

What kill -9 leaves is in test_kills.py, damaged data in test_data.py, one file that cannot be written in test_files.py.
"""

import json
import os
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from runs import complaint, leftovers, prune_arguments, same_gates, secateur
from secateur import cli, stages
from secateur.files import InputError
from secateur.progress import Screen
from secateur.recover import RecoveryStep
from secateur.run import recorded

NOBODY = 65534
DEAD = 2**22 + 1
"""No process has a number as high."""


def at_step(number, act):
    def step(_screen, reported):
        if reported.step == number:
            act()

    return step


@pytest.fixture
def interrupted(monkeypatch, dense, text, tmp_path):
    """A run that was interrupted at its seventh step of eight."""
    with monkeypatch.context() as patched:
        patched.setattr(Screen, "step", at_step(7, lambda: signal.raise_signal(signal.SIGINT)))
        assert secateur(*prune_arguments(dense, text, tmp_path / "interrupted")) == 130
    return tmp_path / "interrupted"


def same(run, finished):
    files = ("gates.safetensors", "metrics.jsonl", "plan.json", "data.safetensors", "model/model.safetensors")
    return {name for name in files if (run / name).read_bytes() != (finished / name).read_bytes()} == set()


# --- folders and disks -----------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(dense, text):
    """Model and text where somebody without rights can read them, and a folder to write to."""
    folder = Path(tempfile.mkdtemp(prefix="secateur-faults-"))
    shutil.copytree(dense, folder / "dense")
    shutil.copy(text, folder / "text.jsonl")
    (folder / "out").mkdir()
    folder.chmod(0o755)
    (folder / "out").chmod(0o777)
    for path in (folder / "dense").iterdir():
        path.chmod(0o644)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield folder
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)


def writable(folder, may):
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755 if may else 0o555)


def test_a_folder_that_may_not_be_written_to_is_told_at_once(capsys, inputs):
    (inputs / "out" / "run").mkdir()
    writable(inputs / "out" / "run", False)
    said = complaint(capsys, *prune_arguments(inputs / "dense", inputs / "text.jsonl", inputs / "out" / "run"))
    assert f"cannot write {inputs / 'out' / 'run' / 'config.yaml'}: Permission denied" in said


def test_a_folder_that_becomes_read_only_ends_learning_in_one_line_and_it_goes_on_later(
    capsys, monkeypatch, inputs, finished
):
    run = inputs / "out" / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Screen, "step", at_step(5, lambda: writable(run, False)))
        said = complaint(capsys, *prune_arguments(inputs / "dense", inputs / "text.jsonl", run))
    assert f"cannot write {run / 'checkpoints' / 'step-00000006.safetensors'}: Permission denied" in said
    writable(run, True)
    assert leftovers(run) == []
    if os.geteuid() == NOBODY:
        os.seteuid(0)  # the cache of modelling code is root's
    assert secateur("prune", "--resume", run) == 0 and same_gates(run, finished)


def test_a_disk_that_is_full_when_a_line_of_metrics_is_written_is_told_with_the_file(tmp_path):
    limits = pytest.importorskip("resource")
    before = limits.getrlimit(limits.RLIMIT_FSIZE)
    path = tmp_path / "metrics.jsonl"
    limits.setrlimit(limits.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(InputError) as error, recorded(path, 1, lambda _: None) as on_step:
            for step in range(1, 100):
                on_step(RecoveryStep(step, 1.0, 1.0, 1.0, 1.0))
    finally:
        limits.setrlimit(limits.RLIMIT_FSIZE, before)
    assert str(error.value) == f"cannot write {path}: File too large" and path.stat().st_size == 1_000
    with recorded(path, 1, lambda _: None) as on_step:
        on_step(RecoveryStep(3, 1.0, 1.0, 1.0, 1.0))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_swallows_still_ends_the_run(capsys, monkeypatch, dense, text, tmp_path, number):
    def swallow():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(number)

    prepare = cli._prepare
    monkeypatch.setattr(cli, "_prepare", lambda: (prepare(), swallow()))
    complaint(capsys, *prune_arguments(dense, text, tmp_path / "run"), code=130)
    assert not (tmp_path / "run" / "gates.safetensors").exists()


# --- what a killed process leaves ------------------------------------------------------------------------------------


def test_what_is_half_written_is_never_read_and_goes(interrupted, finished):
    for name in (f".gates.safetensors.{DEAD}.tmp", f".plan.json.{DEAD}.tmp", f"checkpoints/.step-9.{DEAD}.tmp"):
        (interrupted / name).write_bytes(b"half")
    (interrupted / f".model.{DEAD}.tmp").mkdir()
    (interrupted / f".model.{DEAD}.tmp" / "config.json").write_text("{")
    assert secateur("prune", "--resume", interrupted) == 0
    assert leftovers(interrupted) == [] and same(interrupted, finished)


def test_a_command_that_was_killed_before_its_settings_were_written_can_be_repeated(dense, text, tmp_path, finished):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".config.yaml.{DEAD}.tmp").write_text("model:")
    assert secateur(*prune_arguments(dense, text, tmp_path / "run")) == 0
    assert leftovers(tmp_path) == [] and same(tmp_path / "run", finished)


def test_half_a_line_of_metrics_and_lines_beyond_the_checkpoint_are_written_anew(interrupted, finished):
    with (interrupted / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 8}\n{"step": 9, "loss": 5.4')
    assert secateur("prune", "--resume", interrupted) == 0
    assert same(interrupted, finished)


def test_a_damaged_checkpoint_is_named_in_a_warning_and_the_run_goes_on(capsys, interrupted, finished):
    newest = max((interrupted / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    capsys.readouterr()
    assert secateur("prune", "--resume", interrupted) == 0
    said = capsys.readouterr().out
    assert f"warning: {newest} is damaged" in said.replace("\n", "") and same(interrupted, finished)


def test_states_of_learning_that_is_done_go_and_those_of_learning_anew_stay(monkeypatch, interrupted, run):
    shutil.copytree(interrupted / "checkpoints", run / "checkpoints")
    assert secateur("prune", "--resume", run) == 0
    assert len(list((run / "checkpoints").iterdir())) == 2  # `secateur learn RUN` goes on from there
    newest = max((run / "checkpoints").iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(stages, "save_gates", lambda *_: signal.raise_signal(signal.SIGINT))
        assert secateur("learn", run) == 130
    assert max((run / "checkpoints").iterdir()) > newest
    assert secateur("prune", "--resume", run) == 0
    assert not (run / "checkpoints").exists()


# --- between two files that belong together --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recovered(base):
    out = base / "recovered"
    options = {"recover": "full", "recover_steps": 3}
    assert secateur(*prune_arguments(base / "dense", base / "text.jsonl", out, **options), "--refit") == 0
    return out


def results(run):
    values = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    del values["timings.json"], values["report.html"]  # which shows them
    evaluation = json.loads(values.pop("eval.json"))
    return values, {key: value for key, value in evaluation.items() if key != "seconds"}


def test_an_updated_export_without_its_verification_is_exported_anew(recovered, tmp_path):
    run = shutil.copytree(recovered, tmp_path / "run")
    for name in ("verify.json", "eval.json"):
        (run / name).unlink()
    assert secateur("prune", "--resume", run) == 0
    assert results(run) == results(recovered)
