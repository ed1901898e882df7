"""`--guard`: the loss of another text stays within its bound while gates are learned on the calibration text."""

import json
import math
import random

import pytest
import torch

from runs import complaint, described, prune_arguments, random_tokens, same_gates, secateur, small_llama
from secateur.attach import attached
from secateur.checkpoints import Checkpoints
from secateur.data import Blocks, fingerprint
from secateur.files import InputError
from secateur.gates import by_group
from secateur.guard import MOST, RANGE_IN, Guard, Multipliers, read_guards
from secateur.learn import learn
from secateur.recipes import auto_recipe

STEPS = 20


@pytest.fixture(scope="module")
def model():
    return small_llama()


def learned(model, guarded=None, **options):
    description, limits = described(model, 0.4, "model")
    return learn(
        model, description.groups, random_tokens(2 * STEPS, 12), random_tokens(2, 12, seed=9), limits,
        auto_recipe(STEPS), steps=STEPS, batch_size=2, guarded=guarded, **options,
    )  # fmt: skip


def blocks(rows_NT):
    return Blocks(rows_NT, random_tokens(2, 12, seed=8), {"fingerprint": fingerprint(rows_NT)})


def guard_rows(seed=3):
    return blocks(random_tokens(2 * STEPS, 12, seed=seed))


# --- words -----------------------------------------------------------------------------------------------------------


def test_a_word_is_a_text_and_a_tolerance_in_nats_also_where_the_text_has_colons():
    assert read_guards(["code/:0.1", "name:config:train:2"]) == (Guard("code/", 0.1), Guard("name:config:train", 2.0))


@pytest.mark.parametrize("word", ["code/", "code/:", ":0.1", "code/:0", "code/:-1", "code/:nan", "code/:inf", "0.1"])
def test_a_word_without_text_or_tolerance_is_refused(word):
    with pytest.raises(InputError, match="say a text and by how many nats a token its loss may rise"):
        read_guards([word])


def test_a_guard_is_a_text_of_its_own_and_named_once():
    with pytest.raises(InputError, match="a text of its own"):
        read_guards(["self:0.1"])
    with pytest.raises(InputError, match="name code/ once"):
        read_guards(["code/:0.1", "code/:0.2"])


# --- multipliers -----------------------------------------------------------------------------------------------------


def test_a_multiplier_rises_while_its_bound_is_missed_and_falls_while_it_is_held():
    multipliers = Multipliers((Guard("a", 0.1), Guard("b", 0.1)), steps=100)
    for _ in range(int(RANGE_IN * 100)):
        multipliers.hear([0.3, -0.2])
    assert multipliers.weights == pytest.approx([MOST, 1 / MOST])
    multipliers.hear([5.0, -5.0])
    assert (multipliers.weights[0], multipliers.weights[1]) == (MOST, 1 / MOST)


def test_a_multiplier_rests_where_the_bound_is_just_met():
    multipliers = Multipliers((Guard("a", 0.1),), steps=100)
    multipliers.hear([0.1])
    assert multipliers.weights == [1.0]


def test_what_held_out_rows_say_beyond_the_batches_counts_from_then_on():
    multipliers = Multipliers((Guard("a", 0.1),), steps=100)
    multipliers.hear([0.05])
    assert multipliers.weights[0] < 1.0
    multipliers.look([0.3])
    before = multipliers.weights[0]
    multipliers.hear([0.05])  # and so 0.3 where it counts
    assert multipliers.weights[0] > before
    again = Multipliers((Guard("a", 0.1),), steps=100)
    again.restore(multipliers.state())
    assert again == multipliers


def test_held_out_rows_are_looked_at_five_times_a_run_and_never_without_guards():
    assert sum(Multipliers((Guard("a", 0.1),), steps=50).looks_after(step) for step in range(1, 51)) == 5
    assert not any(Multipliers((), steps=50).looks_after(step) for step in range(1, 51))


