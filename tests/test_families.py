"""The matrix of architectures: for each, gated logits equal the logits of the exported, sliced and reloaded checkpoint.

The lists below are what the README claims; what can be pruned is found by structure (describe), not by these names.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from secateur.describe import describe
from secateur.export import export
from tiny import LATENT, dense_logits, gated_logits, load, random_plan, tiny, tokens

DENSE = {"first_k_dense_replace": 3}

ORDINARY = """
    apertus arcee cohere cohere2 cwm ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 granite granite_swa
    hunyuan_v1_dense hyperclovax jais2 llama ministral ministral3 mistral nanochat nemotron olmo phi qwen2 qwen3
    seed_oss smollm3 starcoder2 vaultgemma
"""

WHOLE: dict[str, dict[str, Any]] = {
    **{model_type: {} for model_type in ORDINARY.split()},
    "deepseek_v2": LATENT | DENSE,
    "deepseek_v3": LATENT | DENSE,
    "minicpm3": LATENT,
    "youtu": LATENT | {"pad_token_id": None},  # transformers zeroes this type's padding row on every load
}
"""Attention and MLP of every layer."""

NORM_OVER_HEADS = "normalises over all heads together"
FUSED = "queries, keys and values are not three linear maps"
EXPERTS = "mixture of experts"
CHANNELS, GROUPS = {"channels"}, {"kv_groups"}

PARTLY: dict[str, tuple[set[str], str]] = {
    "olmo2": (CHANNELS, NORM_OVER_HEADS),
    "olmo3": (CHANNELS, NORM_OVER_HEADS),
    "phi3": (CHANNELS, FUSED),
    "gpt_neox": (CHANNELS, FUSED),
    "persimmon": (CHANNELS, FUSED),
    "helium": (CHANNELS, "has o_proj.weight of shape"),
    "stablelm": (CHANNELS, "has q_proj.weight of shape"),
    "diffllama": (CHANNELS, "fits neither one head nor a row of heads"),
    "doge": (CHANNELS, "expected one linear map after"),
    "lfm2": (GROUPS, "has w1.weight of shape"),
    "gpt_oss": (GROUPS, EXPERTS),
    "mixtral": (GROUPS, EXPERTS),
    "qwen2_moe": (GROUPS, EXPERTS),
    "qwen3_moe": (GROUPS, EXPERTS),
}
"""What can be pruned, and why the rest stays whole."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "multi-head": ("llama", {"num_key_value_heads": 6}),
    "multi-query": ("llama", {"num_key_value_heads": 1}),
    "multi-query with biases": ("qwen2", {"num_key_value_heads": 1}),
    "multi-head with q norm": ("qwen3", {"num_key_value_heads": 6}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("gemma2", {"tie_word_embeddings": False}),
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "head size of its own": ("mistral", {"head_dim": 12}),
    "head size unsaid": ("qwen2", {"head_dim": None}),
    "latent queries": ("deepseek_v3", LATENT | DENSE | {"q_lora_rank": None}),
    "norm a head": ("cohere", {"use_qk_norm": True}),
    "buffers filled by the model": (
        "falcon_h1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16},
    ),
}


def build(model_type: str) -> PreTrainedModel:
    changes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6} if model_type == "diffllama" else {}
    return tiny(model_type, **WHOLE.get(model_type, changes))


def check_exactness(model: PreTrainedModel, folder: Path, close: tuple[str, ...] = ()) -> None:
    """The promise of the issue: the exported checkpoint computes what the gated model computed."""
    description = describe(model)
    plan = random_plan(description, close=tuple(g.name for g in description.groups if g.name in close))
    gated = gated_logits(model, description, plan, tokens())
    assert (gated - dense_logits(model, tokens())).abs().max() > 1e-3, "gates that change nothing prove nothing"
    export(model, None, description, plan, folder)
    exported = load(folder, dtype=torch.float32)
    assert sum(p.numel() for p in exported.parameters()) < sum(p.numel() for p in model.parameters())
    assert (gated - dense_logits(exported, tokens())).abs().max() < 1e-5


ONE_OF_EACH = ("layers.0.heads", "layers.0.kv_groups", "layers.1.channels")
A_WHOLE_LAYER = ("layers.1.heads", "layers.1.kv_groups", "layers.1.channels")


@pytest.mark.parametrize("close", [(), ONE_OF_EACH], ids=["half", "closed sublayers"])
@pytest.mark.parametrize("model_type", [*WHOLE, *PARTLY])
def test_exported_logits_equal_gated_logits(model_type: str, close: tuple[str, ...], tmp_path: Path) -> None:
    check_exactness(build(model_type), tmp_path / "model", close)


@pytest.mark.parametrize("close", [(), ONE_OF_EACH, A_WHOLE_LAYER], ids=["half", "closed sublayers", "closed layer"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_exact(variant: str, close: tuple[str, ...], tmp_path: Path) -> None:
    model_type, changes = VARIANTS[variant]
    check_exactness(tiny(model_type, **changes), tmp_path / "model", close)


@pytest.mark.parametrize("model_type", WHOLE)
def test_every_layer_can_be_pruned_whole(model_type: str) -> None:
    description = describe(build(model_type))
    assert not description.refusals
    assert [g.layer for g in description.groups] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("model_type", PARTLY)
def test_what_stays_whole_is_named_with_the_reason(model_type: str) -> None:
    kinds, reason = PARTLY[model_type]
    description = describe(build(model_type))
    assert {g.kind for g in description.groups} == kinds
    assert any(reason in r.reason for r in description.refusals), description.refusals
    assert all(r.where.startswith(description.layers) for r in description.refusals)
