"""The report says what the files of a run say, says what they lack, and takes no name or text for anything but text."""

import json
import re
import shutil
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from made_runs import evaluation, make_run
from runs import complaint, leftovers, secateur
from secateur.report.page import write_report
from secateur.report.reading import read_runs

HOSTILE = "<img src=x onerror=alert(1)>\"'&{{7*7}}$\\frac{</script><svg onload=alert(2)>"
VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """What a page holds: elements with their attributes, text by element, ids, and whether tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def page_of(*folders, out=None):
    return Page(write_report(folders, out).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made") / "run")


# --- a finished run --------------------------------------------------------------------------------------------------


def test_prune_ends_with_a_report_of_the_figures_that_it_measured(finished):
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    figures = json.loads((finished / "eval.json").read_text())
    assert f"{figures['pruned']['perplexity'] / figures['dense']['perplexity']:.2f} ×" in page.words
    assert "Text side by side" in page.words and all(s["prompt"] in page.words for s in figures["samples"])
    assert "torch" in page.words and not leftovers(finished)
    drawn = {attrs["id"] for attrs in page.all("figure")}
    assert {
        "loss",
        "sparsity",
        "lambda1",
        "lambda2",
        "lambda3",
        "mu",
        "widths",
        "map-0-heads",
        "map-0-channels",
        "gates-0",
    } <= drawn


def test_every_section_of_a_finished_run_is_there(made):
    page = page_of(made)
    for words in ("Parameters", "Perplexity", "as fast", "Verification", "Zero-shot", "greedy text in vLLM",
                  "learning.kd_weight", "2a6afe85eabc6356", "Nothing to warn of", "100 degrees, the heat"):  # fmt: skip
        assert words in page.words, words
    assert {"tasks-0", "bench-0-0"} <= {attrs["id"] for attrs in page.all("figure")}


def test_it_stands_alone_and_runs_no_script_but_its_own(made):
    text = write_report([made]).read_text(encoding="utf-8")
    page = Page(text)
    links = [
        value for _, attrs in page.elements for name, value in attrs.items() if name in ("src", "href", "xlink:href")
    ]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"@import|url\((?!#)", text)
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_ids_are_unique_and_what_is_referred_to_exists(made, tmp_path):
    page = page_of(made, make_run(tmp_path / "other", seed=1), out=tmp_path / "both.html")
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.elements:
        for name in ("aria-describedby", "aria-labelledby"):
            assert attrs.get(name, ids[0]) in ids
        for name, value in attrs.items():
            if name in ("href", "xlink:href") and value.startswith("#"):
                assert value[1:] in ids
            for target in re.findall(r"url\(#([^)]+)\)", value or ""):
                assert target in ids


def test_every_figure_has_words_and_a_table(made):
    text = write_report([made]).read_text(encoding="utf-8")
    figures = re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL)
    assert len(figures) >= 10
    for figure in figures:
        assert re.search(r'<svg[^>]+role="img" aria-label="[^"]+"', figure) and re.search(
            r"<desc[^>]*>[^<]{40,}", figure
        )
        assert "<caption>" in figure or "bench-" in figure  # whose table stands beside it


def test_figures_take_their_colours_from_the_page(made):
    text = write_report([made]).read_text(encoding="utf-8")
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    own = set(re.findall(r"(?:fill|stroke): (#\w+)", svgs))
    assert "var(--s0)" in svgs and "var(--ink-2)" in svgs
    assert not own and "DejaVu" not in svgs


def test_shares_kept_are_those_of_the_plan(made, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    plan = json.loads((run / "plan.json").read_text())
    for part in ("kept", "scales"):  # rounding closed a gate that was open as learned
        plan[part]["layers.1.channels"].pop()
    (run / "plan.json").write_text(json.dumps(plan))
    record, kept = read_runs([run])[0], plan["kept"]
    for units in record.groups:
        assert units.kept.nonzero()[0].tolist() == kept[f"layers.{units.layer}.{units.kind}"]


def test_experts_are_told_apart(tmp_path):
    page = page_of(make_run(tmp_path / "run", layers=3, experts=5, channels=16))
    assert "Layers × experts" in page.words and "4 of 5" in page.words and "experts keep no channel" not in page.words
    assert "One expert keeps no channel" in page.words


# --- several runs ----------------------------------------------------------------------------------------------------


def test_runs_stand_side_by_side_with_what_differs(made, tmp_path):
    other = make_run(tmp_path / "milder", sparsity=0.2, seed=1)
    page = page_of(made, other, out=tmp_path / "both.html")
    assert "Runs side by side" in page.words and "milder" in page.words
    rows = {attrs.get("data-same") for attrs in page.all("tr")}
    assert rows >= {"yes", "no"}
    assert {"widths-channels", "pareto-size-0", "pareto-vllm-0"} <= {attrs["id"] for attrs in page.all("figure")}
    assert len([attrs for attrs in page.all("input") if "data-show" in attrs]) == 2


def test_runs_of_one_name_are_told_apart_and_a_run_given_twice_counts_once(made, tmp_path):
    twin = make_run(tmp_path / "elsewhere" / "run")
    labels = [record.label for record in read_runs([made, twin, made])]
    assert labels == [f"{made.parent.name}/run", "elsewhere/run"]


def test_perplexities_of_other_texts_are_not_put_into_one_figure(made, tmp_path):
    other = make_run(tmp_path / "run2")
    values = json.loads((other / "eval.json").read_text()) | {"text": "another.txt"}
    (other / "eval.json").write_text(json.dumps(values))
    page = page_of(made, other, out=tmp_path / "both.html")
    assert {"pareto-size-0", "pareto-size-1"} <= {attrs["id"] for attrs in page.all("figure")}


def test_the_command_writes_where_it_is_told(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "b")
    assert secateur("report", made, tmp_path / "b") == 0 and (tmp_path / "report.html").is_file()
    assert secateur("report", "b", "--out", "pages/b.html") == 0 and (tmp_path / "pages/b.html").is_file()
    assert secateur("report", "b") == 0 and (tmp_path / "b/report.html").is_file()
    assert "wrote b/report.html" in capsys.readouterr().out


# --- what is missing or broken ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("until", "missing"),
    [("start", "learn, plan, export, verify, eval"), ("learn", "plan, export, verify, eval"),
     ("plan", "export, verify, eval"), ("verify", "eval")],
)  # fmt: skip
def test_a_run_that_stopped_half_way_says_so_and_what_to_run(tmp_path, until, missing):
    folder = make_run(tmp_path / "run", until=until)
    words = page_of(folder).words
    assert f"stopped before its end. Missing: {missing}." in words
    assert f"secateur prune --resume {folder}" in words and "secateur eval" in words


def test_learning_that_was_interrupted_says_how_far_it_came(tmp_path):
    folder = make_run(tmp_path / "run", until="learn")
    (folder / "gates.safetensors").unlink()
    words = page_of(folder).words
    assert "60 of 60 learning steps were done" in words and "No gates yet" in words


def test_a_folder_that_is_no_run_is_refused(capsys, made, tmp_path):
    assert str(tmp_path / "config.yaml") in complaint(capsys, "report", made, tmp_path)
    assert "nowhere is not a folder" in complaint(capsys, "report", "nowhere")
    assert "secateur report RUN" in complaint(capsys, "report")


def test_a_report_that_cannot_be_written_is_one_line(capsys, made, tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in complaint(capsys, "report", made, "--out", tmp_path / "file" / "report.html")


BROKEN = [
    ("eval.json", "{", "eval.json is not readable JSON"),
    ("eval.json", "[]", "eval.json: content: "),
    ("eval.json", '{"dense": {}}', "eval.json: text: field required"),
    ("verify.json", '{"passed": "no"}', "verify.json: passed"),
    ("plan.json", '{"shape": "ragged"}', "plan.json: rounding"),
    ("timings.json", '{"learn": "long"}', "timings.json: learn"),
    ("bench-vllm.json", '{"runtime": "vllm"}', "bench-vllm.json: dtype"),
    ("verify-vllm.json", "null", "verify-vllm.json: content"),
    ("refit.json", "[{}]", "refit.json: 0.ridge"),
    ("metrics.jsonl", '{"step": 1}\nnot JSON\n', "metrics.jsonl: 2 lines, the first of them 1, are left out"),
    ("recover.jsonl", "{\n", "recover.jsonl: line 1 is left out: not readable JSON"),
    ("gates.safetensors", "nonsense", "gates.safetensors is not a readable gates file"),
    ("model/config.json", "{", "config.json is not readable JSON"),
]


@pytest.mark.parametrize(("name", "content", "said"), BROKEN)
def test_a_broken_file_is_named_and_the_rest_is_shown(made, tmp_path, name, content, said):
    run = shutil.copytree(made, tmp_path / "run")
    (run / name).write_text(content)
    page = page_of(run)
    assert said in page.words and str(run / name) in page.words
    assert "sparsity" in page.words and "Mind first" in page.words


def test_one_broken_line_leaves_the_other_steps_in_the_curves(made, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:10], lines[10][:30], *lines[11:]]))
    record = read_runs([run])[0]
    assert len(record.steps["step"]) == 59 and "metrics.jsonl: line 11 is left out" in record.problems[-1]


def test_an_evaluation_without_a_figure_that_it_needs_is_broken(made, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    values = json.loads((run / "eval.json").read_text())
    values["dense"]["parameters"] = 0
    (run / "eval.json").write_text(json.dumps(values))
    assert "eval.json lacks what its figures need" in page_of(run).words


def test_a_plan_of_other_gates_is_said(made, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    plan = json.loads((run / "plan.json").read_text())
    plan["kept"]["layers.0.channels"][-1] = 10_000
    (run / "plan.json").write_text(json.dumps(plan))
    words = page_of(run).words
    assert "plan.json does not fit the gates (at layers.0.channels)" in words and "No plan yet" in words


def test_gates_that_do_not_say_their_experts_are_shown_together(tmp_path):
    run = make_run(tmp_path / "run", layers=2, experts=4, channels=8)
    save_file(load_file(run / "gates.safetensors"), run / "gates.safetensors", metadata={"secateur": '{"format": 1}'})
    words = page_of(run).words
    assert "does not say how many experts a layer has" in words and "Layers × experts" not in words


def test_what_is_no_number_and_what_is_infinite_is_drawn(made, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    values = evaluation(np.random.default_rng(0), 0.6)
    values["pruned"] |= {"perplexity": float("inf"), "loss": float("inf")}
    (run / "eval.json").write_text(json.dumps(values))
    lines = (run / "metrics.jsonl").read_text().replace('"loss": ', '"loss": NaN, "was": ')
    (run / "metrics.jsonl").write_text(lines)
    words = page_of(run).words
    assert "it is of no use as it is" in words and "loss: nothing that is a number" in words


def test_a_failed_verification_comes_first(made, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    values = json.loads((run / "verify.json").read_text())
    values["passed"] = values["comparisons"][0]["passed"] = False
    (run / "verify.json").write_text(json.dumps(values))
    (run / "model").rename(run / "model-failed-verification")
    page = page_of(run)
    assert read_runs([run])[0].problems[0].startswith("the export failed verification")
    assert "FAILED" in page.words and any(attrs.get("class") == "card bad" for attrs in page.all("li"))


# --- hostile text ----------------------------------------------------------------------------------------------------


def test_names_paths_and_generations_are_text_and_nothing_else(tmp_path):
    run = make_run(tmp_path / "run<b>&", model=HOSTILE, data=HOSTILE)
    values = json.loads((run / "eval.json").read_text())
    values["text"] = HOSTILE
    values["tasks"] = {HOSTILE: next(iter(values["tasks"].values()))}
    values["samples"] = [dict.fromkeys(("prompt", "dense", "pruned", "text"), HOSTILE + "\u202e\x00")]
    (run / "eval.json").write_text(json.dumps(values))
    page = page_of(run, make_run(tmp_path / "other", model=HOSTILE), out=tmp_path / "out.html")
    assert not page.all("img") and not page.all("b") and page.words.count(HOSTILE) >= 8
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert len(page.all("script")) == 1 + len([a for a in page.all("script") if a.get("type") == "application/json"])


# --- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_48_layers_and_128_experts_makes_a_page_below_5_mb(tmp_path):
    run = make_run(tmp_path / "run", layers=48, experts=128, channels=32, heads=4, steps=2000)
    start = time.perf_counter()
    path = write_report([run])
    assert path.stat().st_size < 5e6 / 3, f"{path.stat().st_size / 1e6:.1f} MB"
    assert time.perf_counter() - start < 60
    assert "Of 196,608 experts' channels" in Page(path.read_text(encoding="utf-8")).words
