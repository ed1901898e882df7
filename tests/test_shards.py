"""Shards written tensor by tensor: the same files, to the byte, as safetensors writes of tensors in memory."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.shards import write_shards


def tensors():
    made = torch.Generator().manual_seed(0)
    return {
        "model.norm": torch.rand(7, generator=made),
        "model.b.weight": torch.rand(16, 33, generator=made).bfloat16(),
        "model.a.weight": torch.rand(5, 3, 4, generator=made).bfloat16(),
        "model.ids": torch.arange(9),
        "model.half": torch.rand(3, generator=made).half(),
        "model.mask": torch.tensor([True, False, True]),
        "model.one": torch.tensor(2.5),
        'model."ö': torch.arange(6, dtype=torch.int32),
    }


def on_meta(held):
    return {name: tensor.to("meta") for name, tensor in held.items()}


def test_one_file_is_what_safetensors_writes(tmp_path):
    held = tensors()
    write_shards(tmp_path, on_meta(held), reversed(list(held.items())), "5GB")
    save_file(held, tmp_path / "other", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "other").read_bytes()
    assert [path.name for path in tmp_path.glob("*.json")] == []


def test_several_files_hold_what_the_index_says(tmp_path):
    held = tensors()
    write_shards(tmp_path, on_meta(held), held.items(), 700)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and index["weight_map"].keys() == held.keys()
    for file in files:
        found = load_file(tmp_path / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == found.keys()
        assert all(torch.equal(found[name], held[name]) for name in found)
        save_file(found, tmp_path / "other", metadata={"format": "pt"})
        assert (tmp_path / file).read_bytes() == (tmp_path / "other").read_bytes()


def test_what_was_not_laid_out_is_never_written(tmp_path):
    held = tensors()
    with pytest.raises(AssertionError, match="not as laid out"):
        write_shards(tmp_path, on_meta(held), [("model.norm", torch.rand(8))], "5GB")
    with pytest.raises(AssertionError, match="tensors missing"):
        write_shards(tmp_path, on_meta(held), [("model.norm", held["model.norm"])], "5GB")
