"""What attention is divided into, and what stays whole: query heads within KV groups, KV heads and query heads nested,
`--keep`, `--only`. A layer keeps as many query heads of each KV head, and what is exported computes what was gated.
"""

import json
from math import floor, prod

import pytest
import torch
from safetensors import safe_open

from runs import complaint, prune_arguments, secateur, write_checkpoint, write_texts
from secateur.attach import attached
from secateur.budget import figures, largest_that_fits, make_budget
from secateur.config import Config
from secateur.config_file import load_config
from secateur.describe import describe
from secateur.export import export
from secateur.files import InputError
from secateur.gates import Gates, by_group
from secateur.gguf_file import write_gguf
from secateur.importance import vectors
from secateur.learn import unseen
from secateur.nested import path
from secateur.plan import Plan, load_plan, make_plan, save_plan
from secateur.policy import permitted, policy_of
from secateur.slicing import pruned_shapes
from secateur.units import unit_params
from secateur.verify import folded
from tiny import LATENT, MIXTURE, dense_logits, gated_logits, load, random_plan, tiny, tokens

WIDE = {"num_attention_heads": 12, "num_key_value_heads": 3}
ONE_KEY = {"moe_intermediate_size": None}

MODELS = {
    "llama": ("llama", WIDE),
    "llama with biases": ("llama", WIDE | {"attention_bias": True}),
    "qwen2": ("qwen2", WIDE | {"head_dim": None, "hidden_size": 96}),
    "qwen3": ("qwen3", WIDE),
    "gemma": ("gemma", WIDE),
    "gemma3": ("gemma3_text", WIDE),
    "norms a head": ("cohere", WIDE | {"use_qk_norm": True}),
    "mixture": ("qwen3_moe", WIDE | MIXTURE),
    "sinks": ("gpt_oss", WIDE | MIXTURE | ONE_KEY),
}
BOTH = pytest.mark.parametrize("unit", ["heads", "nested"])
EACH = pytest.mark.parametrize("name", MODELS)


def built(name, unit):
    model = tiny(MODELS[name][0], **MODELS[name][1])
    return model, describe(model, unit)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", **WIDE)


# --- units -----------------------------------------------------------------------------------------------------------


def params_of(slices):
    return {s.param.removeprefix("model.layers.1.self_attn.").removesuffix(".weight") for s in slices}


def test_query_heads_have_rows_of_queries_and_columns_of_the_output(llama):
    group = next(g for g in describe(llama, "heads").groups if g.layer == 1 and g.attends)
    assert (group.name, group.kind, group.units, group.kv_heads, group.width) == ("layers.1.heads", "heads", 12, 3, 4)
    assert group.sizes == (("num_attention_heads", 1),), "KV heads stay"
    assert params_of(group.slices) == {"q_proj", "o_proj"}
    assert group.shared == tuple(f"model.layers.1.self_attn.{n}_proj.weight" for n in "kv"), "go with the last head"


def test_nested_units_are_kv_heads_and_query_heads_and_hold_each_weight_once(llama):
    keys, heads = (g for g in describe(llama, "nested").groups if g.layer == 1 and g.attends)
    assert (keys.kind, keys.units, keys.sizes) == ("kv_groups", 3, (("num_key_value_heads", 1),))
    assert params_of(keys.slices) == {"k_proj", "v_proj"} and not keys.writes
    assert (heads.kind, heads.units, heads.kv_heads, heads.keys) == ("heads", 12, 3, "layers.1.kv_groups")
    assert params_of(heads.slices) == {"q_proj", "o_proj"} and not heads.shared


def test_norms_and_sinks_of_a_head_go_with_their_head():
    keys, heads = describe(tiny("cohere", **WIDE, use_qk_norm=True), "nested").groups[:2]
    assert any("k_norm" in s.param for s in keys.slices) and not any("k_norm" in s.param for s in heads.slices)
    assert any("q_norm" in s.param for s in heads.slices)
    keys, heads = describe(tiny(*MODELS["sinks"][:1], **MODELS["sinks"][1]), "nested").groups[:2]
    assert any("sinks" in s.param for s in heads.slices) and not any("sinks" in s.param for s in keys.slices)


