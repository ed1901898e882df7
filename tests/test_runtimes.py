"""Other runtimes write what transformers writes, or part where two tokens are worth the same; else it is said."""

import json
import math
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from runs import complaint, secateur
from secateur import gguf_file
from secateur.describe import describe
from secateur.equivalence import tolerance, within
from secateur.export import export
from secateur.runtimes import Agreement, Continuation, compare, hf
from tiny import load, random_plan, tiny, tokens

llamacpp = pytest.importorskip("secateur.runtimes.llamacpp")

PROMPT = [5, 6, 7]


# --- the comparison --------------------------------------------------------------------------------------------------


def test_equal_texts_agree_as_far_as_their_log_probabilities_do():
    one = Continuation(PROMPT, [1, 2], [-0.5, -0.25], [1.0, 2.0])
    (found,) = compare([one], [Continuation(PROMPT, [1, 2], [-0.5, -0.375])])
    assert found == Agreement(True, 2, 0.125)


def test_where_texts_part_the_margin_of_the_reference_counts_and_nothing_behind_it():
    one = Continuation(PROMPT, [1, 2, 3], [-0.5, -0.25, -9.0], [1.0, 0.125, 3.0])
    (found,) = compare([one], [Continuation(PROMPT, [1, 4, 3], [-0.75, -0.5, -1.0])])
    assert found == Agreement(False, 1, 0.25, (2, 4), (-0.25, -0.5), 0.125)


def test_texts_of_other_prompts_or_lengths_are_not_compared():
    one = Continuation(PROMPT, [1], [-0.5], [1.0])
    for other in (Continuation([5], [1], [-0.5]), Continuation(PROMPT, [], [])):
        with pytest.raises(AssertionError):
            compare([one], [other])


def test_what_is_put_down_to_rounding_follows_the_unpruned_model_within_bounds():
    assert tolerance([Agreement(True, 2, 1e-3), Agreement(True, 2, 2e-3)]) == pytest.approx(0.016)
    assert tolerance([Agreement(True, 2, 0.0)]) == pytest.approx(8e-4)
    assert tolerance([Agreement(True, 2, 3.0)]) == pytest.approx(0.08)


def test_near_ties_pass_and_clear_choices_and_what_is_not_a_number_do_not():
    assert within(Agreement(False, 1, 0.001, (1, 2), (-1.0, -1.0), 0.009), 0.01)
    assert not within(Agreement(False, 1, 0.001, (1, 2), (-1.0, -1.0), 0.02), 0.01)
    assert not within(Agreement(True, 2, 0.02), 0.01)
    assert not within(Agreement(True, 2, math.nan), 0.01)
    assert not within(compare([Continuation(PROMPT, [1, 1], [-1.0, math.nan], [1.0, 1.0])] * 1,
                              [Continuation(PROMPT, [1, 1], [-1.0, -1.0])])[0], 0.01)  # fmt: skip


# --- the runtimes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf", "llamacpp"])
def test_a_runtime_writes_the_most_likely_tokens_past_ends_of_text(name, tmp_path):
    model = tiny("llama")
    model.lm_head.weight.data[2] *= 4  # EOS: the most likely here and there
    description = describe(model)
    export(model, None, description, random_plan(description, close=("layers.1.kv_groups",)), tmp_path / "model")
    prompts = [row.tolist() for row in tokens(batch=4, length=7)]
    runtime = {"hf": hf, "llamacpp": llamacpp}[name]
    written = runtime.greedy(tmp_path / "model", prompts, 12)
    assert any(2 in c.tokens[:-1] for c in written)
    loaded = load(tmp_path / "model")
    for continuation, prompt in zip(written, prompts, strict=True):
        assert continuation.prompt == prompt and len(continuation.tokens) == len(continuation.logprobs) == 12
        whole = torch.tensor([prompt + continuation.tokens])
        logprobs_TV = loaded(whole).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        best_T2 = logprobs_TV.topk(2)
        assert best_T2.indices[:, 0].tolist() == continuation.tokens
        torch.testing.assert_close(torch.tensor(continuation.logprobs), best_T2.values[:, 0], rtol=0, atol=2e-5)
        if name == "hf":
            margins = best_T2.values[:, 0] - best_T2.values[:, 1]
            torch.testing.assert_close(torch.tensor(continuation.margins), margins, rtol=0, atol=2e-5)


