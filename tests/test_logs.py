"""Curves for TensorBoard and Weights & Biases: the names and values of metrics.jsonl, each step once."""

import json
import shutil
import struct
import time

import pytest

import secateur as library
from runs import complaint, prune_arguments, secateur
from secateur import logs
from secateur.logs import WandB, final, flat
from secateur.optimise import Step
from secateur.run import open_run
from test_cli import at_step

DIED = "died"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(folder):
    """{tag: [(step, value)]} of event files, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def stored(path):
    """The records of a file of Weights & Biases: LevelDB's log format, after a header of 7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # records begin anew in each block
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def records(run):
    """What the offline files of Weights & Biases hold, all of a run in their order: (history rows, summary, ids)."""
    from wandb.proto.wandb_internal_pb2 import Record

    history, summary, ids = [], {}, []
    for path in sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        found = []
        for _ in range(100):  # a process of its own still writes when wandb.finish is done
            found = [Record.FromString(data) for data in stored(path)]
            if found and found[-1].WhichOneof("record_type") == "exit":
                break
            time.sleep(0.1)
        for record in found:
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.append(record.run.run_id)
            if kind == "history":
                row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                history.append({key: value for key, value in row.items() if not key.startswith("_")})
            if kind == "summary":
                summary |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
    return history, summary, ids


def arguments(dense, text, out, *logs_, **options):
    return [*prune_arguments(dense, text, out, **options), "--log", *logs_]


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")


# --- names -----------------------------------------------------------------------------------------------------------


def test_nested_values_are_named_by_dots_and_a_list_of_one_by_its_name():
    values = {"loss": 1.5, "step": 3, "lambda1": [0.2], "guard_rises": [0.1, 0.3], "budgets": {"kv=0.5": 0.9},
              "target": None, "text": "a", "held": True, "none": []}  # fmt: skip
    assert flat(values) == {"loss": 1.5, "step": 3, "lambda1": 0.2, "guard_rises.0": 0.1, "guard_rises.1": 0.3,
                            "budgets.kv=0.5": 0.9}  # fmt: skip


# --- TensorBoard -----------------------------------------------------------------------------------------------------


LEARNED_THEN_RECOVERED = {"method": "deterministic", "recover": "lora", "recover_steps": 4}


def test_tensorboard_has_the_lines_of_metrics_and_the_final_figures(dense, text, tmp_path):
    run = tmp_path / "run"
    pytest.importorskip("tensorboard")
    assert secateur(*arguments(dense, text, run, "tensorboard", **LEARNED_THEN_RECOVERED)) == 0
    for name, file in (("learn", "metrics.jsonl"), ("recover", "recover.jsonl")):
        shown, rows = scalars(run / "tensorboard" / name), [flat(row) for row in lines(run / file)]
        assert set(shown) == {key for row in rows for key in row} - {"step"}
        for key, points in shown.items():
            expected = {row["step"]: row[key] for row in rows if key in row}
            assert len(points) == len(expected) and dict(points) == pytest.approx(expected, rel=1e-6)
    results = json.loads((run / "eval.json").read_text())
    shown = scalars(run / "tensorboard/eval")
    assert shown["pruned.perplexity"] == [(0, pytest.approx(results["pruned"]["perplexity"], rel=1e-6))]
    assert set(shown) == set(final(results))


@pytest.mark.parametrize("number", [2, 7])
def test_a_resumed_run_continues_its_curves(monkeypatch, dense, text, tmp_path, number):
    pytest.importorskip("tensorboard")

    def die():
        raise RuntimeError(DIED)  # as when killed: nothing is saved beyond the last checkpoint, of step 0, 3 or 6

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        later = at_step(number + 1, die)
        patched.setattr(logs.TensorBoard, "step", both(logs.TensorBoard.step, later))
        with pytest.raises(RuntimeError, match=DIED):
            secateur(*arguments(dense, text, run, "tensorboard"))
    assert len(scalars(run / "tensorboard/learn")["loss"]) >= number
    assert secateur("prune", "--resume", run) == 0
    points = scalars(run / "tensorboard/learn")["loss"]
    assert [step for step, _ in points] == list(range(1, 9))
    expected = {row["step"]: row["loss"] for row in lines(run / "metrics.jsonl")}
    assert dict(points) == pytest.approx(expected, rel=1e-6)


def both(first, second):
    def heard(*given):
        first(*given)
        second(*given)

    return heard


