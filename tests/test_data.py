"""Data: every format gives the same documents, parts are disjoint, packing loses nothing, errors name what is wrong."""

import gzip
import json
import random
import re
from itertools import chain, count
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from safetensors import safe_open

from secateur import data
from secateur.text import documents, evaluation_text
from texts import (
    BOS,
    COMPRESS,
    EOS,
    WORDS,
    blocks_of,
    complaint,
    make_tokenizer,
    own_words,
    parquet_bytes,
    words_in,
    write_jsonl,
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".md", ".TXT"])
def test_every_format_and_compression_gives_the_same_documents(tmp_path, suffix, compression):
    texts = ["Häuser am See", "two\nlines"]
    if suffix == ".parquet":
        content = parquet_bytes(texts)
    elif "js" in suffix:
        content = "\n".join(json.dumps({"text": t}) for t in texts).encode()
    else:
        texts = ["Häuser am See\n\ntwo\nlines"]
        content = texts[0].encode()
    path = tmp_path / f"corpus{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](content))
    assert list(documents(str(path))) == texts


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_compressed_files_of_several_members_are_read_to_the_end(tmp_path, compression):
    path = tmp_path / f"c.txt{compression}"
    path.write_bytes(COMPRESS[compression](b"first ") + COMPRESS[compression](b"second"))
    assert list(documents(str(path))) == ["first second"]


def test_a_folder_is_read_in_order_of_paths_without_hidden_and_foreign_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    write_jsonl(tmp_path / "b" / "1.jsonl", ["one", "two"])
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"zero"))
    (tmp_path / "c.parquet").write_bytes(parquet_bytes(["three"]))
    for other in (".git/x.txt", ".hidden.txt", "picture.png"):
        (tmp_path / other).write_text("no")
    assert list(documents(str(tmp_path))) == ["zero", "one", "two", "three"]


def test_plain_text_is_cut_at_blank_lines_and_loses_no_text(tmp_path):
    text = "\n\n".join(f"Paragraph {i}. " + "word " * 150 for i in range(60))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    pieces = list(documents(str(tmp_path / "book.txt")))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(p.startswith("Paragraph") for p in pieces)
    assert all(4_000 <= len(p) < 5_000 for p in pieces[:-1])


@pytest.mark.parametrize("separator", ["\n", " "])
def test_plain_text_without_blank_lines_is_cut_too(tmp_path, separator):
    text = separator.join(f"w{i}" for i in range(10_000))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    pieces = list(documents(str(tmp_path / "book.txt")))
    assert len(pieces) >= 6
    assert max(map(len, pieces)) <= 2 * 4_000 + 10
    assert "".join(pieces).replace("\n", "") == text.replace("\n", "")


def test_other_columns_byte_order_marks_null_rows_and_blank_lines_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n\n{"body": null}\n{"body": "\\ud800y"}\n', encoding="utf-8-sig")
    assert list(documents(str(tmp_path / "a.jsonl"), "body")) == ["x", "", "?y"]
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(["x", None], "body"))
    assert list(documents(str(tmp_path / "a.parquet"), "body")) == ["x", ""]


def test_evaluation_text_is_raw_text_or_documents_joined_by_blank_lines(tmp_path):
    raw = " \n = Title = \n\n" + "A line . \n" * 2_000
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(raw.encode()))
    assert evaluation_text(str(tmp_path / "a.txt.zst")) == raw
    rows = write_jsonl(tmp_path / "a.jsonl", ["", "one", "", "two"])
    assert evaluation_text(rows) == "\n\none\n\n\n\ntwo"
    assert evaluation_text(rows, characters=4) == "\n\non"
    empty = write_jsonl(tmp_path / "b.jsonl", ["", " "])
    assert "b.jsonl holds no text" in complaint(lambda: evaluation_text(empty))


def test_hub_names_carry_configuration_and_split(monkeypatch):
    calls = []
    stream = lambda *args, **kwargs: calls.append((args, kwargs)) or [{"text": "a"}, {"text": None}]  # noqa: E731
    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=stream))
    assert list(documents("org/name:config:test")) == ["a", ""]
    assert list(documents("name")) == ["a", ""]
    assert calls == [
        (("org/name", "config"), {"split": "test", "streaming": True}),
        (("name", None), {"split": "train", "streaming": True}),
    ]
    assert "columns: text" in complaint(lambda: list(documents("name", "content")))


