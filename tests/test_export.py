"""The exported folder: what is in it, and that users can do with it what they do with any checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StaticCache,
)
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from runs import described, random_tokens, small_llama, small_tokenizer
from secateur.describe import Description, describe
from secateur.export import export
from secateur.files import InputError
from secateur.modeling_pruned import ClosedAttention
from secateur.plan import Plan
from tiny import LATENT, dense_logits, gated_logits, load, random_plan, tiny, tokens

CLOSED = ("layers.0.kv_groups", "layers.0.heads", "layers.1.channels")
GENERATING: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "deepseek_v3": LATENT | {"first_k_dense_replace": 3},
    "qwen3": {},
}


def pruned(
    folder: Path, model_type: str = "llama", close: tuple[str, ...] = CLOSED, shape: str = "ragged", **changes: Any
) -> tuple[PreTrainedModel, Description, Plan]:
    model = tiny(model_type, **changes)
    description = describe(model)
    plan = random_plan(description, close=close, shape=shape)
    export(model, None, description, plan, folder)
    return model, description, plan


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w2")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


# --- use -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("close", [(), CLOSED], ids=["half", "closed sublayers"])
@pytest.mark.parametrize("model_type", GENERATING)
def test_generation_is_the_same_with_and_without_a_cache(
    model_type: str, close: tuple[str, ...], tmp_path: Path
) -> None:
    pruned(tmp_path / "model", model_type, close, **GENERATING[model_type])
    model = load(tmp_path / "model")
    arguments: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False}
    cached = model.generate(tokens(), **arguments)
    assert torch.equal(cached, model.generate(tokens(), use_cache=False, **arguments))
    assert torch.equal(cached, model.generate(tokens(), cache_implementation="static", **arguments))
    assert cached.shape == (2, 24)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_closed_attention_fills_the_cache_under_either_name_that_transformers_has_for_it(name: str) -> None:
    attention = ClosedAttention(tiny("llama").model.layers[1].self_attn, "o_proj")
    cache = DynamicCache()
    out, weights = attention(torch.ones(2, 5, 48), **{name: cache})
    assert cache.get_seq_length(1) == 5 and not out.any() and weights is None


@pytest.mark.parametrize("close", [(), CLOSED], ids=["half", "closed sublayers"])
@pytest.mark.parametrize("model_type", GENERATING)
def test_a_left_padded_batch_generates_what_its_prompts_generate_alone(
    model_type: str, close: tuple[str, ...], tmp_path: Path
) -> None:
    pruned(tmp_path / "model", model_type, close, **GENERATING[model_type])
    model = load(tmp_path / "model")
    arguments: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    prompts = [tokens(1, 5, seed=3), tokens(1, 11, seed=4)]
    padded = torch.zeros(2, 11, dtype=torch.long)
    for row, prompt in zip(padded, prompts, strict=True):
        row[-prompt.shape[1] :] = prompt[0]
    batch = model.generate(padded, attention_mask=(padded != 0).long(), **arguments)
    for row, prompt in zip(batch, prompts, strict=True):
        assert torch.equal(row[11:], model.generate(prompt, **arguments)[0, prompt.shape[1] :])


def test_a_closed_first_layer_still_counts_the_tokens_in_the_cache(tmp_path: Path) -> None:
    pruned(tmp_path / "model")
    model = load(tmp_path / "model")
    cache = model(tokens(), use_cache=True).past_key_values
    assert cache.get_seq_length() == 12
    static = StaticCache(config=model.config, max_cache_len=16)
    model(tokens(), past_key_values=static, use_cache=True)
    assert static.get_seq_length() == 12


def test_attention_kernels_agree_and_can_be_changed_after_loading(tmp_path: Path) -> None:
    model, description, plan = pruned(tmp_path / "model")
    expected = gated_logits(model, description, plan, tokens())
    exported = load(tmp_path / "model", attn_implementation="eager")
    assert (dense_logits(exported, tokens()) - expected).abs().max() < 1e-5
    exported.set_attn_implementation("sdpa")
    assert (dense_logits(exported, tokens()) - expected).abs().max() < 1e-5
    assert exported.model.layers[1].self_attn.config._attn_implementation == "sdpa"


def test_auto_model_gives_the_same_hidden_states(tmp_path: Path) -> None:
    pruned(tmp_path / "model")
    causal = load(tmp_path / "model")
    base = AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(base(tokens()).last_hidden_state, causal.model(tokens()).last_hidden_state)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_from_config_builds_and_initialises_the_pruned_shapes(auto: Any, tmp_path: Path) -> None:
    pruned(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=True)
    built = auto.from_config(config, trust_remote_code=True)
    shapes = {n.removeprefix("model."): p.shape for n, p in load(tmp_path / "model").named_parameters()}
    assert {n.removeprefix("model."): p.shape for n, p in built.named_parameters()}.items() <= shapes.items()
    spread = built.get_submodule(
        "layers.1.self_attn.q_proj" if auto is AutoModel else "model.layers.1.self_attn.q_proj"
    )
    assert 0.01 < spread.weight.std() < 0.03, "initializer_range is 0.02"


def test_saved_again_it_loads_again(tmp_path: Path) -> None:
    pruned(tmp_path / "model")
    first = load(tmp_path / "model")
    first.save_pretrained(tmp_path / "again")
    assert torch.equal(dense_logits(load(tmp_path / "again"), tokens()), dense_logits(first, tokens()))
    assert config_of(tmp_path / "again")["per_layer_config"].keys() == {"0", "1", "2"}


def test_a_pruned_checkpoint_can_be_pruned_again(tmp_path: Path) -> None:
    pruned(tmp_path / "once", close=("layers.0.kv_groups",))
    model = load(tmp_path / "once")
    description = describe(model)
    plan = random_plan(description, close=("layers.1.channels",))
    export(model, None, description, plan, tmp_path / "twice")
    expected = gated_logits(model, description, plan, tokens())
    assert (dense_logits(load(tmp_path / "twice"), tokens()) - expected).abs().max() < 1e-5


def test_it_trains_with_gradient_checkpointing(tmp_path: Path) -> None:
    pruned(tmp_path / "model")
    gradients = []
    for checkpointing in (False, True):
        model = load(tmp_path / "model").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)
    assert gradients[0].abs().max() > 0


def test_a_dense_model_loaded_afterwards_is_a_stock_model(tmp_path: Path) -> None:
    model, *_ = pruned(tmp_path / "model")
    load(tmp_path / "model")
    model.save_pretrained(tmp_path / "dense")
    assert type(load(tmp_path / "dense")) is type(model)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("trust", [None, False])
def test_without_trust_it_fails_instead_of_loading_wrong(model_type: str, trust: bool | None, tmp_path: Path) -> None:
    pruned(tmp_path / "model", model_type)
    with pytest.raises((AmbiguousGlobalPerLayerAttributeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=trust)


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_ragged_widths_are_in_per_layer_config(tmp_path: Path) -> None:
    _, _, plan = pruned(tmp_path / "model")
    config = config_of(tmp_path / "model")
    assert config["num_attention_heads"] == 6, "what the layers override stays the unpruned width"
    assert config["head_dim"] == 8
    for layer in range(3):
        groups = len(plan.kept[f"layers.{layer}.kv_groups"])
        assert config["per_layer_config"][str(layer)] == {
            "num_attention_heads": 2 * groups,
            "num_key_value_heads": groups,
            "intermediate_size": len(plan.kept[f"layers.{layer}.channels"]),
        }


def test_only_layers_that_changed_are_listed(tmp_path: Path) -> None:
    model = tiny("llama")
    description = describe(model)
    kept = {g.name: torch.arange(g.units) for g in description.groups} | {"layers.1.channels": torch.arange(7)}
    plan = Plan(kept, {name: torch.ones(len(index)) for name, index in kept.items()})
    export(model, None, description, plan, tmp_path / "model")
    assert config_of(tmp_path / "model")["per_layer_config"] == {"1": {"intermediate_size": 7}}


def test_gates_without_removals_need_no_code(tmp_path: Path) -> None:
    model = tiny("llama")
    description = describe(model)
    kept = {g.name: torch.arange(g.units) for g in description.groups}
    plan = Plan(kept, {name: torch.full((len(index),), 1.5) for name, index in kept.items()})
    export(model, None, description, plan, tmp_path / "model")
    exported = load(tmp_path / "model", trust_remote_code=False)
    expected = gated_logits(model, description, plan, tokens())
    assert (dense_logits(exported, tokens()) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "deepseek_v3", "gemma3_text", "olmo2"])
def test_a_uniform_export_is_an_ordinary_checkpoint(model_type: str, tmp_path: Path) -> None:
    # 4 KV groups and 8 heads of hidden 64: half of them still divides, which Gemma's configuration asks for
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= (LATENT | {"num_key_value_heads": 8, "first_k_dense_replace": 3}) if "deepseek" in model_type else {}
    model, description, plan = pruned(tmp_path / "model", model_type, (), "uniform", **sizes)
    assert not list((tmp_path / "model").glob("*.py"))
    assert not {"auto_map", "per_layer_config"} & config_of(tmp_path / "model").keys()
    exported = load(tmp_path / "model", trust_remote_code=False)
    assert type(exported) is type(model)
    expected = gated_logits(model, description, plan, tokens())
    assert (dense_logits(exported, tokens()) - expected).abs().max() < 1e-5


def test_llama_with_a_head_count_its_configuration_refuses_is_written_as_mistral(tmp_path: Path) -> None:
    # 3 groups of 2 heads are kept, and 6 heads do not divide a hidden size of 64
    sizes = {"hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 8}
    model = tiny("llama", **sizes)
    description = describe(model)
    kept = {g.name: torch.arange(3 if g.kind == "kv_groups" else 20) for g in description.groups}
    plan = Plan(kept, {name: torch.full((len(index),), 1.5) for name, index in kept.items()}, "uniform")
    export(model, None, description, plan, tmp_path / "model")
    exported = load(tmp_path / "model", trust_remote_code=False)
    assert exported.config.model_type == "mistral"
    assert exported.config.sliding_window is None
    expected = gated_logits(model, description, plan, tokens())
    assert (dense_logits(exported, tokens()) - expected).abs().max() < 1e-5

    biased = tiny("llama", attention_bias=True, **sizes)
    with pytest.raises(InputError, match="has no attention_bias"):
        export(biased, None, describe(biased), plan, tmp_path / "biased")
    gemma = tiny("gemma2", **sizes)
    with pytest.raises(InputError, match=r"Gemma2Config refuses these widths.*not a multiple.*--shape ragged"):
        export(gemma, None, describe(gemma), plan, tmp_path / "gemma")
    assert not list(tmp_path.glob("*biased*")) and not list(tmp_path.glob("*gemma*")), "nothing is left behind"


def test_uneven_or_empty_layers_cannot_be_uniform(tmp_path: Path) -> None:
    model = tiny("llama")
    description = describe(model)
    plan = random_plan(description)
    with pytest.raises(
        InputError, match="one num_attention_heads above 0 for all layers, the plan has 2 in 1 layers, 4"
    ):
        export(model, None, description, Plan(plan.kept, plan.scales, "uniform"), tmp_path / "model")


# --- files -----------------------------------------------------------------------------------------------------------


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = tiny("llama")
    description = describe(model)
    plan = random_plan(description, close=CLOSED)
    export(model, None, description, plan, tmp_path / "one")
    export(model, None, description, plan, tmp_path / "many", max_shard_size="20KB")
    shards = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    together = {k: v for name in shards for k, v in load_file(tmp_path / "many" / name).items()}
    single = load_file(tmp_path / "one" / "model.safetensors")
    assert together.keys() == single.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(4 * t.numel() for t in single.values())
    assert torch.equal(dense_logits(load(tmp_path / "many"), tokens()), dense_logits(load(tmp_path / "one"), tokens()))


def test_dtype_is_kept_or_changed(tmp_path: Path) -> None:
    model = tiny("llama")
    description = describe(model)
    plan = random_plan(description)
    export(model, None, description, plan, tmp_path / "cast", dtype=torch.bfloat16)
    export(model.to(torch.bfloat16), None, description, plan, tmp_path / "kept")
    for name in ("cast", "kept"):
        assert config_of(tmp_path / name)["dtype"] == "bfloat16"
        assert {t.dtype for t in load_file(tmp_path / name / "model.safetensors").values()} == {torch.bfloat16}
        assert load(tmp_path / name, dtype="auto").dtype == torch.bfloat16
    writer = "model.layers.0.mlp.down_proj.weight"
    exact = tiny("llama").get_parameter(writer)[:, plan.kept["layers.0.channels"]] * plan.scales["layers.0.channels"]
    assert torch.equal(load_file(tmp_path / "cast" / "model.safetensors")[writer], exact.bfloat16()), "rounded once"


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    pruned(tmp_path / "model", tie_word_embeddings=True)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert "model.embed_tokens.weight" in stored and "lm_head.weight" not in stored
    model = load(tmp_path / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tokenizer_chat_template_generation_config_and_card_come_along(tmp_path: Path) -> None:
    model = tiny("llama")
    model.generation_config.temperature = 0.7  # without do_sample, which save_pretrained would refuse
    model.generation_config.max_new_tokens = 5
    description = describe(model)
    words = tokenizer()
    export(
        model,
        words,
        description,
        random_plan(description),
        tmp_path / "model",
        card=lambda _stock: "# Card\n",
        base_model="me/base",
    )
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert loaded("w5 w7").input_ids == [5, 7]
    assert loaded.chat_template == words.chat_template
    generation = load(tmp_path / "model").generation_config
    assert (generation.temperature, generation.max_new_tokens) == (0.7, 5)
    assert (tmp_path / "model" / "README.md").read_text() == "# Card\n"
    assert config_of(tmp_path / "model")["secateur"]["base_model"] == "me/base"


def test_a_gguf_origin_is_forgotten_and_other_quantisations_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    description = describe(model)
    plan = random_plan(description)
    model.config.quantization_config = {"quant_method": "gguf"}
    export(model, None, description, plan, tmp_path / "model")
    assert "quantization_config" not in config_of(tmp_path / "model")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(InputError, match=r"quantised \(gptq\)"):
        export(model, None, description, plan, tmp_path / "gptq")


def test_an_export_replaces_the_one_before(tmp_path: Path) -> None:
    pruned(tmp_path / "model")
    (tmp_path / "model" / "stale.txt").touch()
    pruned(tmp_path / "model")
    assert not (tmp_path / "model" / "stale.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_shipped_file_needs_nothing_of_secateur(tmp_path: Path) -> None:
    pruned(tmp_path / "model", "qwen3")
    text = (tmp_path / "model" / "modeling_pruned.py").read_text()
    assert "import secateur" not in text and "from secateur" not in text
    assert "from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM as StockForCausalLM" in text
    assert "llama" not in text


@pytest.mark.parametrize(("changes", "written"), [({}, "mistral"), ({"attention_bias": True}, "llama")])
def test_llama_whose_heads_differ_by_layer_is_written_so_that_its_tokenizer_loads_without_code(
    tmp_path, changes, written
):
    model = small_llama(**changes)
    description, _limits = described(model, 0.3)
    plan = random_plan(description)
    heads = {len(plan.kept[g.name]) for g in description.groups if g.kind != "channels"}
    assert len(heads) > 1
    export(model, small_tokenizer(), description, plan, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == written
    ids = random_tokens(2, 12)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    torch.testing.assert_close(exported(ids).logits, gated_logits(model, description, plan, ids), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("w1 w2")["input_ids"] == [4, 5]


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "deepseek_v2"])
def test_what_reads_the_configuration_alone_needs_no_code(tmp_path: Path, model_type: str) -> None:
    """Tokenizers and servers do; these configurations look at a head count that layers do not share."""
    _model, description, plan = pruned(tmp_path / "model", model_type)
    heads = {len(plan.kept[g.name]) for g in description.groups if g.attends}
    assert len(heads) > 1 and AutoConfig.from_pretrained(tmp_path / "model").is_heterogeneous
