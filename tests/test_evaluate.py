"""Perplexity follows its protocol: the papers' on WikiText-2, and windows of a raw file."""

import gzip
import json
import math

import pytest
import torch

from runs import complaint, secateur, small_llama, small_tokenizer
from secateur.evaluate import compared, mean_loss, perplexity, windows
from secateur.text import evaluation_text
from secateur.vocabulary import LOGITS_AT_ONCE

WIKI = (
    " \n = w1 w2 = \n \n w3 w4 , w5 w6 w7 . \n w8 w9 w10 w11 \n \n = = w12 = = \n \n w13 w14 w15 w16 w17 w18 \n"
    " w19 w20 w21 w22 w23 w24 w25 w26 w27 w28 w29 w30 \n"
)
"""Laid out like the raw file of WikiText-2: blank lines hold a space."""


def hub_rows() -> list[str]:
    """The rows of WIKI as the data set on the hub has them."""
    lines = WIKI.removesuffix("\n").split("\n")
    return [line + "\n" if line.strip() else "" for line in lines]


def papers_perplexity(model, tokenizer, rows, length):
    """The protocol, written out: join, tokenise, cut, and sum token by token."""
    ids = tokenizer("\n\n".join(rows))["input_ids"]
    total, tokens = 0.0, 0
    for start in range(0, len(ids) - length + 1, length):
        window = ids[start : start + length]
        for place in range(1, length):
            logits_V = model(torch.tensor([window[:place]])).logits[0, -1]
            total -= (logits_V[window[place]] - logits_V.logsumexp(0)).item()
            tokens += 1
    return math.exp(total / tokens), tokens


@pytest.fixture
def wiki(tmp_path):
    (tmp_path / "wiki.txt").write_text(WIKI)
    (tmp_path / "wiki.txt.gz").write_bytes(gzip.compress(WIKI.encode()))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in hub_rows()))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "join"), [("wiki.txt", "lines"), ("wiki.txt.gz", "lines"), ("rows.jsonl", "raw"), ("rows.jsonl", "lines")]
)
def test_the_raw_file_by_lines_and_the_rows_of_the_hub_give_the_papers_text(wiki, name, join):
    assert evaluation_text(str(wiki / name), join=join) == "\n\n".join(hub_rows())


def test_by_default_a_text_file_is_taken_as_it_is(wiki):
    assert evaluation_text(str(wiki / "wiki.txt")) == WIKI


def test_lines_end_at_newlines_only(tmp_path):
    (tmp_path / "odd.txt").write_text("a\x0cb\u2028c\nd")
    assert evaluation_text(str(tmp_path / "odd.txt"), join="lines") == "a\x0cb\u2028c\n\n\nd"


@pytest.mark.parametrize("length", [4, 8, 11])
def test_perplexity_is_that_of_the_papers_protocol(wiki, length):
    model, tokenizer = small_llama(), small_tokenizer()
    expected, tokens = papers_perplexity(model, tokenizer, hub_rows(), length)
    text = evaluation_text(str(wiki / "wiki.txt"), join="lines")
    measured = perplexity(model, windows(torch.tensor(tokenizer(text)["input_ids"]), 0, length, "wiki"))
    assert measured.perplexity == pytest.approx(expected, rel=1e-5)
    assert (measured.tokens, measured.windows * (measured.length - 1)) == (tokens, tokens)


def test_eval_reports_the_protocol_and_measures_the_papers_figure(run, wiki, capsys):
    options = ("--eval-data", wiki / "wiki.txt", "--eval-join", "lines", "--eval-windows", "0", "--eval-length", "6")
    assert secateur("eval", run, *options) == 0
    results = json.loads((run / "eval.json").read_text())
    tokens_of = small_tokenizer()("\n\n".join(hub_rows()))["input_ids"]
    dense = results["dense"]
    assert (dense["windows"], dense["length"], dense["tokens"]) == (len(tokens_of) // 6, 6, len(tokens_of) // 6 * 5)
    assert results["join"] == "lines"
    assert dense["perplexity"] == pytest.approx(papers_perplexity(small_llama(), small_tokenizer(), hub_rows(), 6)[0])
    said = " ".join(capsys.readouterr().out.split())
    assert f"{dense['windows']} windows of 6 tokens without overlap, {dense['tokens']} tokens predicted" in said
    assert "lines joined by a blank line" in said
    assert "lines joined by a blank line" in (run / "model" / "README.md").read_text()


def test_all_windows_of_a_text_or_the_first_ones():
    tokens_T = torch.arange(23)
    assert windows(tokens_T, 0, 5, "text").tolist() == torch.arange(20).view(4, 5).tolist()
    assert windows(tokens_T, 2, 5, "text").tolist() == torch.arange(10).view(2, 5).tolist()
    assert len(windows(tokens_T, 9, 5, "text")) == 4


def test_a_loss_over_many_batches_and_chunks_is_that_of_one(monkeypatch):
    model, ids_NT = small_llama(), torch.randint(3, 60, (7, 9), generator=torch.Generator().manual_seed(0))
    whole = mean_loss(model, ids_NT)
    monkeypatch.setattr("secateur.evaluate.TOKENS_AT_ONCE", 18)
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", 4 * 64 * 5)
    assert mean_loss(model, ids_NT) == pytest.approx(whole)


def test_the_error_of_a_change_is_paired_window_by_window():
    ids_NT = torch.randint(3, 60, (9, 8), generator=torch.Generator().manual_seed(0))
    dense, other = small_llama(), small_llama(seed=1)
    losses = [[mean_loss(model, row[None]) for row in ids_NT] for model in (dense, other)]
    gaps = torch.tensor(losses[1]) - torch.tensor(losses[0])
    found = compared(dense, other, ids_NT)
    assert found["loss_change_stderr"] == pytest.approx(float(gaps.std() / 3), rel=1e-4)
    assert found["pruned"]["loss"] - found["dense"]["loss"] == pytest.approx(float(gaps.mean()), abs=1e-5)
    assert found["dense"]["loss"] == pytest.approx(mean_loss(dense, ids_NT))
    assert found["dense"]["loss_stderr"] == pytest.approx(float(torch.tensor(losses[0]).std() / 3), rel=1e-4)
    assert compared(dense, other, ids_NT[:1])["loss_change_stderr"] is None
    assert compared(dense, dense, ids_NT)["loss_change_stderr"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--eval-windows", "-1"), "--eval-windows"), (("--eval-length", "1"), "--eval-length"),
     (("--eval-length", "5000"), "needs 5000")],
)  # fmt: skip
def test_windows_that_cannot_be_are_refused_in_one_line(run, wiki, capsys, options, words):
    before = (run / "eval.json").read_bytes()
    assert words in complaint(capsys, "eval", run, "--eval-data", wiki / "wiki.txt", *options)
    assert (run / "eval.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_an_empty_evaluation_text_is_refused_in_one_line(run, tmp_path, capsys, content):
    (tmp_path / "empty.txt").write_text(content)
    for join in ("raw", "lines"):
        said = complaint(capsys, "eval", run, "--eval-data", tmp_path / "empty.txt", "--eval-join", join)
        assert "empty.txt holds no text" in said
