"""Files of others: what is wrong in them is told in one line, what is right is read, and no code of theirs runs."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from runs import complaint, prune_arguments, secateur, write_checkpoint
from secateur.data import fingerprint
from secateur.files import InputError, read_json
from secateur.gguf_header import check_gguf
from secateur.load import describe_pretrained, load, read_export
from secateur.untrusted import MAX_DEPTH, parse_json, read_tensors, read_yaml, safetensors_header


def with_header(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, and any length that it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(begin: object, end: object, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [begin, end]}


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


# --- JSON and YAML ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [(nested(MAX_DEPTH + 2), "nested deeper"), (nested(100_000), "nested deeper"), ('{"a": 1, "a": 2}', "'a' twice"),
     ("9" * 301, "more than 300 digits"), ('{"a": "\\ud800"}', "surrogates"), ("{", "Expecting"), (b"\xff", "utf-8")],
)  # fmt: skip
def test_json_is_refused_that_is_deep_ambiguous_huge_or_cannot_be_printed(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    (tmp_path / "plan.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"plan\.json is not readable JSON.*run `secateur plan RUN` again"):
        read_json(tmp_path / "plan.json", "secateur plan RUN")


def test_json_within_the_bounds_is_read():
    assert parse_json(nested(MAX_DEPTH)) is not None
    assert parse_json('{"a": [1, -2.5, null, "\\ud83d\\ude00"]}') == {"a": [1, -2.5, None, "😀"]}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have no name here")
def test_a_pipe_is_no_file_to_wait_for(tmp_path):
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(InputError, match="not a regular file"):
        read_json(tmp_path / "plan.json", "secateur plan RUN")


LAUGHS = "a: &a [1, 2]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [(LAUGHS, "an alias"), ("a: &a {<<: *a}", "an alias"), ("a: " + nested(200), "nested deeper"),
     ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
     ("a: !!int ''", "not what its tag says"), ("a: !!bool 2", "not what its tag says"), ("a: [", "flow")],
)  # fmt: skip
def test_yaml_is_refused_that_is_deep_makes_objects_or_multiplies(tmp_path, text, reason):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_yaml(tmp_path / "config.yaml")
    assert f"{tmp_path / 'config.yaml'} is not readable YAML" in complaint_of_config(tmp_path / "config.yaml")


def complaint_of_config(path: Path) -> str:
    from secateur.config_file import load_config

    with pytest.raises(InputError) as found:
        load_config(path)
    return str(found.value)


# --- safetensors -----------------------------------------------------------------------------------------------------


HEADERS = {
    "no-dictionary": (b"[]", b"", "not a dictionary"),
    "deep": (nested(10_000).encode(), b"", "nested deeper"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "not texts"),
    "dtype": ({"a": tensor(0, 4, dtype="F31")}, b"1234", "unknown dtype 'F31'"),
    "dtype-type": ({"a": tensor(0, 4, dtype=["F32"])}, b"1234", "unknown dtype"),
    "negative": ({"a": tensor(-4, 0)}, b"1234", "whole numbers from 0"),
    "true": ({"a": tensor(0, 4, shape=[True])}, b"1234", "whole numbers from 0"),
    "fraction": ({"a": tensor(0, 4.0)}, b"1234", "whole numbers from 0"),
    "null": ({"a": tensor(0, 4, shape=[None])}, b"1234", "whole numbers from 0"),
    "one-offset": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}, b"1234", "whole numbers from 0"),
    "missing": ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", "data_offsets"),
    "size": ({"a": tensor(0, 4, shape=[2])}, b"1234", "others"),
    "huge": ({"a": tensor(0, 0, shape=[2**40, 2**40, 0])}, b"", "can be counted"),
    "overlap": ({"a": tensor(0, 4), "b": tensor(2, 6)}, b"123456", "begins at 2"),
    "same": ({"a": tensor(0, 4), "b": tensor(0, 4)}, b"1234", "begins at 0"),
    "gap": ({"a": tensor(0, 4), "b": tensor(8, 12)}, b"1" * 12, "begins at 8"),
    "beyond": ({"a": tensor(0, 4)}, b"12", "the file has 2"),
    "left": ({"a": tensor(0, 4)}, b"123456", "the file has 6"),
    "twice": (b'{"a": {}, "a": {}}', b"", "'a' twice"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_is_refused_that_does_not_describe_its_file(tmp_path, case):
    header, data, reason = HEADERS[case]
    with pytest.raises(ValueError, match=reason):
        safetensors_header(with_header(tmp_path / "a.safetensors", header, data))


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 100_000_001, 3])
def test_a_header_of_a_length_that_is_not_its_own_is_refused(tmp_path, length):
    path = with_header(tmp_path / "a.safetensors", {}, length=length)
    with pytest.raises(ValueError, match="claims" if length > 3 else "more bytes|the file has|Expecting|not a dict"):
        safetensors_header(path)


def test_a_header_that_would_fill_the_memory_is_refused_though_the_file_is_as_long(tmp_path):
    path = with_header(tmp_path / "a.safetensors", {}, length=100_000_001)
    os.truncate(path, 100_000_009)  # takes no room on the disk
    with pytest.raises(ValueError, match="claims 100,000,001 bytes"):
        safetensors_header(path)


def test_what_safetensors_writes_is_read(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.zeros(0, 3), "c": torch.ones(5).bfloat16(), "d": torch.tensor(True)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"secateur": '{"x": 1}'})
    found, said = read_tensors(tmp_path / "a.safetensors")
    assert said == {"x": 1} and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


# --- checkpoint folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint in several files, with an index."""
    folder = write_checkpoint(tmp_path / "sharded")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def loaded(folder: Path) -> object:
    return load(str(folder), "cpu", "float32", trust_remote_code=False)


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as found:
        loaded(folder)
    assert str(folder) in str(found.value) and "\n" not in str(found.value)
    return str(found.value)


