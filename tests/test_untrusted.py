"""Files of others: what is wrong in them is told in one line, what is right is read, and no code of theirs runs."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runs import complaint, prune_arguments, write_checkpoint
from secateur.files import InputError, read_json
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
    from secateur.config import load_config

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
    [({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000"), ({"a": json.loads(nested(80))}, "deeper")],
)
def test_a_configuration_that_would_take_for_ever_is_refused(tmp_path, changes, reason):
    folder = write_checkpoint(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(InputError, match=reason):
        describe_pretrained(str(folder))


def test_the_command_line_says_it_in_one_line(capsys, text, tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    with_header(folder / "model.safetensors", {}, length=2**60)
    said = complaint(capsys, *prune_arguments(folder, text, tmp_path / "run"))
    assert "model.safetensors is truncated or broken (its header claims 1,152,921,504,606,846,976 bytes" in said


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
        assert "asks for code that is not what this version of Secateur writes (modeling_pruned.py)" in said
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


def test_an_export_that_lacks_a_weight_is_refused(exported):
    from safetensors.torch import load_file

    path = exported / "model" / "model.safetensors"
    held = load_file(path)
    held.pop("model.norm.weight")
    save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack model\.norm\.weight"):
        read_export(exported / "model", torch.float32)
