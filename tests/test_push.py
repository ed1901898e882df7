"""A run onto the Hub: what is sent is what is there, the Hub can read the card, and nothing private goes along."""

import json
import shutil
from html import escape

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import hub as fake
from runs import complaint, gates_of, prune_arguments, secateur
from secateur.push import check_finished, contents
from secateur.run import open_run

ITEMS = [{"query": f"w{i} w{i + 1}", "choices": [f" w{i}", f" w{i + 2}"], "gold": i % 2} for i in range(10)]


@pytest.fixture(scope="module")
def finished(base):
    items = base / "secret-place" / "items.jsonl"
    items.parent.mkdir()
    items.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    shutil.copyfile(base / "text.jsonl", base / "secret-place" / "other.jsonl")
    arguments = prune_arguments(
        base / "dense", base / "text.jsonl", base / "run", tasks=items, guard=f"{base}/secret-place/other.jsonl:5"
    )
    assert secateur(*arguments) == 0
    return base / "run"


@pytest.fixture
def hub(monkeypatch):
    with fake.running_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", fake.TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        _http.close_session()
        yield running
        _http.close_session()


def received(hub, name="me/small", branch="main"):
    return hub.repos[name][branch]


def test_what_is_received_is_what_is_there(capsys, hub, finished):
    assert secateur("push", finished, "--repo", "me/small") == 0
    said = capsys.readouterr().out
    assert f"pushed to {hub.url}/me/small" in said and "model.safetensors" in said
    got = received(hub)
    for path in (finished / "model").iterdir():
        if path.name != "README.md":
            assert got[path.name] == path.read_bytes(), path.name
    assert got["secateur/plan.json"] == (finished / "plan.json").read_bytes()
    assert set(got) == {p.name for p in (finished / "model").iterdir()} | {
        f"secateur/{name}" for name in ("config.yaml", "gates.safetensors", "plan.json")
    }
    assert hub.private == {"me/small": False}
    assert [method for method, path in hub.requests if path == "/api/models/me/small/commit/main"] == ["POST"]


def test_what_was_received_loads_and_its_gates_are_those_of_the_run(hub, finished, tmp_path):
    secateur("push", finished, "--repo", "me/small")
    for path, content in received(hub).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert gates_of(tmp_path / "secateur").keys() == gates_of(finished).keys()
    out = tmp_path / "again"
    data = ["--data", finished.parent / "text.jsonl", "--gates", tmp_path / "secateur/gates.safetensors"]
    assert secateur("prune", finished.parent / "dense", "--sparsity", 0.3, "--steps", 0, *data, "--seq-len", 16,
                    "--held-out-tokens", 64, "--out", out) == 0  # fmt: skip
    assert (out / "model/model.safetensors").read_bytes() == (finished / "model/model.safetensors").read_bytes()


def test_the_card_has_the_figures_as_the_hub_reads_them(hub, finished):
    secateur("push", finished, "--repo", "me/small")
    text = received(hub)["README.md"].decode()
    card, results = ModelCard(text), json.loads((finished / "eval.json").read_text())
    assert ("POST", "/api/validate-yaml") in hub.requests and fake.metadata_errors(text) == []
    assert card.data.model_name == "small" and card.data.tags == ["pruned", "secateur"]
    first, *others = card.data.eval_results
    assert (first.metric_type, first.metric_value) == ("perplexity", results["pruned"]["perplexity"])
    assert first.metric_args["dense"] == results["dense"]["perplexity"] and first.metric_args["stderr"] > 0
    assert (first.dataset_type, first.dataset_name) == (
        "held-out-part-of-text.jsonl",
        "held-out part of text.jsonl",
    )
    task = results["tasks"]["items"]
    assert {r.metric_name for r in others} == {"acc", "acc_norm"} and len(others) == 2
    for r in others:
        assert (r.metric_type, r.dataset_name) == ("accuracy", "items")
        assert r.metric_value == task["pruned"][r.metric_name]
        assert r.metric_args["stderr"] == task["pruned"][f"{r.metric_name}_stderr"] > 0
        assert r.metric_args["items"] == 10
    assert 'from_pretrained("me/small", trust_remote_code=True)' in text and "| perplexity |" in text
    assert (finished / "model/README.md").read_text().count("model-index") == 0


def test_figures_name_their_dataset_on_the_hub(finished):
    from secateur.push import eval_results

    results = json.loads((finished / "eval.json").read_text())
    results["text"] = "Salesforce/wikitext:wikitext-2-raw-v1:test"
    results["tasks"]["items"]["dataset"] = {"path": "allenai/ai2_arc", "config": "ARC-Easy", "split": "test"}
    first, other, *_ = eval_results(results)
    said = first.dataset_type, first.dataset_config, first.dataset_split
    assert said == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    assert (other.dataset_type, other.dataset_config, other.dataset_split) == ("allenai/ai2_arc", "ARC-Easy", "test")