def test_shards_in_the_folder_are_read(sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 1 and loaded(sharded)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/a.safetensors", "a/b.safetensors", "a\\b.safetensors", "..",
                                  "", "model.bin", None, 3, "C:a.safetensors", "a\0.safetensors"])  # fmt: skip
def test_an_index_cannot_name_files_elsewhere(sharded, name):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shutil.copy(sharded / next(iter(index["weight_map"].values())), sharded.parent / "a.safetensors")
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    assert f"{name!r} is not the name of a safetensors file in its folder" in refused(sharded)


def test_an_index_is_refused_whose_shards_lack_what_it_says(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "weight_map": index["weight_map"] | {"model.more": "x.safetensors"}}))
    assert "x.safetensors is missing" in refused(sharded)
    there = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps({**index, "weight_map": index["weight_map"] | {"model.more": there}}))
    assert f"{there} holds no model.more" in refused(sharded)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused_and_one_within_is_followed(tmp_path, name):
    folder = write_checkpoint(tmp_path / "model")
    (folder / name).rename(folder / "own")
    (folder / name).symlink_to("own")
    assert loaded(folder)
    (folder / "own").rename(tmp_path / "other")
    (folder / name).unlink()
    (folder / name).symlink_to("../other")
    assert f"{name} is a link that leads out of the folder" in refused(folder)


def test_a_snapshot_in_the_cache_of_the_hub_is_read(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert loaded(snapshot)
    (snapshot / "chat_template.jinja").symlink_to("../../../elsewhere")
    assert "chat_template.jinja is a link" in refused(snapshot)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_how_to_convert_them_and_not_read(tmp_path, name):
    folder = write_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    said = refused(folder)
    assert f"pickles ({name})" in said and "save_pretrained" in said and not (tmp_path / "ran").exists()


def test_pickles_beside_safetensors_are_left_alone(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert loaded(folder)


def test_an_adapter_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    assert "is an adapter" in refused(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000"),
        ({"a": json.loads(nested(80))}, "deeper"),
        ({"intermediate_size": 0}, "would have no values"),
    ],
)
def test_a_configuration_that_would_take_for_ever_is_refused(tmp_path, changes, reason):
    folder = write_checkpoint(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(InputError, match=reason):
        describe_pretrained(str(folder))


def test_a_configuration_of_far_more_values_than_the_files_hold_is_refused_before_they_take_memory(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"vocab_size": 10**12}))
    assert "config.json asks for 64,000,000,030,944 values" in refused(folder)


