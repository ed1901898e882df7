"""The matrix of architectures: for each, gated logits equal the logits of the exported, sliced and reloaded checkpoint.

The lists below are what the README claims; what can be pruned is found by structure (describe), not by these names.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from secateur.depth import with_depth
from secateur.describe import Description, describe
from secateur.export import as_shipped, export
from secateur.families import build as build_on
from secateur.files import InputError
from secateur.selection import Depth
from tiny import LATENT, MIXTURE, dense_logits, gated_logits, load, random_plan, tiny, tokens

DENSE = {"first_k_dense_replace": 3}
ONE_KEY = {"moe_intermediate_size": None}
"""Of families whose experts' width is `intermediate_size`."""
ONE_GROUP = MIXTURE | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
"""A router that is free to choose. The first layer is dense."""
SIX = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 6)
GROUPED = ONE_GROUP | SIX | {"n_group": 3, "topk_group": 2}

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

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **{model_type: (model_type, MIXTURE | ONE_KEY) for model_type in ("gpt_oss", "mixtral", "olmoe")},
    **{model_type: (model_type, MIXTURE) for model_type in ("qwen2_moe", "qwen3_moe")},
    "deepseek_v2": ("deepseek_v2", LATENT | ONE_GROUP),
    "deepseek_v2, groups of experts": ("deepseek_v2", LATENT | GROUPED | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", LATENT | ONE_GROUP),
    "deepseek_v3, groups of experts": ("deepseek_v3", LATENT | GROUPED | {"norm_topk_prob": False}),
    "glm4_moe": ("glm4_moe", ONE_GROUP),
    "deepseek": ("deepseek", MIXTURE | {"first_k_dense_replace": 1, "num_key_value_heads": 6}),
    "qwen3_moe, weights as they are": ("qwen3_moe", MIXTURE | {"norm_topk_prob": False}),
}
"""Routed and shared experts."""

NORM_OVER_HEADS = "normalises over all heads together"
FUSED = "queries, keys and values are not three linear maps"
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


def check_exactness(
    model: PreTrainedModel,
    folder: Path,
    close: tuple[str, ...] = (),
    description: Description | None = None,
    **options: Any,
) -> None:
    """The promise of the issue: the exported checkpoint computes what the gated model computed."""
    description = description or describe(model)
    plan = random_plan(description, close=tuple(g.name for g in description.groups if g.name in close), **options)
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


CLOSED = ("layers.0.attention", "layers.1.mlp", "layers.2.attention", "layers.2.mlp")


@pytest.mark.parametrize("depth", ["joint", "alone"])
@pytest.mark.parametrize("model_type", [*WHOLE, *PARTLY])
def test_sublayers_with_gates_of_their_own_are_exact(model_type: str, depth: Depth, tmp_path: Path) -> None:
    model = build(model_type)
    description = with_depth(describe(model), model, depth)
    with torch.device("meta"):
        skeleton = build_on(model.config)
    assert with_depth(describe(skeleton), skeleton, depth) == description, "no weights are needed to see it"
    check_exactness(model, tmp_path / "closed", CLOSED, description)
    open_ones = () if depth == "joint" else tuple(name for name in CLOSED if "2" not in name)
    check_exactness(model, tmp_path / "open", open_ones, description)


@pytest.mark.parametrize("variant", [*VARIANTS, *(family for family in MIXTURES if family != "olmoe")])
def test_variants_and_mixtures_with_gates_of_sublayers_are_exact(variant: str, tmp_path: Path) -> None:
    model_type, changes = VARIANTS.get(variant) or MIXTURES[variant]
    model = tiny(model_type, **changes)
    description = with_depth(describe(model), model, "joint")
    assert any(g.kind == "attention" for g in description.groups)
    check_exactness(model, tmp_path / "model", CLOSED, description)