@pytest.mark.parametrize("unit", ["kv-groups", "heads", "nested"])
def test_where_every_head_has_its_own_keys_all_choices_are_the_same(unit):
    model = tiny("llama", num_key_value_heads=6)
    assert describe(model, unit) == describe(model)


def test_groups_are_the_default(llama):
    assert describe(llama, "kv-groups") == describe(llama)
    assert {g.kind for g in describe(llama).groups} == {"kv_groups", "channels"}


SHARED = {
    "multi-query": ("llama", {"num_key_value_heads": 1}),
    "latent": ("deepseek_v3", LATENT | {"first_k_dense_replace": 3}),
}


@pytest.mark.parametrize("shared", SHARED)
def test_where_all_heads_share_their_keys_there_are_heads_only(shared):
    model = tiny(SHARED[shared][0], **SHARED[shared][1])
    assert describe(model, "heads") == describe(model)
    for unit in ("kv-groups", "nested"):
        found = describe(model, unit)
        assert found.kinds == {"channels"}
        with pytest.raises(InputError, match=f"--attention-unit {unit}: .* no KV groups to remove, only heads"):
            found.check_attention(unit)


# --- what is exported ------------------------------------------------------------------------------------------------


def head_counts(folder):
    """Query heads and KV heads of each layer, counted in the files."""
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def rows(layer, name):
        return shapes.get(f"model.layers.{layer}.self_attn.{name}_proj.weight", (0,))[0] // config["head_dim"]

    return [(rows(layer, "q"), rows(layer, "k")) for layer in range(config["num_hidden_layers"])]


