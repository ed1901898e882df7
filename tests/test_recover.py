"""Recovery: the weights that are left learn from the dense model, resume bit for bit, and land in the export."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.mistral.modeling_mistral import MistralMLP

from runs import complaint, described, prune_arguments, random_tokens, secateur, small_llama
from secateur.checkpoints import Checkpoints
from secateur.config import Config
from secateur.evaluate import mean_loss
from secateur.export import export
from secateur.files import InputError
from secateur.recover import Recovery, recover
from secateur.updates import updates_of
from secateur.vocabulary import Vocabulary
from tiny import random_plan

STEPS = 12
SETTINGS = {
    "lora": Recovery("lora", STEPS, 2, 1e-2, 4, 2.0, 1.0, seed=0),
    "full": Recovery("full", STEPS, 2, 3e-3, 4, 2.0, 1.0, seed=0),
}
ROWS = random_tokens(2 * STEPS, 12)


@pytest.fixture(scope="module")
def teacher():
    return small_llama()


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    """A pruned model, with a sublayer that is gone."""
    description, _limits = described(teacher, 0.3)
    path = tmp_path_factory.mktemp("pruned") / "model"
    export(teacher, None, description, random_plan(description, close=("layers.1.channels",)), path)
    return path


def pruned(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def run(folder, teacher, kind, settings=None, rows=ROWS, **options):
    return recover(pruned(folder), teacher, "model.layers", rows, settings or SETTINGS[kind], **options)


def interrupt_at(number):
    def on_step(step):
        if step.step == number:
            raise KeyboardInterrupt

    return on_step


def kl_to(teacher, model, rows):
    with torch.no_grad():
        p, q = (m(rows).logits[:, :-1].log_softmax(-1) for m in (teacher, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_recovery_brings_the_model_nearer_to_its_teacher_on_other_text(folder, teacher, kind):
    settings = replace(SETTINGS[kind], steps=60)
    weights = run(folder, teacher, kind, settings, random_tokens(120, 12))
    model, other = pruned(folder), random_tokens(16, 12, seed=77)
    before = kl_to(teacher, model, other)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and missing
    assert kl_to(teacher, model, other) < 0.9 * before


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_parts_of_a_batch_train_as_the_batch_does(folder, teacher, kind, monkeypatch):
    settings = replace(SETTINGS[kind], steps=2, batch_size=4)
    whole = run(folder, teacher, kind, settings, ROWS[:8])
    seen = []
    hidden = Vocabulary.hidden
    monkeypatch.setattr(Vocabulary, "hidden", lambda own, ids_BT: seen.append(len(ids_BT)) or hidden(own, ids_BT))
    steps = []
    parts = run(folder, teacher, kind, settings, ROWS[:8], micro_batch_size=1, on_step=steps.append)
    assert set(seen) == {1} and len(seen) == 2 * 2 * 4 and len(steps) == 2
    before = pruned(folder).state_dict()
    moved = sum((whole[name] - before[name]).norm() for name in whole)
    assert sum((whole[name] - parts[name]).norm() for name in whole) < 0.01 * moved


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_layers_are_computed_once_more_where_that_is_asked_for(folder, teacher, kind, monkeypatch):
    forward, calls = MistralMLP.forward, []  # as which a ragged Llama is exported
    monkeypatch.setattr(MistralMLP, "forward", lambda own, x: calls.append(torch.is_grad_enabled()) or forward(own, x))
    settings, found, counted = replace(SETTINGS[kind], steps=2), [], []
    for wanted in (False, True):
        calls.clear()
        found.append(run(folder, teacher, kind, settings, ROWS[:4], gradient_checkpointing=wanted))
        counted.append(sum(calls))
    assert counted[1] == 2 * counted[0] > 0
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_only_weights_of_the_layers_change_and_the_teacher_does_not(folder, teacher, kind):
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    weights, own = run(folder, teacher, kind), dict(pruned(folder).named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert all(name.startswith("model.layers.") and weights[name].shape == own[name].shape for name in weights)
    changed = {name for name in weights if not torch.equal(weights[name], own[name])}
    unused = "model.layers.1.post_attention_layernorm.weight"  # its MLP is gone
    inside = {name for name in own if name.startswith("model.layers.") and name != unused}
    assert changed == ({name for name in inside if "_proj" in name} if kind == "lora" else inside)


def test_what_lora_learned_is_merged_whole(folder, teacher):
    """The losses that training reports at the last step are those of the merged weights one step before."""
    steps = []
    settings = replace(SETTINGS["lora"], steps=4, lr=0.3)
    weights = run(folder, teacher, "lora", settings, ROWS[:8], on_step=steps.append)
    first = mean_loss(pruned(folder), ROWS[:2])
    assert steps[0].ce == pytest.approx(first, rel=1e-5)  # updates start at zero
    model = pruned(folder)
    model.load_state_dict(weights, strict=False)
    longer = []
    run(folder, teacher, "lora", replace(settings, steps=5, lr=0.3), ROWS[:10], on_step=longer.append)
    assert mean_loss(model, ROWS[:8]) != pytest.approx(mean_loss(pruned(folder), ROWS[:8]), rel=1e-3)
    ranks = {
        torch.linalg.matrix_rank(weights[name] - p, rtol=1e-3).item()
        for name, p in pruned(folder).named_parameters()
        if name in weights
    }
    assert max(ranks) == settings.rank


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("step", [1, 5, STEPS])
def test_an_interrupted_recovery_goes_on_to_the_same_weights(folder, teacher, tmp_path, kind, step):
    checkpoints = Checkpoints(tmp_path / "recovery", every=5)
    with pytest.raises(KeyboardInterrupt):
        run(folder, teacher, kind, checkpoints=checkpoints, on_step=interrupt_at(step))
    seen = []
    resumed = run(folder, teacher, kind, checkpoints=checkpoints, on_step=lambda s: seen.append(s.step))
    whole = run(folder, teacher, kind)
    assert seen == list(range(step + 1, STEPS + 1))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_recovery_that_is_killed_goes_on_from_its_last_checkpoint(folder, teacher, tmp_path):
    checkpoints = Checkpoints(tmp_path / "recovery", every=5)

    def die(step):
        if step.step == 8:
            raise SystemExit

    with pytest.raises(SystemExit):
        run(folder, teacher, "lora", checkpoints=checkpoints, on_step=die)
    seen = []
    resumed = run(folder, teacher, "lora", checkpoints=checkpoints, on_step=lambda s: seen.append(s.step))
    whole = run(folder, teacher, "lora")
    assert seen[0] == 6 and all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_interrupt_amid_an_update_waits_for_its_end(folder, teacher, tmp_path, monkeypatch, kind):
    checkpoints, lines, update = Checkpoints(tmp_path / "recovery"), [], torch.optim.AdamW.step

    def amid(adam, *args):
        update(adam, *args)
        if len(lines) == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch.optim.AdamW, "step", amid)
        run(folder, teacher, kind, checkpoints=checkpoints, on_step=lines.append)
    assert len(lines) == 5
    resumed = run(folder, teacher, kind, checkpoints=checkpoints, on_step=lines.append)
    whole = run(folder, teacher, kind)
    assert [step.step for step in lines] == list(range(1, STEPS + 1))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_checkpoint_of_other_settings_is_refused(folder, teacher, tmp_path):
    checkpoints = Checkpoints(tmp_path / "recovery", every=5)
    with pytest.raises(KeyboardInterrupt):
        run(folder, teacher, "lora", checkpoints=checkpoints, on_step=interrupt_at(3))
    with pytest.raises(InputError, match="other settings"):
        run(folder, teacher, "lora", replace(SETTINGS["lora"], lr=1.0), checkpoints=checkpoints)


def test_a_loss_that_is_not_finite_stops_recovery_in_one_line(folder, teacher):
    with pytest.raises(InputError, match=r"NaN or infinite at step \d+"):
        run(folder, teacher, "full", replace(SETTINGS["full"], lr=1e30))


def test_lora_without_peft_says_what_to_install(folder, teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'secateur\[recover\]'"):
        run(folder, teacher, "lora")


# --- as a stage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_prune_recovers_after_verification_and_says_so(dense, text, tmp_path, capsys, kind):
    out = tmp_path / "run"
    assert secateur(*prune_arguments(dense, text, out, recover=kind, recover_lr=1e-2, recover_steps=4)) == 0
    assert updates_of(out / "model") == [f"recover-{kind}"]
    assert json.loads((out / "verify.json").read_text())["passed"]
    steps = [json.loads(line) for line in (out / "recover.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2, 3, 4] and not (out / "recovery").exists()
    card = (out / "model" / "README.md").read_text()
    assert "nothing was fine-tuned" not in card and "dense model as teacher" in card and "4 steps" in card
    assert json.loads((out / "eval.json").read_text())["updates"] == [f"recover-{kind}"]
    said = complaint(capsys, "verify", out)
    assert f"recover-{kind}" in said and "secateur export" in said
    assert secateur("export", out) == 0 and updates_of(out / "model") == []
    assert secateur("verify", out) == 0


@pytest.mark.parametrize(
    ("settings", "method", "steps"),
    [
        ({}, "deterministic", 8),
        ({"recover": "lora"}, "sensitivity", 16),
        ({"recover": "full", "recover_steps": 5}, "sensitivity", 5),
        ({"recover": "lora", "method": "deterministic"}, "deterministic", 8),
        ({"recover": "lora", "method": "magnitude"}, "magnitude", 16),
        ({"recover": "lora", "gates": Path("gates.safetensors")}, "deterministic", 8),
        ({"recover": "lora", "sparsity": None, "sweep": "0.2,0.4"}, "deterministic", 8),
        ({"recover": "lora", "recipe": "paper"}, "deterministic", 8),
        ({"recover": "lora", "guard": ("code:0.1",)}, "deterministic", 8),
    ],
)
def test_gates_are_not_learned_first_where_weights_are_to_be_trained(settings, method, steps):
    config = Config("m", **({"sparsity": 0.3, "steps": 8} | settings))
    assert (config.method, config.recovery_steps) == (method, steps)
    assert replace(Config("m", 0.3), recover="lora").method == "deterministic"  # as it was learned, it is recovered


def test_recovery_takes_the_time_of_learning_too_where_nothing_was_learned(dense, text, tmp_path, capsys):
    out = tmp_path / "run"
    assert secateur(*prune_arguments(dense, text, out, recover="full")) == 0
    assert len((out / "recover.jsonl").read_text().splitlines()) == 16 and not (out / "metrics.jsonl").exists()
    said = capsys.readouterr().out
    assert "scoring units by sensitivity" in said and "learning gates" not in said and "step 16/16" in said
    config = (out / "config.yaml").read_text()
    assert "method: sensitivity\n" in config and "recover_steps: null\n" in config
    card = (out / "model" / "README.md").read_text()
    assert "by sensitivity" in card and "a baseline" not in card and "16 steps" in card
    asked = prune_arguments(dense, text, tmp_path / "learned", recover="full", lr=0.1)
    assert "--method deterministic" in (said := complaint(capsys, *asked)) and "--lr is a setting of learning" in said
    assert secateur(*asked, "--method", "deterministic") == 0
    assert len((tmp_path / "learned" / "recover.jsonl").read_text().splitlines()) == 8


def test_what_a_killed_process_left_of_a_recovery_that_is_done_is_known_as_such(dense, text, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "discard", lambda _self: None)
        assert secateur(*prune_arguments(dense, text, out, recover="full")) == 0
    weights = (out / "model/model.safetensors").read_bytes()
    assert (out / "recovery").exists()
    assert secateur("recover", out) == 0
    assert (out / "model/model.safetensors").read_bytes() == weights and not (out / "recovery").exists()


def test_recover_reruns_alone_with_its_own_options(run, capsys):
    before = load_file(run / "model" / "model.safetensors")
    assert "--recover lora" in complaint(capsys, "recover", run)
    assert secateur("recover", run, "--recover", "lora", "--recover-steps", "11", "--recover-rank", "2") == 0
    assert len((run / "recover.jsonl").read_text().splitlines()) == 11  # more than the 8 that gates were learned in
    after = load_file(run / "model" / "model.safetensors")
    assert before.keys() == after.keys() and not (run / "eval.json").exists()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("_proj" in name for name in changed)
    assert secateur("eval", run) == 0
    assert "(11 steps on the calibration tokens)" in (run / "model" / "README.md").read_text()
    assert secateur("recover", run, "--recover", "full", "--recover-steps", "3") == 0
    card = (run / "model" / "README.md").read_text()
    assert "(11 steps on the calibration tokens), and merged, then" in card
    assert "(3 steps on the calibration tokens)" in card


def test_what_was_trained_before_it_was_pruned_again_is_no_update_of_the_new_export(run, text, tmp_path):
    assert secateur("recover", run, "--recover", "full", "--recover-steps", "2") == 0
    arguments = prune_arguments(run / "model", text, tmp_path / "again", sparsity=0.2)
    assert secateur(*arguments, "--trust-remote-code") == 0
    own = json.loads((tmp_path / "again" / "model" / "config.json").read_text())["secateur"]
    assert "updates" not in own and "recovery_steps" not in own
    assert json.loads((tmp_path / "again" / "verify.json").read_text())["passed"]


def test_a_new_export_is_not_recovered_from_the_state_of_an_earlier_one(run, monkeypatch):
    from secateur import stages

    original = stages.recover
    with monkeypatch.context() as patched:
        patched.setattr(
            stages, "recover", lambda *a, on_step, **k: original(*a, on_step=_both(on_step, interrupt_at(2)), **k)
        )
        assert secateur("recover", run, "--recover", "lora") == 130
    assert (run / "recovery").exists()
    assert secateur("export", run) == 0
    assert not (run / "recovery").exists()


def test_an_interrupted_run_resumes_within_recovery(dense, text, tmp_path, monkeypatch):
    from secateur import stages

    out, whole = tmp_path / "run", tmp_path / "whole"
    options = {"recover": "lora", "recover_lr": 1e-2}
    assert secateur(*prune_arguments(dense, text, whole, **options)) == 0
    with monkeypatch.context() as patched:
        original = stages.recover
        patched.setattr(
            stages, "recover", lambda *a, on_step, **k: original(*a, on_step=_both(on_step, interrupt_at(5)), **k)
        )
        assert secateur(*prune_arguments(dense, text, out, **options)) == 130
    assert secateur("prune", "--resume", out) == 0
    for name in ("model/model.safetensors", "recover.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def _both(first, second):
    def on_step(step):
        first(step)
        second(step)

    return on_step


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"recover_steps": 0}, "--recover-steps"),
        ({"recover_lr": 0}, "--recover-lr"),
        ({"recover_rank": 0}, "--recover-rank"),
    ],
)
def test_settings_out_of_range_are_named(dense, text, tmp_path, capsys, options, named):
    arguments = prune_arguments(dense, text, tmp_path / "run", recover="lora", **options)
    assert named in complaint(capsys, *arguments)
