"""What is found in a model, and what is refused, by name and with the reason."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.describe import check_causal, describe
from secateur.export import export
from secateur.files import InputError
from secateur.load import describe_pretrained
from secateur.units import unit_params
from tiny import LATENT, load, random_plan, tiny


def test_units_and_sizes_of_grouped_queries() -> None:
    groups = {g.name: g for g in describe(tiny("llama")).groups}
    attention, mlp = groups["layers.1.kv_groups"], groups["layers.1.channels"]
    assert attention.units == 3
    assert attention.sizes == (("num_attention_heads", 2), ("num_key_value_heads", 1))
    assert attention.gate_at == "model.layers.1.self_attn.o_proj"
    assert mlp.units == 40
    assert mlp.sizes == (("intermediate_size", 1),)


def test_multi_query_units_are_query_heads_that_share_keys_and_values() -> None:
    group = describe(tiny("llama", num_key_value_heads=1)).groups[0]
    assert (group.kind, group.units, group.sizes) == ("heads", 6, (("num_attention_heads", 1),))
    assert group.shared == ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight")


def test_a_latent_head_is_a_unit_and_the_latent_is_shared() -> None:
    group = describe(tiny("deepseek_v3", first_k_dense_replace=3, **LATENT)).groups[0]
    assert (group.kind, group.units) == ("heads", 6)
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa.weight" in group.shared
    assert {s.param.split(".")[-2] for s in group.slices} == {"q_b_proj", "kv_b_proj", "o_proj"}


def test_sinks_are_cut_with_their_heads_even_if_there_are_as_many_as_entries_in_a_head() -> None:
    description = describe(tiny("gpt_oss", head_dim=6))
    assert "model.layers.0.self_attn.sinks" in {s.param for s in description.groups[0].slices}


def test_removing_every_unit_removes_the_unit_parameters() -> None:
    description = describe(tiny("llama"))
    per_layer = (48 + 24 + 24) * 48 + 48 * 48 + 3 * 40 * 48
    assert description.unit_parameters == 3 * per_layer
    assert unit_params(description.groups[0], description.shapes) == per_layer // 3 - 40 * 48


def test_the_meta_device_is_enough(tmp_path: Path) -> None:
    model = tiny("qwen3")
    model.config.save_pretrained(tmp_path)
    from_config, config = describe_pretrained(str(tmp_path))
    assert from_config == describe(model)
    assert config.model_type == "qwen3"


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_head_is_multiplied_once_whether_tied_or_not(tied: bool) -> None:
    description = describe(tiny("llama", tie_word_embeddings=tied))
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert description.matmuls[head] == 1.0
    assert ("lm_head.weight" in description.shapes) is not tied
    assert len(description.matmuls) == 3 * 7 + 1


def test_cached_rows() -> None:
    assert [n.split(".")[-2] for n in describe(tiny("llama")).cached] == ["k_proj", "v_proj"] * 3
    assert [n.split(".")[-2] for n in describe(tiny("olmo2")).cached] == ["k_proj", "v_proj"] * 3, "pruned or not"
    latent = describe(tiny("deepseek_v3", first_k_dense_replace=3, **LATENT))
    assert [n.split(".")[-2] for n in latent.cached] == ["kv_a_proj_with_mqa"] * 3


def test_a_pruned_model_can_be_described_again(tmp_path: Path) -> None:
    model = tiny("llama")
    description = describe(model)
    export(model, None, description, random_plan(description, close=("layers.0.kv_groups",)), tmp_path / "model")
    again = describe(load(tmp_path / "model"))
    assert [g.units for g in again.groups] == [26, 2, 14, 2, 20]
    assert describe_pretrained(str(tmp_path / "model"), trust_remote_code=True)[0] == again


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("t5", "t5 is an encoder–decoder model"),
        ("bart", "bart is an encoder–decoder model"),
        ("gemma3", "gemma3 is a multimodal model"),
        ("vit", "vit is not a causal language model"),
    ],
)
def test_models_that_are_not_causal_language_models(model_type: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_causal(AutoConfig.for_model(model_type))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bert", "bert attends both ways"),
        ("gpt2", "transformer.h.0.attn: queries, keys and values are not three linear maps"),
        ("bloom", "transformer.h.0.self_attention: queries, keys and values are not three linear maps"),
        ("bitnet", "attn_sub_norm.weight normalises over all heads.*'ffn_sub_norm.weight'. are not those of"),
        ("mamba", "backbone.layers.0.mixer: parameters .*'A_log'"),
        ("gemma4_text", "gemma4_text has layers of different head_dim from the start"),
    ],
)
def test_models_in_which_nothing_can_be_pruned(model_type: str, reason: str) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 128}
    config = AutoConfig.for_model(model_type, num_hidden_layers=2, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=reason) as error:
        describe(model)
    assert "\n" not in str(error.value)


def refusals(model: nn.Module) -> dict[str, str]:
    return {r.where.removeprefix("model.layers."): r.reason for r in describe(model).refusals}


def test_weights_that_two_layers_share() -> None:
    model = tiny("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    assert refusals(model) == dict.fromkeys(("0.mlp", "2.mlp"), "its weights serve more than one sublayer")


def test_keys_and_values_that_other_layers_read() -> None:
    model = tiny("llama")
    del model.model.layers[2].self_attn.k_proj, model.model.layers[2].self_attn.v_proj
    assert set(refusals(model)) == {"0.self_attn", "1.self_attn", "2.self_attn"}
    model = tiny("llama", num_kv_shared_layers=1)
    assert set(refusals(model)) == {"0.self_attn", "1.self_attn", "2.self_attn"}


def test_gemma_3n() -> None:
    """Its last layers read the keys and values of earlier ones, and its MLPs compare channels with their mean."""
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    sizes = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "laurel_rank": 8}
    model = tiny("gemma3n_text", num_kv_shared_layers=2, **layers, **sizes)
    with pytest.raises(InputError, match=r"self_attn: layers share keys and values.*mlp: no single configuration key"):
        describe(model)


def test_a_norm_inside_the_mlp() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.norm = nn.RMSNorm(40)
    model.model.layers[1].mlp.norm = nn.RMSNorm(40, elementwise_affine=False)
    reasons = refusals(model)
    assert "'norm.weight'" in reasons["0.mlp"]
    assert "do not treat every channel by itself" in reasons["1.mlp"]


def test_a_norm_over_all_heads_before_the_writer() -> None:
    model = tiny("llama")
    model.model.layers[0].self_attn.norm = nn.RMSNorm(48)
    assert "norm.weight normalises over all heads together" in refusals(model)["0.self_attn"]


def test_a_width_that_the_configuration_does_not_say() -> None:
    model = tiny("llama")
    model.config.intermediate_size = 41
    assert "no single configuration key holds the width 40" in refusals(model)["0.mlp"]
    model = tiny("llama")
    model.config.num_key_value_heads = 6
    assert refusals(model)["0.self_attn"] == "num_key_value_heads is 6, but the weights say 3"