def counted(folder, maps):
    """Weights of some maps, counted in the files."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if n.split(".")[-2] in maps]  # noqa: SIM118
        return sum(prod(file.get_slice(n).get_shape()) for n in names)


def said_counts(folder):
    """The same as the configuration says it."""
    config = json.loads((folder / "config.json").read_text())
    dense = config["num_attention_heads"], config["num_key_value_heads"]
    layers = config.get("per_layer_config", {})
    keys = ("num_attention_heads", "num_key_value_heads")
    return [
        tuple(layers.get(str(i), {}).get(key, d) for key, d in zip(keys, dense, strict=True))
        for i in range(config["num_hidden_layers"])
    ]


@pytest.mark.parametrize("closed", [False, True], ids=["half", "closed"])
@BOTH
@EACH
def test_exported_logits_equal_gated_logits(name, unit, closed, tmp_path):
    model, description = built(name, unit)
    close = ("layers.0.heads", "layers.0.kv_groups") if closed else ()
    plan = random_plan(description, close=close)
    gated = gated_logits(model, description, plan, tokens())
    assert (gated - dense_logits(model, tokens())).abs().max() > 1e-3
    export(model, None, description, plan, tmp_path / "model")
    exported = load(tmp_path / "model", dtype=torch.float32)
    assert (gated - dense_logits(exported, tokens())).abs().max() < 1e-5
    counted = head_counts(tmp_path / "model")
    expected = [
        (len(plan.kept[f"layers.{i}.heads"]), len(plan.kept.get(f"layers.{i}.kv_groups", range(3)))) for i in range(3)
    ]
    assert counted == ([(0, 0), *expected[1:]] if closed else expected)
    said = said_counts(tmp_path / "model")
    assert said[1:] == expected[1:] and said[0][0] == expected[0][0]
    assert len(set(expected)) > 1, "layers differ"
    if unit == "heads":
        assert all(
            "num_key_value_heads" not in layer
            for layer in exported.config.to_dict().get("per_layer_config", {}).values()
        )


@BOTH
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mixture"])
def test_generation_with_a_cache_is_that_without(name, unit, tmp_path):
    model, description = built(name, unit)
    export(model, None, description, random_plan(description), tmp_path / "model")
    exported = load(tmp_path / "model", dtype=torch.float32)
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"eos_token_id": None}
    cached, plain = (exported.generate(tokens(), use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    assert (torch.stack(cached.logits) - torch.stack(plain.logits)).abs().max() < 1e-5


@BOTH
def test_what_was_pruned_can_be_pruned_again_by_each_choice(unit, tmp_path, llama):
    description = describe(llama, unit)
    export(llama, None, description, random_plan(description, share=0.7), tmp_path / "once")
    once = load(tmp_path / "once", dtype=torch.float32)
    for again in ("kv-groups", "heads", "nested"):
        found = describe(once, again)
        assert not found.refusals and {g.layer for g in found.groups if g.attends} == {0, 1, 2}
        plan = random_plan(found, seed=5)
        gated = gated_logits(once, found, plan, tokens())
        export(once, None, found, plan, tmp_path / again)
        assert (gated - dense_logits(load(tmp_path / again, dtype=torch.float32), tokens())).abs().max() < 1e-5


@BOTH
def test_gates_are_folded_for_verification_as_export_folds_them(unit, llama):
    description = describe(llama, unit)
    plan = random_plan(description)
    gates = plan.gates(description.groups)
    gated = gated_logits(llama, description, plan, tokens())
    with folded(llama, description.groups, gates, torch.float32):
        assert (dense_logits(llama, tokens()) - gated).abs().max() < 1e-5
    with attached(llama, description.groups, gates):
        assert torch.equal(dense_logits(llama, tokens()), gated), "weights are as they were"


@BOTH
def test_figures_are_those_of_the_files(unit, tmp_path, llama):
    description = describe(llama, unit)
    plan = random_plan(description, close=("layers.2.heads", "layers.2.kv_groups"))
    export(llama, None, description, plan, tmp_path / "model")
    found = figures(description, plan.sizes(description.groups), 4)
    exported = load(tmp_path / "model", dtype=torch.float32)
    assert found.parameters == sum(p.numel() for p in exported.parameters())
    assert found.kv_bytes_per_token == 4 * 2 * 8 * sum(keys for _, keys in head_counts(tmp_path / "model"))


def test_equal_counts_are_a_stock_checkpoint(tmp_path, llama):
    description = describe(llama, "heads")
    limits = make_budget(description.groups, description.shapes, 0.5, "expert", None, policy_of("uniform"))
    kept = largest_that_fits(ranks(description), limits)
    masks = {n: m.nonzero().flatten() for n, m in by_group(kept, description.groups).items()}
    plan = Plan(masks, {n: torch.ones(len(m)) for n, m in masks.items()}, "uniform")
    export(llama, None, description, plan, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (6, 3)
    assert "auto_map" not in config and "per_layer_config" not in config
    exported = load(tmp_path / "model", dtype=torch.float32, trust_remote_code=False)
    gated = gated_logits(llama, description, plan, tokens())
    assert (gated - dense_logits(exported, tokens())).abs().max() < 1e-5


@BOTH
def test_llamacpp_is_told_the_head_counts_of_each_layer(unit, tmp_path, llama):
    from test_gguf import agreement, said

    description = describe(llama, unit)
    export(llama, None, description, random_plan(description), tmp_path / "model")
    assert write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f32", tokenizer=False).architecture == "deci"
    counts = list(zip(said(tmp_path / "x.gguf")["deci.attention.head_count"],
                      said(tmp_path / "x.gguf")["deci.attention.head_count_kv"], strict=True))  # fmt: skip
    assert counts == head_counts(tmp_path / "model")
    difference, equal = agreement(tmp_path / "model")
    assert difference < 2e-5 and equal


# --- what is kept ----------------------------------------------------------------------------------------------------


def ranks(description, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(g.units, generator=generator) + 0.5 * (n % 3) for n, g in enumerate(description.groups)]
    return torch.cat(parts)


def kept_by(description, limits, rank_N):
    kept = by_group(largest_that_fits(rank_N, limits), description.groups)
    return {name: mask.nonzero().flatten() for name, mask in kept.items()}


def counts_of(group, kept):
    return torch.bincount(kept[group.name] // group.width, minlength=group.kv_heads).tolist()


def stored(description, kept):
    """Parameters of units in the checkpoint, from its shapes."""
    plan = Plan(kept, {n: torch.ones(len(k)) for n, k in kept.items()})
    shapes = pruned_shapes(description, plan)
    return sum(prod(shapes.get(s.param, (0,))) for g in description.groups for s in g.slices)


@pytest.mark.parametrize("scope", ["model", "kind"])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.8])
@BOTH
def test_each_kv_head_keeps_as_many_query_heads_and_the_budget_is_met_from_below(unit, sparsity, scope, llama):
    description = describe(llama, unit)
    limits = make_budget(description.groups, description.shapes, sparsity, scope)
    attention = [g for g in description.groups if g.kv_heads]
    assert sorted(limits.names) == {"model": ["all units"], "kind": ["channels", "heads"]}[scope]
    for seed in range(4):
        rank_N = ranks(description, seed)
        kept = kept_by(description, limits, rank_N)
        for g in attention:
            found = counts_of(g, kept)
            there = kept[g.keys].tolist() if g.keys else range(3)
            assert len({found[k] for k in there}) <= 1 and sum(found) == sum(found[k] for k in there)
            assert not g.keys or all(found[k] for k in there)
        allowed = int(limits.allowed_C.sum())
        used = stored(description, kept)
        assert used == int((limits.params_N * largest_that_fits(rank_N, limits)).sum()), "costs add up exactly"
        assert used <= allowed
        channel = min(unit_params(g, description.shapes) for g in description.groups if not g.attends)
        assert scope == "kind" or allowed - used < channel, "another channel would fit"


def test_each_kv_head_keeps_its_own_best(llama):
    description = describe(llama, "heads")
    limits = make_budget(description.groups, description.shapes, 0.4, "model")
    rank_N = ranks(description)
    kept, rank = kept_by(description, limits, rank_N), by_group(rank_N, description.groups)
    for g in (g for g in description.groups if g.kv_heads):
        count = len(kept[g.name]) // 3
        best = [set((4 * k + rank[g.name][4 * k : 4 * k + 4].topk(count).indices).tolist()) for k in range(3)]
        assert set(kept[g.name].tolist()) == set().union(*best)
    assert len({len(kept[g.name]) for g in description.groups if g.kv_heads}) > 1, "heads move between layers"


@pytest.mark.parametrize("sparsity", [0.2, 0.45, 0.7])
def test_equal_widths_keep_as_many_query_heads_in_every_layer(sparsity, llama):
    description = describe(llama, "heads")
    kept = kept_by(
        description, make_budget(description.groups, description.shapes, sparsity, "layer"), ranks(description)
    )
    assert len({tuple(counts_of(g, kept)) for g in description.groups if g.kv_heads}) == 1
    allowed = floor((1 - sparsity) * description.unit_parameters)
    a_channel_in_each_layer = 3 * 3 * 48
    assert allowed - a_channel_in_each_layer < stored(description, kept) <= allowed


@BOTH
def test_rows_of_heads_and_channels_go_by_what_a_parameter_is_worth(unit, llama):
    description = describe(llama, unit)
    for better in (True, False):
        rank_N = torch.cat([torch.full((g.units,), 2.0 if g.attends == better else 1.0) for g in description.groups])
        limits = make_budget(description.groups, description.shapes, 0.3, "model")
        kept = kept_by(description, limits, rank_N)
        first = [g for g in description.groups if g.attends == better]
        assert all(len(kept[g.name]) == g.units for g in first)


def test_all_query_heads_of_some_kv_heads_are_a_layer_of_fewer_heads(llama, tmp_path):
    description = describe(llama, "nested")
    kept = {g.name: torch.arange(g.units) for g in description.groups}
    kept |= {"layers.1.kv_groups": torch.tensor([0, 2]), "layers.1.heads": torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])}
    plan = Plan(kept, {name: torch.ones(len(units)) for name, units in kept.items()})
    export(llama, None, description, plan, tmp_path / "model")
    assert head_counts(tmp_path / "model") == said_counts(tmp_path / "model") == [(12, 3), (8, 2), (12, 3)]


@BOTH
def test_a_smaller_budget_keeps_a_subset(unit, llama):
    attention = describe(llama, unit).only(["heads"])
    sizes = []
    for seed in range(3):
        larger = None
        for sparsity in (0.0, 0.2, 0.4, 0.6, 0.8):
            limits = make_budget(attention.groups, attention.shapes, sparsity, "model")
            kept = kept_by(attention, limits, ranks(attention, seed))
            now = {(name, unit) for name, units in kept.items() for unit in units.tolist()}
            assert larger is None or now <= larger or sparsity == 0.0
            sizes.append(len(now))
            larger = now if sparsity in (0.0,) else larger
    assert len(set(sizes)) > 4


def shares_of(path_, costs):
    """Parameters after each step."""
    keys, heads = path_
    return [
        int((keys <= n).sum() - (keys < 0).sum()) * costs[0] + int((heads <= n).sum() - (heads < 0).sum()) * costs[1]
        for n in range(int(heads.max()) + 1)
    ]


ALL = {(k, q) for k in range(1, 4) for q in range(1, 5)}


def test_a_path_takes_one_more_kv_head_or_one_more_query_head_of_each():
    torch.manual_seed(0)
    keys_K, heads_KQ = path(torch.randn(3), torch.randn(3, 4), (2, 1), ALL)
    last = int(heads_KQ.max())
    assert last == 2 + 3 and (keys_K >= 0).all() and (heads_KQ >= 0).all(), "two more KV heads, three more query heads"
    before = (0, 0)
    for n in range(last + 1):
        counts = [int((row <= n).sum()) for row in heads_KQ]
        there = [k for k in range(3) if keys_K[k] <= n]
        assert {counts[k] for k in there} == {max(counts)} and sum(counts) == max(counts) * len(there)
        state = len(there), max(counts)
        assert state[0] - before[0] + state[1] - before[1] == (2 if n == 0 else 1)
        before = state


def test_a_path_gives_up_a_kv_head_that_is_worth_little_and_query_heads_that_are():
    rank_KQ = torch.tensor([[5.0, 4.0, 4.0, 4.0], [0.1, 0.1, 0.1, 0.1], [5.0, 4.0, 4.0, 4.0]])
    keys_K, heads_KQ = path(torch.tensor([5.0, 0.1, 5.0]), rank_KQ, (2, 1), ALL)
    assert keys_K.tolist()[1] == 5 and (heads_KQ[1] == 5).all(), "all else comes first"
    keys_K, heads_KQ = path(torch.tensor([5.0, 0.1, 5.0]), torch.ones(3, 4), (8, 1), ALL)
    assert keys_K[1] == keys_K.max() > keys_K[[0, 2]].max(), "by its own worth, too"
    rank_KQ = torch.tensor([[0.1, 5.0, 0.1, 0.1]] * 3)
    keys_K, heads_KQ = path(torch.tensor([5.0, 5.0, 5.0]), rank_KQ, (2, 1), ALL)
    assert keys_K.max() == 2 and heads_KQ[:, 1].max() == 2 and heads_KQ[:, [0, 2, 3]].min() == 3


def test_ranks_of_tensor_parallelism_divide_query_heads_and_kv_heads():
    model = tiny("llama", num_attention_heads=16, num_key_value_heads=4)
    heads = describe(model, "heads").groups[0]
    assert permitted(heads, policy_of("tp:2")) == (1, 2, 3, 4)
    assert permitted(heads, policy_of("tp:8")) == (2, 4)
    assert permitted(heads, policy_of("tp:3")) == ()
    description = describe(model, "nested")
    assert permitted(description.groups[0], policy_of("tp:2")) == (1, 2, 4)
    limits = make_budget(description.groups, description.shapes, 0.5, "model", None, policy_of("tp:2"))
    seen = set()
    for seed in range(20):
        kept = kept_by(description, limits, ranks(description, seed))
        for layer in range(3):
            keys, count = len(kept[f"layers.{layer}.kv_groups"]), len(kept[f"layers.{layer}.heads"])
            assert count % 2 == 0 and (keys % 2 == 0 or keys == 1)
            seen.add((keys, count))
    assert len(seen) > 3


@BOTH
def test_a_plan_is_read_back_and_one_of_uneven_heads_is_not(unit, llama, tmp_path):
    description = describe(llama, unit)
    limits = make_budget(description.groups, description.shapes, 0.4, "model")
    z_N = ranks(description)
    plan, rounding = make_plan(Gates(z_N, description.groups, {}), limits, "ragged", lambda _: 1.0)
    save_plan(tmp_path / "plan.json", plan, rounding, "x")
    read, _ = load_plan(tmp_path / "plan.json", description.groups, "x")
    assert all(torch.equal(read.kept[n], plan.kept[n]) for n in plan.kept)
    values = json.loads((tmp_path / "plan.json").read_text())
    name = next(n for n, kept in values["kept"].items() if n.endswith("heads") and len(kept) > 3)
    values["kept"][name].pop(), values["scales"][name].pop()
    (tmp_path / "plan.json").write_text(json.dumps(values))
    with pytest.raises(
        InputError, match=f"{name} keeps .* query heads of its KV heads, not as many of each; plan again"
    ):
        load_plan(tmp_path / "plan.json", description.groups, "x")


def test_a_head_is_scored_by_its_own_weights(llama):
    description = describe(llama, "heads")
    group = description.groups[2]
    assert group.name == "layers.1.heads"
    queries = vectors(llama.get_parameter("model.layers.1.self_attn.q_proj.weight"), group.slices[0], group)
    output = vectors(llama.get_parameter("model.layers.1.self_attn.o_proj.weight"), group.slices[1], group)
    attention = llama.model.layers[1].self_attn
    for head in range(12):
        rows = slice(8 * head, 8 * head + 8)
        assert torch.equal(queries[head], attention.q_proj.weight[rows])
        assert torch.equal(output[head], attention.o_proj.weight[:, rows].T)


def test_experts_that_saw_nothing_are_told_from_heads():
    groups = describe(tiny("qwen3_moe", **WIDE | MIXTURE), "heads").groups
    grad_N = torch.ones(sum(g.units for g in groups))
    parts = by_group(grad_N, groups)
    parts["layers.1.heads"][:4] = 0.0
    parts["layers.1.expert_channels"][:32] = 0.0
    found = by_group(unseen(grad_N, groups), groups)
    assert {name: int(mask.sum()) for name, mask in found.items() if mask.any()} == {"layers.1.expert_channels": 32}


# --- what stays whole ------------------------------------------------------------------------------------------------


def left(description):
    return [g.name for g in description.groups]


def test_layers_and_sublayers_stay_whole_by_number_from_both_ends(llama):
    description = describe(llama)
    assert left(description.keeping(["layers.0", "layers.-1"])) == ["layers.1.kv_groups", "layers.1.channels"]
    assert left(description.keeping(["layers.-3.mlp"])) == left(description)[:1] + left(description)[2:]
    assert left(description.keeping(["layers.2.attention"])) == left(description)[:4] + left(description)[5:]
    nested = describe(llama, "nested").keeping(["layers.1.attention"])
    assert not [name for name in left(nested) if name in ("layers.1.heads", "layers.1.kv_groups")]


def test_the_sparsity_of_all_units_is_taken_from_the_rest(llama):
    description = describe(llama)
    kept = description.keeping(["layers.0", "layers.2.mlp"])
    total = description.unit_parameters
    for sparsity in (0.05, 0.2, 1 / 3):
        rest = kept.sparsity_of_rest(sparsity)
        (allowed,) = make_budget(kept.groups, kept.shapes, rest, "model").allowed_C.tolist()
        whole = total - kept.unit_parameters
        assert allowed + whole == floor((1 - sparsity) * total + 1e-6)
    assert describe(llama).sparsity_of_rest(0.3) == pytest.approx(0.3)
    assert description.only(["mlp"]).sparsity_of_rest(0.3) == pytest.approx(0.3), "only what --keep names counts so"


def test_more_sparsity_than_the_rest_has_is_refused_and_the_nearest_named(llama):
    kept = describe(llama).keeping(["layers.0", "layers.-1"])
    with pytest.raises(InputError, match=r"leaves 33.3% of the units' parameters .* --sparsity below 0.333$"):
        kept.sparsity_of_rest(0.5)
    kept.sparsity_of_rest(0.332)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["layers.3"], "--keep layers.3: the model has 3 layers, layers.0 to layers.2"),
        (["layers.-4"], "--keep layers.-4: the model has 3 layers"),
        (["layers.0", "layers.1", "layers.2"], "--keep layers.0,layers.1,layers.2 leaves nothing to prune"),
    ],
)
def test_layers_that_there_are_not_and_all_of_them_are_refused(words, reason, llama):
    with pytest.raises(InputError) as error:
        describe(llama).keeping(words)
    assert str(error.value).startswith(reason)


def test_what_stays_whole_must_divide_over_ranks_as_it_is():
    model = tiny("qwen2", num_attention_heads=9, num_key_value_heads=3, intermediate_size=60)
    description = describe(model)
    description.check_shape("tp:2")
    with pytest.raises(
        InputError, match=r"layers.0.kv_groups stays whole, .*; take layers.0 out of --keep, or the near"
    ):
        description.keeping(["layers.0.attention"]).check_shape("tp:2")
    with pytest.raises(InputError, match="--keep leaves layers wider than others, so --shape uniform contradicts it"):
        description.keeping(["layers.0"]).check_shape("uniform")


def test_words_for_several_kinds():
    mixture = describe(tiny("qwen2_moe", **MIXTURE))
    assert {g.kind for g in mixture.only(["mlp"]).groups} == {"expert_channels", "shared_channels"}
    assert {g.kind for g in mixture.only(["attention"]).groups} == {"kv_groups"}
    assert {g.kind for g in mixture.only(["attention", "shared_channels"]).groups} == {"kv_groups", "shared_channels"}
    assert {g.kind for g in describe(tiny("llama")).only(["mlp"]).groups} == {"channels"}
    with pytest.raises(InputError, match="this model has no attention that can be pruned"):
        describe(tiny("olmo2")).only(["attention"])


def test_an_attention_unit_without_attention_is_refused():
    for description in (describe(tiny("qwen2_moe", **MIXTURE), "heads").only([]), describe(tiny("olmo2"), "heads")):
        with pytest.raises(InputError, match=r"--attention-unit heads: this (run leaves|model's attention cannot)"):
            description.check_attention("heads")


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return write_checkpoint(folder / "model", num_key_value_heads=2), write_texts(folder / "texts.jsonl")


@pytest.mark.parametrize("method", ["deterministic", "grasprune", "sensitivity"])
@BOTH
def test_a_run_from_start_to_end(unit, method, files, tmp_path):
    arguments = prune_arguments(
        *files, tmp_path / "run", attention_unit=unit, method=method, keep="layers.0,layers.-1.mlp"
    )
    assert secateur(*arguments) == 0
    run = tmp_path / "run"
    assert json.loads((run / "verify.json").read_text())["passed"]
    config = load_config(run / "config.yaml")
    assert (config.attention_unit, config.keep) == (unit, ("layers.0", "layers.-1.mlp"))
    plan = json.loads((run / "plan.json").read_text())
    assert {name.split(".")[1] for name in plan["kept"]} == {"1", "2"} and "layers.2.channels" not in plan["kept"]
    counts = head_counts(run / "model")
    assert counts[0] == (8, 2) and all(q % max(1, k) == 0 for q, k in counts)
    maps = (
        "q_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        *(("k_proj", "v_proj") if unit == "nested" else ()),
    )
    allowed, used = (counted(folder, maps) for folder in (files[0], run / "model"))
    allowed = floor(0.7 * allowed + 1e-6)
    assert allowed - 3 * 32 < used <= allowed, "within a channel"
    results = json.loads((run / "eval.json").read_text())
    assert results["pruned"]["block_parameters"] == used
    assert secateur("refit", run) == 0
    assert secateur("export", run, "--shape", "tp:2") == 0


def test_only_is_another_name_for_units(files, tmp_path):
    assert secateur(*prune_arguments(*files, tmp_path / "run", only="mlp")) == 0
    assert set(head_counts(tmp_path / "run" / "model")) == {(8, 2)}
    assert load_config(tmp_path / "run" / "config.yaml").units == ("mlp",)


BAD = {
    "--keep layer.0": ({"keep": "layer.0"}, "--keep layer.0: say layers.0"),
    "--keep layers.0.heads": ({"keep": "layers.1,layers.0.heads"}, "--keep layers.0.heads: say layers.0"),
    "--keep uniform": ({"keep": "layers.0", "shape": "uniform"}, "so --shape uniform contradicts it"),
    "--keep too far": ({"keep": "layers.7"}, "the model has 3 layers, layers.0 to layers.2"),
    "--keep too much": ({"keep": "layers.0,layers.1", "sparsity": 0.5}, "--sparsity 0.5 asks for more"),
    "--keep and a shape": (
        {"keep": "layers.0", "shape": "aligned:48", "sparsity": 0.05},
        "of all units is 0.075 of what --keep leaves, which this speaks of",
    ),
    "--only mlp": ({"only": "mlp", "attention_unit": "heads"}, "--units mlp leaves attention whole"),
    "nested, uniform": ({"attention_unit": "nested", "shape": "uniform"}, "use kv-groups or heads"),
    "nested, per layer": ({"attention_unit": "nested", "per": "layer"}, "--per layer wants equal widths"),
    "nested, scored": ({"attention_unit": "nested", "method": "flap"}, "--method flap scores units one by one"),
    "nested, taylor": ({"attention_unit": "nested", "method": "taylor-vector"}, "use kv-groups or heads"),
}


@pytest.mark.parametrize(("options", "reason"), BAD.values(), ids=BAD)
def test_bad_choices_end_in_one_line(options, reason, files, tmp_path, capsys):
    said = complaint(capsys, *prune_arguments(*files, tmp_path / "run", **options))
    assert reason in said


def test_a_plan_for_equal_widths_is_refused_where_nested_units_were_learned(files, tmp_path, capsys):
    assert secateur(*prune_arguments(*files, tmp_path / "run", attention_unit="nested")) == 0
    assert "use kv-groups or heads" in complaint(capsys, "plan", tmp_path / "run", "--shape", "uniform")
    assert secateur("plan", tmp_path / "run", "--compare") == 0


def test_gates_of_one_choice_do_not_pass_for_those_of_another(files, tmp_path, capsys):
    run = tmp_path / "run"
    assert secateur(*prune_arguments(*files, run, attention_unit="heads")) == 0
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("attention_unit: heads", "attention_unit: nested"))
    assert "gates of another architecture" in complaint(capsys, "plan", run)


def test_keep_is_read_with_commas_and_spaces():
    config = Config("m", 0.2, keep=("layers.0,layers.-1", "layers.3.mlp"))
    assert config.keep == ("layers.0", "layers.-1", "layers.3.mlp")