# --- learning --------------------------------------------------------------------------------------------------------


def test_every_step_says_how_each_guard_stands(model):
    steps = []
    learned(model, {Guard("a", 0.1): guard_rows(), Guard("b", 9.0): guard_rows(4)}, on_step=steps.append)
    assert all(len(step.guard_rises) == len(step.guard_weights) == 2 for step in steps)
    assert steps[0].guard_weights == [1.0, 1.0]
    assert steps[-1].guard_weights[1] < 1.0  # 9 nats are never reached
    assert all(map(math.isfinite, steps[-1].guard_rises))


def test_without_guards_nothing_is_said_of_them(model):
    steps = []
    learned(model, on_step=steps.append)
    assert steps[0].guard_rises is None and steps[0].guard_weights is None


def test_a_rise_is_the_gated_loss_of_the_batch_above_the_dense_models(model):
    steps, rows_NT = [], random_tokens(2 * STEPS, 12)  # the calibration's own, whose gated loss is in the step
    learned(model, {Guard("other", 0.1): guard_rows(), Guard("same", 0.1): blocks(rows_NT)}, on_step=steps.append)
    with torch.no_grad():
        logits_BTV = model(rows_NT[:2]).logits
    dense = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), rows_NT[:2, 1:].flatten()).item()
    other, same = steps[0].guard_rises
    assert same == pytest.approx(steps[0].ce - dense, abs=1e-6)
    assert abs(other - same) > 1e-4


def test_a_guard_changes_what_is_kept_and_helps_its_text(model):
    """Two texts of different words; the model's own distributions are what is to be kept of each."""
    description, _ = described(model, 0.4, "model")
    half = model.config.vocab_size // 2
    texts = {part: random_tokens(2 * STEPS, 12, seed=part) % half + part * half for part in (0, 1)}

    def divergence(gates_of, rows_NT):
        with torch.no_grad():
            dense = model(rows_NT).logits.log_softmax(-1)
            with attached(model, description.groups, by_group(gates_of.value_N, description.groups)):
                gated = model(rows_NT).logits.log_softmax(-1)
        return (dense.exp() * (dense - gated)).sum(-1).mean().item()

    def gates(guarded):
        description, limits = described(model, 0.4, "model")
        return learn(
            model, description.groups, texts[0], random_tokens(2, 12, seed=9), limits, auto_recipe(STEPS), steps=STEPS,
            batch_size=2, guarded=guarded,
        )  # fmt: skip

    free, kept = gates(None), gates({Guard("other", 1e-4): blocks(texts[1])})
    assert not torch.equal(free.z_N > 0, kept.z_N > 0)
    assert divergence(kept, texts[1]) < divergence(free, texts[1])


@pytest.mark.parametrize("step", [1, 7, STEPS - 1])
def test_an_interrupted_run_goes_on_to_the_same_gates_and_multipliers(model, tmp_path, step):
    guarded, checkpoints = {Guard("a", 0.05): guard_rows()}, Checkpoints(tmp_path / "checkpoints")

    def stop(at):
        if at.step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned(model, guarded, checkpoints=checkpoints, on_step=stop)
    resumed, whole = [], []
    gates = learned(model, guarded, checkpoints=checkpoints, on_step=resumed.append)
    assert torch.equal(gates.z_N, learned(model, guarded, on_step=whole.append).z_N)
    assert resumed[-1] == whole[-1]