def test_the_command_line_says_it_in_one_line(capsys, text, tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    with_header(folder / "model.safetensors", {}, length=2**60)
    said = complaint(capsys, *prune_arguments(folder, text, tmp_path / "run"))
    assert "model.safetensors is truncated or broken (its header claims 1,152,921,504,606,846,976 bytes" in said


# --- GGUF ------------------------------------------------------------------------------------------------------------


def gguf_file(path: Path, *, count: int = 0, tensors: int = 0, body: bytes = b"", data: bytes = b"") -> Path:
    head = struct.pack("<4sIQQ", b"GGUF", 3, tensors, count) + body
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def text_of(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text_of(key) + struct.pack("<I", kind) + value


def info(name: bytes, shape: tuple[int, ...], offset: int, kind: int = 0) -> bytes:
    return text_of(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


GGUF = {
    "magic": ({"count": 0, "body": b"x" * 9}, "short|ends|not a little"),
    "entries": ({"count": 2**60}, "claims 1,152,921,504,606,846,976 metadata entries"),
    "tensors": ({"tensors": 2**60}, "claims 1,152,921,504,606,846,976 tensors"),
    "key": ({"count": 1, "body": text_of(b"a" * 20, 2**62)}, "characters of a text"),
    "text": ({"count": 1, "body": entry(b"a", 8, text_of(b"b" * 20, 2**62))}, "characters of a text"),
    "array": ({"count": 1, "body": entry(b"a", 9, struct.pack("<IQ", 6, 2**61))}, "values of an array"),
    "texts": ({"count": 1, "body": entry(b"a", 9, struct.pack("<IQ", 8, 2**60))}, "values of an array"),
    "nested": ({"count": 1, "body": entry(b"a", 9, struct.pack("<IQ", 9, 1))}, "unknown type 9"),
    "type": ({"count": 1, "body": entry(b"a", 77, b"1234")}, "unknown type 77"),
    "twice": ({"count": 2, "body": entry(b"a", 0, b"1") * 2}, "'a' twice"),
    "alignment": ({"count": 1, "body": entry(b"general.alignment", 4, struct.pack("<I", 24))}, "power of two"),
    "layers": ({"count": 1, "body": entry(b"llama.block_count", 4, struct.pack("<I", 2**31))}, "layers, more than"),
    "dims": ({"tensors": 1, "body": info(b"a", (1,) * 9, 0)}, "has 9 dimensions"),
    "kind": ({"tensors": 1, "body": info(b"a", (8,), 0, 999)}, "unknown type 999"),
    "blocks": ({"tensors": 1, "body": info(b"a", (8,), 0, 8), "data": bytes(64)}, "whole blocks"),
    "offset": ({"tensors": 1, "body": info(b"a", (8,), 2**62), "data": bytes(64)}, "where there is room"),
    "size": ({"tensors": 1, "body": info(b"a", (2**40, 2**40), 0), "data": bytes(64)}, "where there is room"),
    "overlap": ({"tensors": 2, "body": info(b"a", (16,), 0) + info(b"b", (8,), 32), "data": bytes(64)}, "'b' lies"),
}


@pytest.mark.parametrize("case", GGUF)
def test_a_gguf_header_is_refused_that_claims_what_the_file_has_not(tmp_path, case):
    options, reason = GGUF[case]
    path = gguf_file(tmp_path / "a.gguf", **options)
    if case == "magic":
        path.write_bytes(b"GGML" + path.read_bytes()[4:])
    with pytest.raises(ValueError, match=reason):
        check_gguf(path)
    with pytest.raises(InputError, match=r"cannot read the configuration of .*a\.gguf"):
        describe_pretrained(str(path))


def test_a_gguf_header_that_fits_its_file_passes(tmp_path):
    body = entry(b"a", 9, struct.pack("<IQ", 8, 2) + text_of(b"x") + text_of(b"")) + entry(b"b", 12, bytes(8))
    tensors = info(b"a", (8,), 0) + info(b"b", (32, 2), 32, 8)
    check_gguf(gguf_file(tmp_path / "a.gguf", count=2, tensors=2, body=body + tensors, data=bytes(32 + 68)))


# --- code in an export -----------------------------------------------------------------------------------------------


@pytest.fixture
def exported(run):
    """A run with a ragged export and its modelling file."""
    assert (run / "model" / "modeling_pruned.py").is_file()
    return run


def test_the_modelling_file_of_this_version_is_run(exported):
    assert read_export(exported / "model", torch.float32) is not None


def test_another_modelling_file_is_not_run_by_any_command(capsys, exported, tmp_path):
    path = exported / "model" / "modeling_pruned.py"
    path.write_text(path.read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    for command in (
        ("verify",),
        ("eval",),
        ("export", "--format", "gguf"),
        ("bench",),
        ("recover", "--recover", "lora"),
    ):
        said = complaint(capsys, command[0], exported, *command[1:])
        assert "has code that this version of Secateur does not write, or not so (modeling_pruned.py)" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("said", ["someone/else--modeling_pruned.Evil", "evil.Model", "..evil.Model", 3, ["a.b"]])
def test_code_elsewhere_is_not_run(exported, tmp_path, said):
    folder = exported / "model"
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    values = json.loads((folder / "config.json").read_text())
    values["auto_map"]["AutoModelForCausalLM"] = said
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="so it is not run"):
        read_export(folder, torch.float32)
    assert not (tmp_path / "ran").exists()


def test_code_that_transformers_runs_unasked_is_not_run_by_any_command(capsys, exported, tmp_path):
    place = exported / "model" / "custom_generate" / "generate.py"
    place.parent.mkdir()
    place.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for command in ("verify", "eval", "bench"):
        assert "does not write, or not so (custom_generate/generate.py)" in complaint(capsys, command, exported)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_asks_for_code_is_refused(capsys, exported):
    path = exported / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["someone/else--t.T"]}}))
    for command in ("verify", "bench"):
        assert "(auto_map of tokenizer_config.json)" in complaint(capsys, command, exported)


