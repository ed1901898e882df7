"""The proof that the export is the gated model: it passes what is equal and sets aside what is not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runs import (
    SIZES,
    complaint,
    described,
    prune_arguments,
    random_tokens,
    secateur,
    small_llama,
    small_tokenizer,
    write_checkpoint,
    write_texts,
)
from secateur import verify
from secateur.attach import attached, writer
from secateur.files import InputError
from secateur.run import open_run
from secateur.session import Session
from secateur.stages import VerificationFailed, eval_stage, verify_stage
from secateur.verify import compare, folded
from tiny import dense_logits, tiny

LOGITS = 5 * torch.randn(2, 6, 30, generator=torch.Generator().manual_seed(0))


# --- the comparison --------------------------------------------------------------------------------------------------


def compared(gated, exported, dtype="float32", noise=None):
    """By rows; `noise`: how far the gated model's logits in another dtype are from its own."""
    logits = [gated, exported] + ([] if noise is None else [gated + noise])
    return compare(zip(*logits, strict=True), dtype)


@pytest.mark.parametrize("noise", [None, 0.0, 0.01])
def test_equal_logits_pass(noise):
    result = compared(LOGITS, LOGITS.clone(), "float32", noise)
    assert result.passed and result.max_difference == 0.0
    assert result.same_top_token == 1.0 and result.tokens == 12


def test_in_float32_rounding_passes_and_one_logit_that_is_off_fails():
    assert compared(LOGITS, LOGITS * (1 + 1e-7)).passed
    off = LOGITS.clone()
    off[1, 3, 7] += 1e-3
    result = compared(LOGITS, off)
    assert not result.passed and result.max_difference == pytest.approx(1e-3, rel=1e-2)


def test_in_a_narrow_dtype_the_mean_difference_may_be_a_few_times_the_noise_of_the_dtype():
    difference = torch.full_like(LOGITS, 0.03)
    assert compared(LOGITS, LOGITS + difference, "bfloat16", noise=0.01).passed
    assert not compared(LOGITS, LOGITS + 2 * difference, "bfloat16", noise=0.01).passed


