"""Learning with weights that lie outside of the device's memory: the same gates."""

import json

import pytest
import torch

from runs import complaint, leftovers, prune_arguments, same_gates, secateur, write_checkpoint, write_texts
from secateur import session as sessions
from secateur.load import load
from test_families import MIXTURES
from tiny import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    return write_checkpoint(folder / "dense", torch.bfloat16), write_texts(folder / "texts.jsonl")


def learned(made, folder, **options):
    return secateur(*prune_arguments(*made, folder, precision="float32", **options))


def test_gates_are_those_of_the_ordinary_run(made, tmp_path, monkeypatch):
    placed = []

    def watched(*arguments):
        loaded = load(*arguments)
        placed.append({name.split(".")[1]: p.is_meta for name, p in loaded.model.named_parameters() if "." in name})
        return loaded

    assert learned(made, tmp_path / "ordinary") == 0
    monkeypatch.setattr(sessions, "load", watched)
    assert learned(made, tmp_path / "offloaded", offload="disk") == 0
    assert placed[0]["layers"] and not placed[0]["embed_tokens"], "layers on disk, the rest in memory"
    assert not any(placed[1].values()), "all in memory for what follows"
    assert same_gates(tmp_path / "ordinary", tmp_path / "offloaded")
    files = [tmp_path / run / "model" / "model.safetensors" for run in ("ordinary", "offloaded")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads((tmp_path / "offloaded" / "verify.json").read_text())["passed"]
    assert not leftovers(tmp_path / "offloaded")


def test_experts_are_offloaded_too(tmp_path):
    from runs import SIZES, small_tokenizer

    model_type, changes = MIXTURES["qwen3_moe"]
    folder = tmp_path / "dense"
    tiny(model_type, **changes | {"vocab_size": SIZES["vocab_size"]}).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    texts = write_texts(tmp_path / "texts.jsonl")
    for name, offload in (("a", "none"), ("b", "disk")):
        assert learned((folder, texts), tmp_path / name, offload=offload) == 0
    assert same_gates(tmp_path / "a", tmp_path / "b")


def test_what_makes_no_sense_is_one_line(made, tmp_path, capsys):
    said = complaint(capsys, *prune_arguments(*made, tmp_path / "a", offload="cpu", device="cpu"))
    assert "--offload cpu is for accelerators" in said and "--offload disk" in said
    said = complaint(capsys, *prune_arguments(*made, tmp_path / "b", offload="disk", method="magnitude"))
    assert "--offload is for learning" in said
    said = complaint(capsys, *prune_arguments(*made, tmp_path / "c", offload="disk"), "--shard")
    assert "leave it or --offload out" in said