def test_a_model_whose_tokenizer_is_code_of_its_own_is_refused_before_learning(capsys, broken, text, tmp_path):
    (broken / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = broken / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [None, "own.Own"]}}))
    said = complaint(capsys, *prune_arguments(broken, text, tmp_path / "new"), "--trust-remote-code")
    assert "the tokenizer of" in said and "code of its own" in said and not (tmp_path / "new" / "model").exists()


def test_an_export_that_lacks_a_weight_is_refused(exported):
    from safetensors.torch import load_file

    path = exported / "model" / "model.safetensors"
    held = load_file(path)
    held.pop("model.norm.weight")
    save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack model\.norm\.weight"):
        read_export(exported / "model", torch.float32)


# --- runs of others --------------------------------------------------------------------------------------------------


def settings_with(path: Path, **changes: object) -> None:
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(values | changes))


COMMANDS = [("learn",), ("plan",), ("export",), ("verify",), ("refit",), ("recover", "--recover", "lora"), ("eval",),
            ("sizes",), ("bench",), ("export", "--format", "gguf"), ("plan", "--compare")]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_run_that_asks_for_code_of_the_model_needs_the_word_for_it_on_every_command(capsys, run, command):
    settings_with(run / "config.yaml", trust_remote_code=True)
    said = complaint(capsys, command[0], run, *command[1:])
    assert f"{run / 'config.yaml'} asks to run code that comes with" in said and "--trust-remote-code" in said


def test_files_of_settings_and_runs_to_go_on_with_need_the_word_too(capsys, run, tmp_path):
    settings_with(run / "config.yaml", trust_remote_code=True)
    for options in (("--config", run / "config.yaml", "--out", tmp_path / "new"), ("--resume", run)):
        assert "say --trust-remote-code" in complaint(capsys, "prune", *options)
    assert not (tmp_path / "new").exists()
    assert secateur("prune", "--resume", run, "--trust-remote-code") == 0