def test_a_runtime_leaves_nothing_behind_and_says_its_version(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    llamacpp.greedy(tmp_path / "model", [PROMPT], 2)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert "xllamacpp 20" in llamacpp.version() and hf.version().startswith("transformers 5")


# --- the command -----------------------------------------------------------------------------------------------------

COMMAND = ("--runtime", "llamacpp", "--prompts", 2, "--new-tokens", 6)


def test_a_run_is_compared_in_llamacpp_with_the_unpruned_model_beside_it(run, capsys):
    before = (run / "verify.json").read_text()
    assert secateur("verify", run, *COMMAND) == 0
    said = capsys.readouterr().out
    assert "dense" in said and "pruned" in said and "near-ties" in said
    found = json.loads((run / "verify-llamacpp.json").read_text())
    assert found["passed"] and found["new_tokens"] == 6 and found["updates"] == []
    assert len(found["pruned"]) == len(found["dense"]) == 2
    assert all(a["equal"] and a["same"] == 6 and a["difference"] < 1e-4 for a in found["pruned"] + found["dense"])
    assert found["pruned"] != found["dense"]
    assert (run / "verify.json").read_text() == before
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"model"}


def test_weights_that_were_refitted_are_compared_too(run):
    assert secateur("refit", run) == 0
    assert secateur("verify", run, *COMMAND) == 0
    assert json.loads((run / "verify-llamacpp.json").read_text())["updates"] == ["refit"]


@pytest.mark.parametrize("which", ["pruned", "unpruned"])
def test_a_runtime_that_computes_something_else_of_a_model_fails_with_code_1(which, run, monkeypatch, capsys):
    write = gguf_file.write_gguf

    def wrong(checkpoint, out, *arguments, **options):
        if (checkpoint == run / "model") == (which == "pruned"):
            checkpoint = shutil.copytree(checkpoint, out.parent / "wrong")
            weights = load_file(checkpoint / "model.safetensors")
            weights["model.layers.0.mlp.down_proj.weight"][:, 0] += 1
            save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
        return write(checkpoint, out, *arguments, **options)

    monkeypatch.setattr(llamacpp, "write_gguf", wrong)
    assert f"computes of the {which} model" in complaint(capsys, "verify", run, *COMMAND, code=1)
    assert json.loads((run / "verify-llamacpp.json").read_text())["passed"] is False
    assert (run / "model").is_dir()


def test_a_runtime_that_computes_something_else_of_every_model_fails_too(run, monkeypatch, capsys):
    monkeypatch.setattr(gguf_file, "INTERLEAVED", ())
    assert "computes of the unpruned model" in complaint(capsys, "verify", run, *COMMAND, code=1)


def test_a_runtime_that_is_not_installed_is_named_with_what_installs_it(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.delitem(sys.modules, "secateur.runtimes.llamacpp")
    said = complaint(capsys, "verify", run, *COMMAND)
    assert "xllamacpp" in said and "pip install 'secateur[llamacpp]'" in said


def test_bad_input_is_one_line(run, capsys):
    assert "--prompts must be at least 1" in complaint(capsys, "verify", run, "--runtime", "llamacpp", "--prompts", 0)
    assert "--new-tokens must be" in complaint(capsys, "verify", run, "--runtime", "llamacpp", "--new-tokens", 0)
    (run / "model").rename(run / "model-failed-verification")
    assert "failed verification" in complaint(capsys, "verify", run, *COMMAND)


def test_the_usual_verification_is_as_it_was(run, capsys):
    assert secateur("verify", run) == 0
    assert "logits differ by at most" in capsys.readouterr().out
    assert not list(run.glob("verify-*.json"))