def test_no_local_path_goes_along(hub, finished, base):
    secateur("push", finished, "--repo", "me/small", "--with-report")
    got = received(hub)
    for path, content in got.items():
        for private in (str(base), "secret-place", escape(str(base))):
            assert private.encode() not in content, (path, private)
    settings = yaml.safe_load(got["secateur/config.yaml"])
    assert (settings["model"], settings["data"], settings["tasks"]) == ("dense", "text.jsonl", ["items.jsonl"])
    assert settings["guard"] == ["other.jsonl:5"] and settings["sparsity"] == 0.3
    assert b"secret-place" in (finished / "config.yaml").read_bytes()
    with safe_open(finished / "gates.safetensors", framework="pt") as file:
        assert "secret-place" in file.metadata()["secateur"]


def test_private_repositories_branches_and_a_second_push(capsys, hub, run):
    assert secateur("push", run, "--repo", "org/tiny", "--private", "--revision", "v1") == 0
    assert hub.private == {"org/tiny": True} and received(hub, "org/tiny") == {}
    got = received(hub, "org/tiny", "v1")
    got["model-00001-of-00002.safetensors"] = got["extra.py"] = b"of an earlier export"
    got["notes.txt"] = got["secateur/old.safetensors"] = b"of the owner"
    assert secateur("export", run, "--shape", "uniform") == secateur("verify", run) == secateur("eval", run) == 0
    assert secateur("push", run, "--repo", "org/tiny", "--revision", "v1") == 0
    assert got["model.safetensors"] == (run / "model/model.safetensors").read_bytes()
    assert not {"model-00001-of-00002.safetensors", "extra.py", "modeling_pruned.py"} & set(got)
    assert {"notes.txt", "secateur/old.safetensors"} <= set(got)


def test_a_dry_run_lists_and_sends_nothing(capsys, hub, finished, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert secateur("push", finished, "--repo", "me/small", "--dry-run") == 0
    said = capsys.readouterr().out
    for path, content in contents(open_run(finished), "me/small").items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        line = next(line for line in said.splitlines() if line.startswith(f"{path} "))
        assert line.endswith("B") and (size >= 1000 or f" {size} B" in line)
    assert "nothing was sent" in said and hub.requests == []


# --- what is not sent ------------------------------------------------------------------------------------------------


def break_verification(run):
    said = json.loads((run / "verify.json").read_text())
    (run / "verify.json").write_text(json.dumps(said | {"passed": False}))


def plan_anew(run):
    assert secateur("plan", run, "--shape", "uniform") == 0


def ask_for_recovery(run):
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("recover: null", "recover: lora"))


UNFINISHED = {
    "no export": (lambda run: shutil.rmtree(run / "model"), "model is missing; run `secateur export"),
    "set aside": (lambda run: (run / "model").rename(run / "model-failed-verification"), "failed verification"),
    "not verified": (lambda run: (run / "verify.json").unlink(), "is not verified; run `secateur verify"),
    "not passed": (break_verification, "failed verification (see"),
    "not evaluated": (
        lambda run: (run / "eval.json").unlink(),
        "stopped half-way, it has no eval.json yet; go on with",
    ),
    "learned anew": (lambda run: (run / "plan.json").unlink(), "stopped half-way, it has no plan.json yet"),
    "planned anew": (plan_anew, "plan.json is newer than"),
    "not recovered": (ask_for_recovery, "stopped half-way, before recover-lora; go on with"),
}


@pytest.mark.parametrize("state", UNFINISHED)
def test_runs_that_are_not_finished_are_refused(capsys, hub, run, state):
    spoil, said = UNFINISHED[state]
    check_finished(open_run(run))
    spoil(run)
    assert said in complaint(capsys, "push", run, "--repo", "me/small")
    assert hub.requests == []


def test_bad_input_is_one_line(capsys, hub, finished, monkeypatch):
    def said(repo="me/small", *more):
        return complaint(capsys, "push", finished, "--repo", repo, *more)

    assert "is no name of a repository" in said("a/b/c") and "is no name of a repository" in said("me/sm all")
    assert hub.requests == []
    for status, expected in ((403, "may not write there"), (404, "no such repository"), (500, "(500)")):
        hub.status = status
        assert expected in said()
    hub.status = None
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the token is not valid; run `hf auth login`" in said()
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    assert "no token for the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN" in said()
    assert hub.repos == {}


def test_without_a_network_one_line_says_so(capsys, hub, finished, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said = complaint(capsys, "push", finished, "--repo", "me/small")
    assert "cannot push to me/small at http://127.0.0.1:9" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "cannot push to me/small" in complaint(capsys, "push", finished, "--repo", "me/small")


def test_a_report_that_is_not_there_is_said(capsys, hub, run):
    (run / "report.html").unlink()
    assert "report.html is missing" in complaint(capsys, "push", run, "--repo", "me/small", "--with-report")