def test_a_hub_name_that_cannot_be_read_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("first line\nsecond line " + "x" * 1000)

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=fail))
    message = complaint(lambda: list(documents("org/name")))
    assert message.startswith("org/name is no file or folder here")
    assert "first line" in message and len(message) < 600


def test_an_endless_stream_is_read_only_as_far_as_needed(monkeypatch, tmp_path, tokenizer):
    drawn = []
    rows = ({"text": f"w{i % WORDS} w{i // WORDS}"} for i in count() if drawn.append(i) is None)
    load = lambda *args, **kwargs: rows  # noqa: E731
    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load))
    monkeypatch.setattr(data, "POOL_DOCUMENTS", 500)
    blocks = blocks_of("org/huge", tokenizer, tmp_path)
    assert blocks.calibration_NT.shape == (8, 16)
    assert len(drawn) < 500 + 3 * 64


# ---- errors


def damaged(tmp_path):
    """File name → its content; what the complaint has to say."""
    packed, zipped = gzip.compress(b"some text " * 999), zstandard.compress(bytes(range(256)) * 99)
    table = parquet_bytes(["a"] * 9)
    return {
        "cut.txt.gz": (packed[:-9], ["cut.txt.gz", "Truncated"]),
        "cut.txt.zst": (zipped[:-9], ["cut.txt.zst", "Truncated"]),
        "not.txt.gz": (b"plain", ["not.txt.gz", "cannot be read"]),
        "not.jsonl.zst": (b"plain", ["not.jsonl.zst", "cannot be read"]),
        "cut.parquet": (table[:-9], ["cut.parquet", "cannot be read"]),
        "bad.jsonl": (b'{"text": "a"}\n\n{"text": \n', ["bad.jsonl, line 3", "JSON object"]),
        "list.json": (b'[{"text": "a"}]', ["list.json, line 1", "JSON object"]),
        "columns.jsonl": (b'{"text": "a"}\n{"id": 1, "body": "a"}', ["line 2", '"text"', "id, body", "--text-column"]),
        "columns.parquet": (parquet_bytes(["a"], "body"), ["columns.parquet", '"text"', "id, body", "--text-column"]),
        "number.jsonl": (b'{"text": 7}', ["number.jsonl, line 1", "int", "--text-column"]),
        "latin.txt": ("Häuser".encode("latin-1"), ["latin.txt", "UTF-8"]),
        "latin.jsonl": ('{"text": "Häuser"}'.encode("latin-1"), ["latin.jsonl", "UTF-8"]),
        "table.csv": (b"text\na", ["table.csv", "unknown file type", ".jsonl"]),
        "folder/picture.png": (b"", ["folder", "no file", ".parquet"]),
    }


@pytest.mark.parametrize("name", damaged(None))
def test_damaged_or_foreign_files_are_named_with_the_fault(tmp_path, name):
    content, expected = damaged(tmp_path)[name]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    message = complaint(lambda: list(documents(str(tmp_path / name.split("/")[0]))))
    assert [e for e in expected if e not in message] == []


def garbled(content):
    start = int(0.6 * len(content))
    return content[:start] + b"\xff" * 2_000 + content[start + 2_000 :]


def misread(content):
    """One digit is another one."""
    at = next(i for i in range(int(0.6 * len(content)), len(content)) if content[i - 2 : i + 3].isdigit())
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def cut(content):
    return content[: int(0.6 * len(content))]