def test_a_checkpoint_of_another_guard_is_refused(model, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(KeyboardInterrupt):
        learned(model, {Guard("a", 0.05): guard_rows()}, checkpoints=checkpoints, on_step=interrupted)
    with pytest.raises(InputError, match="other settings"):
        learned(model, {Guard("a", 0.06): guard_rows()}, checkpoints=checkpoints)
    with pytest.raises(InputError, match="other settings"):
        learned(model, {Guard("a", 0.05): guard_rows(4)}, checkpoints=checkpoints)


def interrupted(_step):
    raise KeyboardInterrupt


# --- whole runs ------------------------------------------------------------------------------------------------------


def guarded(dense, text, run, *words, **options):
    return [*prune_arguments(dense, text, run, **options), "--guard", *words]


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("\n\n".join(f"{n} plus {n} makes {2 * n}, said the {n}th clerk." for n in range(400)))
    return path


def test_a_run_says_of_each_guard_whether_it_was_held(dense, text, other, tmp_path, capsys):
    run = tmp_path / "run"
    assert secateur(*guarded(dense, text, run, f"{other}:9", f"{text}:1e-9")) == 0
    said = " ".join(capsys.readouterr().out.split())
    held, missed = json.loads((run / "eval.json").read_text())["guards"]
    assert (held["held"], missed["held"]) == (True, missed["pruned"] - missed["dense"] <= 1e-9)
    assert "loss of other.txt, at most +9" in said
    assert ("--guard allows 1e-09" in said) == (not missed["held"])
    card = (run / "model" / "README.md").read_text()
    assert f"{held['pruned']:.3f}" in card


def test_text_that_a_guard_has_seen_is_shared_with_the_evaluation(dense, text, tmp_path, capsys):
    known, draw = tmp_path / "known.txt", random.Random(5)  # of words that the tokenizer has
    known.write_text("\n\n".join(" ".join(f"w{draw.randrange(1, 50)}" for _ in range(60)) for _ in range(40)))
    for name, word in (("run", f"{text}:9"), ("seen", f"{known}:9")):
        options = ("--eval-data", known, "--eval-length", "16", "--eval-windows", "0")
        assert secateur(*guarded(dense, text, tmp_path / name, word), *options) == 0
        shared = json.loads((tmp_path / name / "eval.json").read_text())["overlap"]["text"]["runs"]
        said = " ".join(capsys.readouterr().out.split())
        assert (shared > 0) == (f"share {shared} runs of 13 words" in said) == (name == "seen")


def test_a_resumed_run_keeps_the_guards_tokens_whatever_became_of_the_text(dense, text, other, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert secateur(*guarded(dense, text, whole, f"{other}:0.1")) == 0
    assert secateur(*guarded(dense, text, run, f"{other}:0.1")) == 0
    for name in ("gates.safetensors", "plan.json", "verify.json", "eval.json"):
        (run / name).unlink()
    other.write_text("Other words now. " * 2000)
    assert secateur("prune", "--resume", str(run)) == 0
    assert same_gates(run, whole)


def test_a_guard_in_another_encoding_is_refused_before_learning(dense, text, tmp_path, capsys):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Grüße aus Köln. ".encode("latin-1") * 500)
    said = complaint(capsys, *guarded(dense, text, tmp_path / "run", f"{latin}:0.1"))
    assert f"{latin} is not UTF-8 text; convert it, for instance with iconv" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_guard_that_is_not_there_or_too_short_is_named(dense, text, tmp_path, capsys):
    assert "none.txt" in complaint(capsys, *guarded(dense, text, tmp_path / "run", f"{tmp_path / 'none.txt'}:0.1"))
    short = tmp_path / "short.txt"
    short.write_text("A word or two.")
    assert "short.txt is too short" in complaint(capsys, *guarded(dense, text, tmp_path / "run", f"{short}:0.1"))


def test_methods_that_learn_nothing_take_no_guard(dense, text, other, tmp_path, capsys):
    said = complaint(capsys, *guarded(dense, text, tmp_path / "run", f"{other}:0.1", method="magnitude"))
    assert "--guard is a setting of learning, and --method magnitude learns nothing" in said
    recovered = prune_arguments(dense, text, tmp_path / "run", method="magnitude", recover="full", kd_weight=0.5)
    assert secateur(*recovered, "--guard", f"{other}:0.5") == 0
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["guards"]
