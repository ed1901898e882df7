"""Shared runs of 13 words are found whatever the case and punctuation, and nothing shorter is."""

import random

import torch

from runs import small_tokenizer
from secateur.overlap import RUN, Runs, decoded

WORDS = [f"word{i}" for i in range(2000)]


def passage(seed: int, words: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def test_a_shared_run_counts_whatever_its_case_and_punctuation() -> None:
    shared = passage(1, RUN)
    runs = Runs([" ".join(passage(2, 50) + shared + passage(3, 50))])
    text = " ".join(passage(4, 30)) + " — " + ", ".join(shared).title() + "! " + " ".join(passage(5, 30))
    found = runs.in_text(text)
    assert (found.words, found.covered, found.runs) == (30 + RUN + 30, RUN, 1)


def test_one_word_less_is_not_shared() -> None:
    shared = passage(1, RUN - 1)
    runs = Runs([" ".join(passage(2, 50) + shared + passage(3, 50))])
    assert runs.in_text(" ".join(passage(4, 30) + shared + passage(5, 30))).runs == 0


def test_the_same_words_in_another_order_are_not_shared() -> None:
    words = passage(1, RUN)
    assert Runs([" ".join(words)]).in_text(" ".join(words[1::-1] + words[2:])).runs == 0


def test_a_longer_passage_covers_its_words_once() -> None:
    shared = passage(1, 20)
    found = Runs([" ".join(shared)]).in_text(" ".join(passage(2, 7) + shared))
    assert (found.covered, found.runs) == (20, 20 - RUN + 1)


def test_runs_do_not_cross_the_border_of_two_documents() -> None:
    shared = passage(1, RUN)
    first, second = " ".join(shared[:6]), " ".join(shared[6:])
    assert Runs([first, second]).in_text(f"{first} {second}").runs == 0
    assert Runs([f"{first} {second}"]).in_texts([first, second]).runs == 0


def test_agrees_with_a_search_by_strings() -> None:
    shared = [passage(seed, 9 + seed) for seed in range(12)]
    calibration = [w for i, part in enumerate(shared) for w in passage(100 + i, 40) + part]
    text = [w for i, part in enumerate(shared) for w in part + passage(200 + i, 25)]
    known = {tuple(calibration[i : i + RUN]) for i in range(len(calibration))}
    starts = [i for i in range(len(text) - RUN + 1) if tuple(text[i : i + RUN]) in known]
    covered = {j for i in starts for j in range(i, i + RUN)}
    found = Runs([" ".join(calibration)]).in_text(" ".join(text))
    assert (found.runs, found.covered) == (len(starts), len(covered)) and len(starts) > 20


def test_words_that_calibration_does_not_have_match_nothing() -> None:
    assert Runs([" ".join(passage(1, 40))]).in_text(" ".join(f"other{i}" for i in range(40))).runs == 0


def test_empty_and_short_texts_share_nothing() -> None:
    for texts in ([], [""], ["too short"]):
        assert Runs(texts).in_text(" ".join(passage(1, 40))).runs == 0
    assert Runs([" ".join(passage(1, 40))]).in_text("").words == 0


def test_tokens_are_decoded_document_by_document_across_blocks() -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer("w1 w2 w3")["input_ids"] + [2] + tokenizer("w4 w5 w6 w7")["input_ids"]
    assert [text.split() for text in decoded(torch.tensor(ids).view(2, 4), tokenizer)] == [
        ["w1", "w2", "w3"], ["w4", "w5", "w6", "w7"],
    ]  # fmt: skip