def shard_of(name, texts):
    if name.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(
            pa.table({"text": texts}), sink, row_group_size=300, compression="none", write_page_checksum=True
        )
        return sink.getvalue().to_pybytes()
    lines = "".join((text if ".txt" in name else json.dumps({"text": text})) + "\n" for text in texts)
    return COMPRESS[name[name.rindex(".") :] if name.count(".") > 1 else ""](lines.encode())


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in ("a.jsonl.gz", "a.jsonl.zst", "a.txt.gz") for damage in (garbled, cut)]
    + [("a.jsonl", garbled), ("a.jsonl", cut), ("a.parquet", garbled), ("a.parquet", misread)],
)
def test_a_file_that_is_damaged_in_the_middle_is_read_up_to_there_and_the_place_is_named(tmp_path, name, damage):
    texts = [" ".join(str(random.Random(20 * i + j).random()) for j in range(20)) for i in range(1_500)]
    write_jsonl(tmp_path / "0.jsonl", ["before"])
    (tmp_path / name).write_bytes(damage(shard_of(name, texts)))
    read = []
    message = complaint(lambda: read.extend(documents(str(tmp_path))))
    place = re.search(rf"{re.escape(name)}(, line| .*after line| .*after row) ([\d,]+)", message)
    assert place, message
    undamaged = int(place[2].replace(",", "")) - (place[1] == ", line")
    assert undamaged >= 600 and (undamaged < 950 or ".gz" in name)  # gzip makes something of what follows for a while
    before = "".join(["before", *texts[:600]])
    assert "".join(read).replace("\n", "").startswith(before)


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing", "/missing", "~/missing-folder", "a/b/c", "x.txt.gz", ""]
)
def test_a_missing_path_is_not_taken_for_a_hub_name(name):
    assert "no such file or folder" in complaint(lambda: list(documents(name)))


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", own_words(100))
    message = complaint(lambda: blocks_of(source, tokenizer, tmp_path, vocab_size=50))
    assert "embedding has 50 rows" in message