# --- Weights & Biases ------------------------------------------------------------------------------------------------


def test_wandb_has_the_lines_of_metrics_and_the_final_figures(offline, dense, text, tmp_path):
    run = tmp_path / "run"
    assert secateur(*arguments(dense, text, run, "wandb", "tensorboard", **LEARNED_THEN_RECOVERED)) == 0
    history, summary, ids = records(run)
    learned, recovered = ([row for row in history if prefix + "step" in row] for prefix in ("", "recover/"))
    assert learned == [pytest.approx(flat(row)) for row in lines(run / "metrics.jsonl")]
    expected = [{f"recover/{key}": value for key, value in flat(row).items()} for row in lines(run / "recover.jsonl")]
    assert recovered == [pytest.approx(row) for row in expected]
    assert summary["pruned.perplexity"] == json.loads((run / "eval.json").read_text())["pruned"]["perplexity"]
    assert set(ids) == {json.loads((run / "wandb/secateur.json").read_text())["id"]}
    assert (run / "tensorboard/learn").is_dir()


def test_a_run_that_goes_on_keeps_its_id_and_logs_no_step_twice(offline, monkeypatch, dense, text, tmp_path):
    def die():
        raise RuntimeError(DIED)

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(WandB, "step", both(WandB.step, at_step(5, die)))
        with pytest.raises(RuntimeError, match=DIED):
            secateur(*arguments(dense, text, run, "wandb"))
    first = json.loads((run / "wandb/secateur.json").read_text())
    assert [row["step"] for row in records(run)[0]] == [1, 2, 3, 4, 5]
    assert secateur("prune", "--resume", run) == 0
    history, _, ids = records(run)
    assert [row["step"] for row in history] == list(range(1, 9)) and set(ids) == {first["id"]}
    assert json.loads((run / "wandb/secateur.json").read_text()) == first


def test_gates_that_are_learned_anew_otherwise_are_another_run(offline, dense, text, tmp_path):
    run = tmp_path / "run"
    assert secateur(*arguments(dense, text, run, "wandb")) == 0
    first = json.loads((run / "wandb/secateur.json").read_text())
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("  lr: ", "  lr: 0.5 # "))
    assert secateur("learn", run) == 0
    assert json.loads((run / "wandb/secateur.json").read_text()) != first
    assert len(set(records(run)[2])) == 2


def test_wandb_without_a_key_is_one_line(capsys, monkeypatch, dense, text, tmp_path):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("api_key not configured (no-tty)\nmore")

    monkeypatch.setattr(wandb, "init", refuse)
    said = complaint(capsys, *arguments(dense, text, tmp_path / "run", "wandb"))
    assert "--log wandb: api_key not configured (no-tty); run `wandb login`, or set WANDB_MODE=offline" in said


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("log", "extra"), [("tensorboard", "log"), ("wandb", "wandb")])
def test_a_missing_package_is_said_before_anything_is_done(capsys, monkeypatch, dense, text, tmp_path, log, extra):
    monkeypatch.setattr(logs, "find_spec", lambda _name: None)
    said = complaint(capsys, *arguments(dense, text, tmp_path / "run", log))
    assert said.endswith(f"--log {log} needs {log}, which is not installed; run: pip install 'secateur[{extra}]'\n")
    assert not (tmp_path / "run").exists()


def test_a_run_without_logs_imports_and_writes_none(finished):
    assert not {"tensorboard", "wandb"} & {path.name for path in finished.iterdir()}
    assert open_run(finished).config.log == ()


def test_python_code_logs_too(dense, text, tmp_path):
    pytest.importorskip("tensorboard")
    result = library.prune(
        str(dense), data=text, out=tmp_path / "run", log="tensorboard", sparsity=0.3, steps=8, batch_size=2, seq_len=16,
        held_out_tokens=64,
    )  # fmt: skip
    assert [step for step, _ in scalars(result.folder / "tensorboard/learn")["kl"]] == list(range(1, 9))


def test_a_folder_with_logs_can_be_opened_where_they_are_not_installed(capsys, monkeypatch, run):
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("log: []", "log: [tensorboard, wandb]"))
    monkeypatch.setattr(logs, "find_spec", lambda _name: None)
    assert secateur("plan", run) == secateur("export", run) == secateur("verify", run) == 0
    shutil.rmtree(run)
    assert Step.__doc__
