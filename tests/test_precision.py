"""`--precision`: learning in bfloat16 where it pays, and nowhere else."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from runs import gates_of, prune_arguments, same_gates, secateur
from secateur.load import autocast

CPU = torch.device("cpu")


def product(context):
    with context:
        return nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype


def test_float32_leaves_the_arithmetic_to_the_weights():
    assert product(autocast(CPU, "float32")) == torch.float32


def test_bfloat16_multiplies_in_it():
    assert product(autocast(CPU, "bfloat16")) == torch.bfloat16


@pytest.mark.parametrize(
    ("processor", "dtype"),
    [({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16)],
)
def test_auto_asks_the_processor(monkeypatch, processor, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    assert product(autocast(CPU, "auto")) == dtype


def test_weights_that_are_trained_are_not_remembered_from_the_first_step():
    weight, x = nn.Parameter(torch.ones(1, 1)), torch.ones(1, 1)
    with autocast(CPU, "bfloat16"):
        before = nn.functional.linear(x, weight).item()
        weight.data += 1.0
        assert nn.functional.linear(x, weight).item() == before + 1.0


def test_gates_are_learned_in_it_but_the_export_is_verified_and_judged_in_float32(dense, text, tmp_path):
    for name in ("float32", "bfloat16"):
        assert secateur(*prune_arguments(dense, text, tmp_path / name, precision=name)) == 0
        (comparison,) = json.loads((tmp_path / name / "verify.json").read_text())["comparisons"]
        assert comparison["dtype"] == "float32" and comparison["max_difference"] < 1e-4
    assert not same_gates(tmp_path / "float32", tmp_path / "bfloat16")
    exact, rough = (gates_of(tmp_path / name) for name in ("float32", "bfloat16"))
    assert all(exact[name].dtype == rough[name].dtype == torch.float32 for name in exact)
    losses = [
        json.loads((tmp_path / name / "eval.json").read_text())["dense"]["loss"] for name in ("float32", "bfloat16")
    ]
    assert losses[0] == losses[1]


def test_recovery_in_bfloat16_changes_weights_that_stay_float32(run):
    before = load_file(run / "model" / "model.safetensors")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("precision: auto", "precision: bfloat16"))
    assert secateur("recover", run, "--recover", "lora", "--recover-steps", "3", "--recover-lr", "0.01") == 0
    after = load_file(run / "model" / "model.safetensors")
    moved = [name for name in before if "_proj" in name and not torch.equal(before[name], after[name])]
    assert moved and all(after[name].dtype == torch.float32 for name in moved)