@pytest.mark.parametrize("close", [(), ONE_OF_EACH, A_WHOLE_LAYER], ids=["half", "closed sublayers", "closed layer"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_exact(variant: str, close: tuple[str, ...], tmp_path: Path) -> None:
    model_type, changes = VARIANTS[variant]
    check_exactness(tiny(model_type, **changes), tmp_path / "model", close)


MIXTURE_CASES: dict[str, dict[str, Any]] = {
    "half": {},
    "closed experts": {"close_experts": (1, 3)},
    "one expert left": {"close_experts": (0, 1, 3, 4, 5)},
    "whole experts": {"share": 1.0, "close_experts": (0, 4)},
    "closed sublayers": {"close": ("layers.1.expert_channels", "layers.2.shared_channels", "layers.0.kv_groups")},
    "uniform": {"shape": "uniform"},
}


WITH_TIED = ("deepseek", "deepseek_v2", "deepseek_v3", "glm4_moe")
WITH_SHARED = ("qwen2_moe", "deepseek", "deepseek_v2", "deepseek_v3", "glm4_moe")

WITH_BIASES = ("gpt_oss", "whole experts")
"""Experts with biases give these without any channel, too: none can go, and nothing becomes smaller."""


@pytest.mark.parametrize("units", [None, ()], ids=["all units", "experts only"])
@pytest.mark.parametrize(("family", "case"), [pair for pair in product(MIXTURES, MIXTURE_CASES) if pair != WITH_BIASES])
def test_mixtures_are_exact(family: str, case: str, units: tuple[()] | None, tmp_path: Path) -> None:
    model_type, changes = MIXTURES[family]
    model = tiny(model_type, **changes)
    description = describe(model) if units is None else describe(model).only(units)
    if case == "uniform" and units == () and model_type in WITH_TIED:
        with pytest.raises(InputError, match="derives the shared experts' width"):
            description.check_shape("uniform")
        return
    description.check_shape("uniform" if case == "uniform" else "ragged")
    check_exactness(model, tmp_path / "model", description=description, **MIXTURE_CASES[case])


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "glm4_moe", "deepseek", "mixtral"])
def test_what_was_pruned_can_be_pruned_again(family: str, tmp_path: Path) -> None:
    model_type, changes = MIXTURES[family]
    model = tiny(model_type, **changes | {"num_experts_per_tok": 2})
    description = describe(model)
    export(model, None, description, random_plan(description, close_experts=(1,), share=0.8), tmp_path / "once")
    once = load(tmp_path / "once", dtype=torch.float32)
    again = describe(once)
    assert {g.name for g in again.groups} == {g.name for g in description.groups}
    check_exactness(once, tmp_path / "twice", description=again, close_experts=(2,), share=0.7, seed=5)


def test_biases_of_routers_keep_their_precision(tmp_path: Path) -> None:
    model_type, changes = MIXTURES["deepseek_v3"]
    model = tiny(model_type, **changes)
    bias = model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    bias.copy_(7.0 + 0.003 * torch.arange(len(bias)))
    description = describe(model)
    export(model, None, description, random_plan(description), tmp_path / "model", dtype=torch.bfloat16)
    exported = load(tmp_path / "model", dtype=torch.bfloat16)
    kept = exported.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    assert torch.equal(kept.float(), bias)


@pytest.mark.parametrize("family", MIXTURES)
def test_weights_go_by_the_names_that_stock_checkpoints_have(family: str, tmp_path: Path) -> None:
    """Servers read these; Mixtral's router, for one, has another name in checkpoints than in transformers' model."""
    model = tiny(MIXTURES[family][0], **MIXTURES[family][1])
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stock = set(file.keys())
    shipped = {name for name, _ in as_shipped(model, model.state_dict(keep_vars=True).items())}
    assert shipped - {"lm_head.weight"} == stock - {"lm_head.weight"}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3, groups of experts"])
def test_dropped_experts_are_passed_over_by_every_implementation(
    family: str, implementation: str, tmp_path: Path
) -> None:
    model_type, changes = MIXTURES[family]
    model = tiny(model_type, **changes)
    description = describe(model)
    plan = random_plan(description, close_experts=(0, 2))
    export(model, None, description, plan, tmp_path / "model")
    exported = load(tmp_path / "model", dtype=torch.float32, experts_implementation=implementation)
    stored = exported.get_submodule("model.layers.1.mlp.experts").down_proj
    assert len(stored) == model.get_submodule("model.layers.1.mlp.experts").num_experts - 2
    gated = gated_logits(model, description, plan, tokens())
    assert (gated - dense_logits(exported, tokens())).abs().max() < 1e-5


@pytest.mark.parametrize("family", MIXTURES)
def test_everything_in_a_mixture_can_be_pruned(family: str) -> None:
    model_type, changes = MIXTURES[family]
    description = describe(tiny(model_type, **changes))
    shared = {"shared_channels"} if model_type in WITH_SHARED else set()
    heads = {"olmoe": set()}.get(model_type, {"heads" if model_type.startswith("deepseek") else "kv_groups"})
    assert {g.kind for g in description.groups if g.layer == 1} == {"expert_channels"} | shared | heads
    experts = {"norm" in r.reason for r in description.refusals}
    assert experts == ({True} if model_type == "olmoe" else set())


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