@pytest.mark.parametrize("noise", [None, 0.01, float("nan"), float("inf")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [(True, False), (False, True), (True, True)])
def test_logits_that_are_not_finite_never_pass(noise, value, where):
    gated, exported = LOGITS.clone(), LOGITS.clone()
    for logits, broken in zip((gated, exported), where, strict=True):
        if broken:
            logits[0, 2, 3] = value
    assert not compared(gated, exported, "float32", noise).passed


# --- folding ---------------------------------------------------------------------------------------------------------


def test_folded_gates_equal_attached_ones_and_leave_no_trace():
    model = small_llama(num_key_value_heads=4)
    groups = described(model, 0.3)[0].groups
    gates = {g.name: torch.rand(g.units, generator=torch.Generator().manual_seed(1)) * 2 for g in groups}
    ids_NT = random_tokens(2, 8)
    before = {g.name: writer(model, g).weight.clone() for g in groups}
    with attached(model, groups, gates):
        by_hooks = dense_logits(model, ids_NT)
    with folded(model, groups, gates, torch.float32):
        torch.testing.assert_close(dense_logits(model, ids_NT), by_hooks, rtol=1e-4, atol=1e-4)
    with pytest.raises(ZeroDivisionError), folded(model, groups, gates, torch.bfloat16):
        raise ZeroDivisionError
    assert all(torch.equal(writer(model, g).weight, before[g.name]) for g in groups)


# --- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def finished(request, tmp_path_factory):
    """A run that passed, of a checkpoint in each dtype."""
    base = tmp_path_factory.mktemp("verified")
    write_checkpoint(base / "dense", request.param)
    write_texts(base / "text.jsonl")
    assert secateur(*prune_arguments(base / "dense", base / "text.jsonl", base / "run")) == 0
    return base / "run", request.param


@pytest.fixture
def run(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    return open_run(folder)


class Silent:
    def stage(self, name): ...
    def step(self, step): ...
    def written(self, tokens): ...


def session(run):
    return Session(run, Silent())


def perturb(run, value):
    """Moves one entry of one weight of the export by `value`."""
    path = run.model / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("down_proj.weight"))
    tensors[name][3, 0] += value
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_run_of_either_dtype_passes_and_is_compared_in_its_own_dtype_and_in_float32(finished):
    folder, dtype = finished
    verified = json.loads((folder / "verify.json").read_text())
    assert verified["passed"] is True
    own = [] if dtype == torch.float32 else ["bfloat16"]
    assert [c["dtype"] for c in verified["comparisons"]] == [*own, "float32"]
    assert all(t.dtype == dtype for t in load_file(folder / "model" / "model.safetensors").values())


def test_what_a_narrow_model_computes_when_it_is_built_is_not_rounded(tmp_path):
    """Gemma's scale of embeddings, √48, is no number in bfloat16."""
    model = tiny("gemma2", vocab_size=SIZES["vocab_size"]).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    small_tokenizer().save_pretrained(tmp_path / "dense")
    texts = write_texts(tmp_path / "text.jsonl")
    assert secateur(*prune_arguments(tmp_path / "dense", texts, tmp_path / "run")) == 0


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_a_perturbed_export_fails_and_is_set_aside(run, value):
    perturb(run, value)
    with pytest.raises(VerificationFailed, match="does not match the gated model") as error:
        verify_stage(session(run))
    assert "\n" not in str(error.value) and str(run.failed_model) in str(error.value)
    assert not run.model.exists() and (run.failed_model / "config.json").is_file()
    assert json.loads(run.verify.read_text())["passed"] is False


def test_rounding_that_a_model_amplifies_passes_and_a_wrong_weight_beside_it_does_not(run, monkeypatch):
    """As if the fixed bound of float32 were too tight: what rounding makes of this very model is the yardstick then."""
    monkeypatch.setattr(verify, "FLOAT32_TOLERANCE", 0.0)
    one = session(run)
    before = {name: t.clone() for name, t in one.loaded.model.named_parameters()}
    assert all(c.passed for c in verify_stage(one))
    for name, t in one.loaded.model.named_parameters():
        assert t.dtype == before[name].dtype and torch.equal(t, before[name]), name
    perturb(run, 0.01)
    with pytest.raises(VerificationFailed):
        verify_stage(session(run))


def test_an_export_that_was_set_aside_is_not_evaluated(run):
    perturb(run, 0.5)
    with pytest.raises(VerificationFailed):
        verify_stage(session(run))
    with pytest.raises(InputError, match="failed verification"):
        eval_stage(session(run))


def test_the_command_ends_with_code_1_as_often_as_the_export_is_wrong_and_with_0_once_it_is_right(run, capsys):
    for _ in range(2):
        perturb(run, 0.5)
        capsys.readouterr()
        assert secateur("verify", run.folder) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert secateur("export", run.folder) == 0
    assert secateur("verify", run.folder) == 0


@pytest.mark.parametrize("command", ["verify", "refit", "recover --recover full", "eval"])
@pytest.mark.parametrize("change", ["widths", "values", "widths of an export that does not say its plan"])
def test_an_export_of_another_plan_is_refused_and_stays_where_it_is(run, capsys, command, change):
    if change == "values":
        plan = json.loads(run.plan.read_text())
        next(scale for scale in plan["scales"].values() if scale)[0] += 0.25
        run.plan.write_text(json.dumps(plan))
    else:
        assert secateur("plan", run.folder, "--shape", "uniform") == 0
    if change.endswith("its plan"):
        config = json.loads((run.model / "config.json").read_text())
        del config["secateur"]["plan"]
        (run.model / "config.json").write_text(json.dumps(config))
    before = {path.name: path.read_bytes() for path in run.model.iterdir() if path.is_file()}
    said = complaint(capsys, *command.split()[:1], run.folder, *command.split()[1:])
    assert "was exported from another plan; run `secateur export" in said
    assert before == {path.name: path.read_bytes() for path in run.model.iterdir() if path.is_file()}


def test_a_run_goes_on_without_its_texts_once_their_tokens_are_in_it(run, tmp_path, capsys, monkeypatch):
    """Every stage but one that reads a text which is not in the run yet."""
    data = Path(run.config.data)
    gone = data.rename(tmp_path / "moved.jsonl")
    try:
        for command in ("plan", "export", "verify", "refit", "eval"):
            assert secateur(command, run.folder) == 0, capsys.readouterr().err
        assert secateur("eval", run.folder, "--eval-data", gone, "--eval-windows", "2", "--eval-length", "16") == 0
        monkeypatch.delattr("secateur.session.load")  # what is missing is said before a model is loaded
        assert "no such file" in complaint(capsys, "eval", run.folder, "--eval-data", data)
        run.data.unlink()
        assert "no such file" in complaint(capsys, "eval", run.folder)
    finally:
        gone.rename(data)


@pytest.mark.parametrize("option", [("--eval-length", "32"), ("--eval-windows", "5"), ("--eval-join", "lines")])
def test_windows_of_no_text_are_refused(run, capsys, option):
    said = complaint(capsys, "eval", run.folder, *option)
    assert option[0] in said and "--eval-data" in said


def test_verifying_leaves_the_dense_model_as_it_was(run):
    one = session(run)
    model = one.loaded.model
    before = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert any(name.endswith("inv_freq") for name in before)
    verify_stage(one)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        assert t.dtype == before[name].dtype and torch.equal(t, before[name]), name