def test_too_little_text_is_told_in_tokens_with_the_epochs_that_would_do(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", own_words(10, length=31))  # 10 documents of 32 tokens
    held_out = complaint(lambda: blocks_of(source, tokenizer, tmp_path, held_out_blocks=30))
    assert "30 held-out blocks of 16 tokens need 480 tokens, 320 were found" in held_out

    def attempt(epochs):  # 2 documents are held out: 8 × 32 = 256 tokens are left
        return blocks_of(source, tokenizer, tmp_path, calibration_blocks=50, epochs=epochs)

    once = complaint(lambda: attempt(1))
    assert "50 calibration blocks of 16 tokens need 800 tokens, 256 were found" in once
    assert once.endswith("take fewer steps, or repeat it with --epochs 4")  # 50 blocks out of 16
    assert "--epochs 4" in complaint(lambda: attempt(3))
    assert attempt(4).calibration_NT.shape == (50, 16)


def test_data_without_text_or_with_one_document_is_too_short(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n \n")
    assert "need 48 tokens, 0 were found" in complaint(lambda: blocks_of(str(tmp_path / "a.txt"), tokenizer, tmp_path))
    one = write_jsonl(tmp_path / "a.jsonl", own_words(1, length=9_999))
    message = complaint(lambda: blocks_of(one, tokenizer, tmp_path))
    assert "0 were found" in message and "beside the 1 document" in message and "--epochs" not in message


# ---- packing, parts, order


def test_packing_keeps_every_token_and_ends_documents_in_eos(tmp_path, tokenizer):
    written = [list(range(10 + i, 10 + i + n)) for i, n in enumerate([3, 50, 1, 16, 15, 40, 40, 40])]
    written[2] += [EOS]  # one that brings its own
    blocks = blocks_of("self", tokenizer, tmp_path, written=written, calibration_blocks=6, held_out_blocks=4)
    stream = [[*ids, EOS] if ids[-1] != EOS else ids for ids in written]
    held_out, calibration = list(chain(*stream[:4])), list(chain(*stream[4:]))  # 4 + 51 + 2 + 17 tokens fill 4 blocks
    assert blocks.held_out_NT.flatten().tolist() == held_out[:64]
    assert sorted(blocks.calibration_NT.tolist()) == sorted(calibration[i : i + 16] for i in range(0, 96, 16))
    assert blocks.calibration_NT.dtype == blocks.held_out_NT.dtype == torch.int64
    assert blocks.about["held_out_documents"] == 4 and blocks.about["documents"] == 3
    assert blocks.about["tokens"] == 96 and blocks.about["held_out_tokens"] == 64


def test_texts_keep_the_special_tokens_of_their_tokenizer_and_get_no_second_eos(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", own_words(100, length=6))
    for template, length in (("<s> $A", 8), ("<s> $A </s>", 8), ("$A </s>", 7)):
        blocks = blocks_of(source, make_tokenizer(template), tmp_path, seq_len=length)
        for ids in blocks.held_out_NT.tolist() + blocks.calibration_NT.tolist():
            assert ids.count(EOS) == 1 and ids[-1] == EOS
            assert (ids[0] == BOS) == template.startswith("<s>")


def test_no_document_is_in_both_parts_not_even_a_copy(tmp_path, tokenizer):
    texts = own_words(40) + own_words(40) + ["", "  \n"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    for seed in range(5):
        blocks = blocks_of(source, tokenizer, tmp_path, seed=seed, calibration_blocks=30, held_out_blocks=20)
        assert not words_in(blocks.held_out_NT) & words_in(blocks.calibration_NT)
        assert blocks.about["documents"] + blocks.about["held_out_documents"] <= 40


def test_documents_are_drawn_from_all_of_a_small_corpus_by_seed(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", own_words(WORDS))
    first, again, other = (blocks_of(source, tokenizer, tmp_path / str(i), seed=s) for i, s in enumerate([0, 0, 1]))
    assert torch.equal(first.calibration_NT, again.calibration_NT) and torch.equal(first.held_out_NT, again.held_out_NT)
    assert first.about == again.about and first.about["fingerprint"] != other.about["fingerprint"]
    assert words_in(first.calibration_NT) != words_in(other.calibration_NT)
    assert max(words_in(first.calibration_NT)) > WORDS / 2 and min(words_in(first.calibration_NT)) < WORDS / 2


def test_no_more_documents_are_tokenised_than_needed(tmp_path, tokenizer):
    seen = []

    class Counting:
        eos_token_id, get_vocab = EOS, tokenizer.get_vocab

        def __call__(self, texts, **options):
            seen.extend([texts] if isinstance(texts, str) else texts)
            return tokenizer(texts, **options)

    source = write_jsonl(tmp_path / "a.jsonl", own_words(WORDS) * 5)
    blocks_of(source, Counting(), tmp_path)
    assert len(seen) <= 65


def test_short_data_is_repeated_in_a_new_order_and_no_more_often_than_epochs_allow(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", own_words(60, length=15))  # one block a document
    blocks = blocks_of(source, tokenizer, tmp_path, calibration_blocks=150, held_out_blocks=3, epochs=3)
    assert blocks.about["tokens"] == 57 * 16
    used = blocks.calibration_NT[:, 0].tolist()
    first, second, third = used[:57], used[57:114], used[114:]
    assert len(set(first)) == 57 and set(first) == set(second) and len(set(third)) == len(third) == 36
    assert first != second and first[:36] != third
    plenty = blocks_of(source, tokenizer, tmp_path, calibration_blocks=50, epochs=3).calibration_NT[:, 0].tolist()
    assert len(set(plenty)) == 50  # nothing repeats while there is text


# ---- cache


def test_the_same_settings_are_served_from_the_cache_without_the_data(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    source = write_jsonl(path, own_words(100))
    blocks = blocks_of(source, tokenizer, tmp_path)
    path.unlink()
    again = blocks_of(source, tokenizer, tmp_path)
    assert torch.equal(blocks.calibration_NT, again.calibration_NT)
    assert torch.equal(blocks.held_out_NT, again.held_out_NT)
    assert blocks.about == again.about
    with safe_open(tmp_path / "data.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"I32"}  # noqa: SIM118
    for changes in ({"seed": 1}, {"seq_len": 8}, {"calibration_blocks": 7}, {"text_column": "body"}, {"epochs": 2}):
        assert "no such file" in complaint(lambda changes=changes: blocks_of(source, tokenizer, tmp_path, **changes))
    assert "no such file" in complaint(lambda: blocks_of(source, make_tokenizer("<s> $A"), tmp_path))


@pytest.mark.parametrize("damage", [lambda b: b[:-40], lambda b: b"", lambda b: b"x" * 99, None])
def test_a_broken_or_foreign_cache_is_built_anew(tmp_path, tokenizer, damage):
    source, cache = write_jsonl(tmp_path / "a.jsonl", own_words(100)), tmp_path / "data.safetensors"
    blocks = blocks_of(source, tokenizer, tmp_path)
    if damage:
        cache.write_bytes(damage(cache.read_bytes()))
    else:
        data.save_file({"other": torch.zeros(2)}, cache)
    assert torch.equal(blocks_of(source, tokenizer, tmp_path).calibration_NT, blocks.calibration_NT)
    (tmp_path / "a.jsonl").unlink()
    assert torch.equal(blocks_of(source, tokenizer, tmp_path).held_out_NT, blocks.held_out_NT)