def test_with_the_word_commands_run_and_without_it_a_run_shows(run):
    settings_with(run / "config.yaml", trust_remote_code=True)
    assert secateur("verify", run, "--trust-remote-code") == 0
    assert secateur("report", run) == 0


def test_sizes_of_a_run_ask_like_the_run(capsys, run):
    assert secateur("plan", run, "--sparsity", "0.5") == 0
    settings_with(run / "sizes" / "0.5" / "config.yaml", trust_remote_code=True)
    assert "say --trust-remote-code" in complaint(capsys, "sizes", run)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "checkpoints", "sizes", "model/config.json", "wandb", "wandb/secateur.jsonl"]
)
def test_a_run_whose_links_lead_elsewhere_is_refused(capsys, run, tmp_path, name):
    outside = tmp_path / "outside"
    (run / name).parent.mkdir(exist_ok=True)
    outside.mkdir() if name in ("checkpoints", "sizes", "wandb") else outside.write_text("precious")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    assert f"{name} is a link that leads out of the folder" in complaint(capsys, "learn", run)


def test_out_of_a_run_of_others_is_not_written_to(run, tmp_path):
    settings_with(run / "config.yaml", out=str(tmp_path / "elsewhere"))
    assert secateur("verify", run) == 0 and not (tmp_path / "elsewhere").exists()


# --- tokens and states of training -----------------------------------------------------------------------------------


BLOCKS = {
    "range": lambda t: t["calibration"].__setitem__((0, 0), 10**6),
    "negative": lambda t: t["calibration"].__setitem__((0, 0), -1),
    "dtype": lambda t: t.update(calibration=t["calibration"].long()),
    "shape": lambda t: t.update(calibration=t["calibration"][:, :-1].contiguous()),
    "others": lambda t: t.update(calibration=(t["calibration"] + 1) % 64),
    "lacking": lambda t: t.pop("held_out"),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_stored_tokens_that_are_not_the_runs_are_made_anew(run, case):
    from safetensors.torch import load_file

    path = run / "data.safetensors"
    tensors, said = read_tensors(path)
    before = load_file(path)
    BLOCKS[case](tensors)
    if case in ("range", "negative"):  # with a hash that is right
        said["about"]["fingerprint"] = fingerprint(tensors["calibration"], tensors["held_out"])
    save_file(tensors, path, metadata={"secateur": json.dumps(said)})
    assert secateur("learn", run) == 0
    after = load_file(path)
    assert all(torch.equal(after[name], before[name]) for name in before)


STATES = {
    "z": lambda t: t.update(z=t["z"][:-1].contiguous()),
    "dtype": lambda t: t.update(z=t["z"].double()),
    "more": lambda t: t.update(more=torch.ones(1)),
    "lacking": lambda t: t.pop("theta"),
    "steps": lambda t: t.update(done=torch.tensor(99)),
    "adam": lambda t: t.update({"adam.0.exp_avg": torch.ones(1)}),
    "name": lambda t: t.update({"adam.x": torch.ones(1)}),
}


@pytest.mark.parametrize("case", [*STATES, "about"])
def test_a_state_of_training_with_a_right_digest_that_does_not_fit_is_refused(capsys, run, case):
    from dataclasses import replace

    from secateur.checkpoints import Checkpoints, _read
    from secateur.run import open_run
    from secateur.session import Session
    from secateur.stages import learn_stage

    session = Session(open_run(run))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Checkpoints, "discard", lambda _self: None)
        learn_stage(session)
    checkpoints = session.checkpoints(session.run.checkpoints)
    path = checkpoints._newest_first()[0]
    state = _read(path)
    if case == "about":
        state = replace(state, about={"fixing": {"step": "x"}, "guards": {}})
    else:
        STATES[case](state.tensors)
    checkpoints.save(state)
    said = complaint(capsys, "learn", run)
    assert f"{checkpoints.folder} holds a state that does not fit this training" in said and "delete it" in said
