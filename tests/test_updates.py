"""Other weights in an exported checkpoint: only they change, all together or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from runs import leftovers
from secateur import updates
from secateur.describe import describe
from secateur.export import export
from secateur.files import InputError
from secateur.updates import rewrite_weights, updates_of
from tiny import random_plan, tiny

NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(params=[("5GB", torch.float32, False), ("20KB", torch.bfloat16, True)], ids=["whole", "shards"])
def folder(request, tmp_path):
    """Checkpoints in one file and in many, the latter in bfloat16 with tied embeddings."""
    shard, dtype, tied = request.param
    model = tiny("llama", tie_word_embeddings=tied)
    description = describe(model)
    plan = random_plan(description, close=("layers.1.channels",))
    export(
        model,
        None,
        description,
        plan,
        tmp_path / "model",
        card=lambda _stock: "A card",
        max_shard_size=shard,
        dtype=dtype,
    )
    return tmp_path / "model"


def tensors_of(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_tensors_given_are_replaced_in_the_dtype_they_had_and_nothing_else_changes(folder):
    before, files = tensors_of(folder), contents(folder)
    new = torch.randn(before[NAME].shape)
    rewrite_weights(folder, {NAME: new}, "refit", {"README.md": "Another card"})
    after = tensors_of(folder)
    assert torch.equal(after[NAME], new.to(before[NAME].dtype)) and after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before if name != NAME)
    written = contents(folder)
    weights = {name for name in files if name.endswith(".safetensors")}
    assert written.keys() == files.keys() and (folder / "README.md").read_text() == "Another card"
    changed = {name for name in files if written[name] != files[name]}
    (shard,) = changed & weights
    assert changed == {shard, "config.json", "README.md"}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_model_rewritten_with_its_own_tensors_is_the_same_to_the_byte_and_loads(folder):
    files = contents(folder)
    dtype = next(iter(tensors_of(folder).values())).dtype
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    rewrite_weights(folder, dict(model.named_parameters()), "recover-full")
    written = contents(folder)
    assert {name for name in files if written[name] != files[name]} == {"config.json"}
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert again.dtype == dtype and sum(p.numel() for p in again.parameters()) == model.num_parameters()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as held:
            assert held.metadata() == {"format": "pt"}


def test_the_configuration_lists_what_was_done_in_order(folder):
    config = json.loads((folder / "config.json").read_text())
    assert updates_of(folder) == [] and updates_of(folder / "nowhere") == []
    rewrite_weights(folder, {}, "refit")
    rewrite_weights(folder, {}, "recover-lora")
    assert updates_of(folder) == ["refit", "recover-lora"]
    now = json.loads((folder / "config.json").read_text())
    assert now["secateur"].pop("updates") == ["refit", "recover-lora"] and now == config


def test_a_broken_configuration_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not readable JSON"):
        updates_of(folder)


def test_tensors_that_do_not_belong_to_the_checkpoint_are_refused_and_it_stays_as_it_was(folder):
    files = contents(folder)
    for tensors in ({"model.layers.9.weight": torch.zeros(1)}, {NAME: torch.zeros(3, 3)}):
        with pytest.raises(AssertionError):
            rewrite_weights(folder, tensors, "refit")
    assert contents(folder) == files and updates_of(folder) == []


@pytest.mark.parametrize("moment", ["saving", "renaming"])
def test_an_interruption_leaves_the_checkpoint_as_it_was(folder, monkeypatch, moment):
    files, rename = contents(folder), Path.replace

    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if moment == "saving":
            patched.setattr(updates, "save_file", interrupt)
        else:
            once = iter([interrupt])

            def replace(source, target):
                if target.name == "model":
                    for act in once:
                        act()
                return rename(source, target)

            patched.setattr(Path, "replace", replace)
        rewrite_weights(folder, {NAME: torch.zeros(tensors_of(folder)[NAME].shape)}, "refit")
    assert contents(folder) == files and leftovers(folder.parent) == []
