"""What makes passes faster changes no gate, and leaves the model and the process as they were."""

import subprocess
import sys

import pytest
import torch

from runs import described, random_tokens
from secateur.learn import learn
from secateur.recipes import auto_recipe
from secateur.speed import lowered
from tiny import MIXTURE, tiny, tokens

BFLOAT16 = {"device_type": "cpu", "dtype": torch.bfloat16, "cache_enabled": False}


def learned(model):
    description, limits = described(model, 0.3, "model")
    return learn(
        model, description.groups, random_tokens(8, 12), random_tokens(2, 12, seed=9), limits, auto_recipe(4), steps=4,
        batch_size=2,
    )  # fmt: skip


@pytest.mark.parametrize("kind, changes", [("llama", {}), ("gemma3_text", {}), ("qwen3_moe", MIXTURE)])
def test_gates_learned_with_lowered_weights_are_bit_identical(kind, changes):
    model = tiny(kind, **changes).requires_grad_(False)
    with torch.autocast(**BFLOAT16):
        expected = learned(model)
        with lowered(model):
            found = learned(model)
    assert torch.equal(found.z_N, expected.z_N) and torch.equal(found.value_N, expected.value_N)


def test_weights_are_lowered_within_the_context_alone():
    model = tiny("llama").requires_grad_(False)
    before = {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()}
    with torch.autocast(**BFLOAT16), pytest.raises(KeyboardInterrupt), lowered(model):
        low = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
        raise KeyboardInterrupt
    layers = {name for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}
    assert low == layers
    assert {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()} == before


def test_nothing_is_lowered_without_autocast_nor_what_is_trained():
    model = tiny("llama").requires_grad_(False)
    with lowered(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.autocast(**BFLOAT16), lowered(model.requires_grad_(True)):
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_weights_that_other_modules_read_are_not_lowered():
    model = tiny("llama", tie_word_embeddings=True).requires_grad_(False)
    projection = model.model.layers[0].mlp.up_proj
    model.model.layers[1].kept = torch.nn.ParameterList([projection.weight])
    with torch.autocast(**BFLOAT16):
        logits = model(tokens()).logits
        with lowered(model):
            assert projection.weight.dtype == model.get_input_embeddings().weight.dtype == torch.float32
            assert torch.equal(model(tokens()).logits, logits)


FAULTS = """
import resource, torch
from secateur.speed import memory_kept

def faults():
    found = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = torch.ones(2**24)
        del block
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found[1:])

outside = faults()
with memory_kept():
    within = faults()
print(outside, within, faults())
"""
"""Page faults of a process while it takes 64 MB, having freed as much just before: the fewest of several times, as a
virtual machine's host may take idle pages away."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_memory_stays_with_the_process_within_the_context_alone():
    seen = []
    for _ in range(6):  # on some machines a process in four lays its heap out so that nothing can be kept
        done = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
        outside, within, after = map(int, done.stdout.split())
        if within * 10 < min(outside, after):
            return
        seen.append((outside, within, after))
    pytest.fail(f"page faults outside, within and after: {seen}")
