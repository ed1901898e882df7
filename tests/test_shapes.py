"""Shapes that kernels, quantisation and tensor parallelism want: every width is one that the shape permits, the budget
is spent from below all the same, and what is exported computes what the gated model computes.
"""

import json
from dataclasses import replace
from math import lcm

import pytest
import torch
from torch.nn.functional import kl_div

from secateur.attach import attached
from secateur.budget import Budget, Rows, largest_that_fits, make_budget
from secateur.describe import describe
from secateur.export import export
from secateur.files import InputError
from secateur.gates import Gates, by_group
from secateur.plan import Plan, load_plan, make_plan, save_plan
from secateur.policy import Policy, permitted, policy_of
from secateur.slicing import pruned_shapes
from secateur.units import packed, unit_params
from test_families import ONE_GROUP
from tiny import LATENT, MIXTURE, dense_logits, gated_logits, load, tiny, tokens

MODELS = {
    "gqa": lambda: tiny("llama", intermediate_size=80, num_attention_heads=12, num_key_value_heads=6),
    "mha": lambda: tiny("qwen2", intermediate_size=72, num_attention_heads=12, num_key_value_heads=12),
    "mqa": lambda: tiny("llama", intermediate_size=96, num_attention_heads=12, num_key_value_heads=1),
    "qwen3_moe": lambda: tiny("qwen3_moe", **MIXTURE | {"moe_intermediate_size": 64}),
    "qwen2_moe": lambda: tiny("qwen2_moe", **MIXTURE | {"shared_expert_intermediate_size": 48}),
    "deepseek_v2": lambda: tiny("deepseek_v2", **LATENT | ONE_GROUP | {"moe_intermediate_size": 48}),
}
SHAPES = ("aligned:8", "aligned:12", "aligned:16", "tp:2", "tp:3", "tp:2,aligned:8")


@pytest.fixture(scope="module", params=MODELS)
def description(request):
    return describe(MODELS[request.param]())


@pytest.fixture(scope="module")
def gqa():
    model = MODELS["gqa"]()
    return model, describe(model)


def budget(description, shape, sparsity=0.4, scope="model"):
    return make_budget(description.groups, description.shapes, sparsity, scope, "rows", policy_of(shape))


def ranks(description, seed=0):
    """Layers differ in what they are worth, so that units have a reason to move."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(g.units, generator=generator) + 1 + 0.5 * (n % 3) for n, g in enumerate(description.groups)]
    return torch.cat(parts)


def widths(description, kept_N):
    """Group → kept units, of experts those of each that is not gone."""
    found = {}
    for g in description.groups:
        counts = by_group(kept_N, description.groups)[g.name].unflatten(0, (g.experts or 1, -1)).sum(1)
        found[g.name] = sorted(set(counts[counts > 0].tolist())) or [0]
    return found


def divides(group, width, ranks):
    """By hand: what a rank of tensor parallelism wants of a width."""
    if not group.attends:
        return width % ranks == 0
    heads = width * dict(group.sizes)["num_attention_heads"]
    keys = width if group.kind == "kv_groups" else heads
    return heads % ranks == 0 and (keys % ranks == 0 or ranks % keys == 0)


# --- widths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["model", "kind", "layer"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_width_is_a_multiple_and_divides_over_the_ranks(description, shape, scope):
    policy = policy_of(shape)
    try:
        limits = budget(description, shape, 0.35, scope)
    except InputError as error:  # of 32 channels an expert 24 or 32
        assert "no equal widths" in str(error) and scope == "layer" and shape in ("aligned:12", "tp:3")
        return
    for seed in range(3):
        found = widths(description, largest_that_fits(ranks(description, seed), limits))
        for g in description.groups:
            (width,) = found[g.name]  # of all experts of a layer the same
            assert divides(g, width, policy.ranks), (g.name, width)
            if not g.attends:
                step = policy.ranks * lcm(policy.align, 8 if g.experts and g.width % 8 == 0 else 1)
                assert width % step == 0 or (policy.align == 1 and width == g.width), (g.name, width)


@pytest.mark.parametrize("scope", ["model", "kind"])
@pytest.mark.parametrize("sparsity", [0.2, 0.35, 0.5, 0.65])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_budget_is_met_from_below_to_within_a_row(description, shape, sparsity, scope):
    try:
        limits = budget(description, shape, sparsity, scope)
    except InputError as error:
        reason = {0.2: "permits no more than", 0.65: "leaves no room"}[sparsity]
        assert reason in str(error) and (scope == "kind" or sparsity == 0.2)
        return
    for seed in range(3):
        kept_N = largest_that_fits(ranks(description, seed), limits)
        for c, allowed in enumerate(limits.allowed_C.tolist()):
            room = allowed - int(limits.params_N[kept_N & (limits.constraint_N == c)].sum())
            rows = [next_row(description, limits, g, kept_N, c) for g in description.groups]
            assert room >= 0, "over budget"
            assert room < min((r for r in rows if r), default=allowed), "another row would fit"


def next_row(description, limits, group, kept_N, constraint):
    """Parameters of the first row of a group that was not kept; None where all were."""
    names = [g.name for g in description.groups]
    start = sum(g.units for g in description.groups[: names.index(group.name)])
    if limits.constraint_N[start] != constraint:
        return None
    counts = kept_N[start : start + group.units].unflatten(0, (group.experts or 1, -1)).sum(1)
    have = int(counts.max())
    wider = [w for w in permitted(group, limits.policy) if w > have]
    stay = int((counts > 0).sum()) if have else group.experts
    return (wider[0] - have) * unit_params(group, description.shapes) * (stay or 1) if wider else None


@pytest.mark.parametrize("shape", SHAPES)
def test_inside_a_group_the_best_are_kept(description, shape):
    rank_N = ranks(description)
    kept = by_group(largest_that_fits(rank_N, budget(description, shape)), description.groups)
    of_group = by_group(rank_N, description.groups)
    for g in description.groups:
        rank_EC, kept_EC = (part[g.name].unflatten(0, (g.experts or 1, -1)) for part in (of_group, kept))
        for rank_C, mask_C in zip(rank_EC, kept_EC, strict=True):
            assert not mask_C.any() or mask_C.all() or rank_C[mask_C].min() > rank_C[~mask_C].max()


def test_units_move_to_the_layers_that_are_worth_more(gqa):
    _model, description = gqa
    rank_N = ranks(description)
    parts = by_group(rank_N, description.groups)
    parts["layers.0.channels"] += 3.0
    parts["layers.2.channels"] -= 3.0
    found = widths(description, largest_that_fits(torch.cat(list(parts.values())), budget(description, "aligned:16")))
    assert found["layers.0.channels"] == [80] and found["layers.2.channels"] < [32]


@pytest.fixture(scope="module", params=["gqa", "mha", "mqa"])
def worth(request):
    """A model whose layers differ in weight, what its units are worth a parameter (what the logits lose without each
    alone), shape (N,), and what they lose without all that a mask leaves out."""
    model = MODELS[request.param]()
    for layer, factor in zip(model.model.layers, (1.5, 0.7, 1.0), strict=True):
        layer.mlp.down_proj.weight.data.mul_(factor)
        layer.self_attn.o_proj.weight.data.mul_(1 / factor)
    description = describe(model)
    dense = dense_logits(model, tokens(4, 16)).log_softmax(-1)

    def loss(mask_N):
        with attached(model, description.groups, by_group(mask_N.float(), description.groups)):
            gated = dense_logits(model, tokens(4, 16)).log_softmax(-1)
        return kl_div(gated, dense, log_target=True, reduction="sum").item() / 64

    params_N = budget(description, "ragged").params_N
    each_N = torch.tensor([loss(torch.arange(len(params_N)) != unit) for unit in range(len(params_N))])
    return description, each_N / params_N, loss


@pytest.mark.parametrize(("shape", "sparsity"), [("aligned:24", 0.4), ("aligned:24", 0.5), ("tp:3,aligned:8", 0.4)])
def test_a_budget_costs_less_where_units_move_than_where_widths_are_rounded(worth, shape, sparsity):
    description, rank_N, loss = worth
    limits = budget(description, shape, sparsity)
    moved_N, ragged_N = (largest_that_fits(rank_N, b) for b in (limits, budget(description, "ragged", sparsity)))
    down_N = rounded_down(description, rank_N, ragged_N, shape)
    even_N = largest_that_fits(rank_N, budget(description, f"uniform,{shape}", sparsity, "expert"))
    assert limits.share_of(down_N) < limits.share_of(moved_N) <= 1 - sparsity + 1e-6
    assert loss(moved_N) < loss(down_N) and loss(moved_N) < loss(even_N)


def rounded_down(description, rank_N, kept_N, shape):
    """Of a kept set the best units of each group, as many as the next lower width that the shape permits."""
    masks, rank_of = by_group(kept_N, description.groups), by_group(rank_N, description.groups)
    parts = []
    for g in description.groups:
        width = max((w for w in permitted(g, policy_of(shape)) if w <= int(masks[g.name].sum())), default=0)
        parts.append(torch.zeros(g.units, dtype=torch.bool))
        parts[-1][rank_of[g.name].argsort(descending=True)[:width]] = True
    return torch.cat(parts)


def test_rows_are_kept_by_their_mean_and_against_a_count_by_hand():
    rank_N = torch.tensor([9.0, 0.0, 5.0, 4.9, 4.0, 4.2, 1.0, 1.1])
    rows = (Rows(slice(0, 4), (2, 4)), Rows(slice(4, 8), (2, 4)))
    ones_N = torch.ones(8, dtype=torch.int64)
    limits = Budget(("all",), torch.zeros_like(ones_N), ones_N, torch.tensor([5]), None, Policy(align=2), rows)
    kept_N = largest_that_fits(rank_N, limits)
    assert kept_N.tolist() == [True, False, True, False, True, True, False, False]  # 7.0, 4.1, then 2.45 does not fit


def test_nothing_is_kept_behind_a_row_that_does_not_fit():
    """The last, short row of a group would fit, but only in the place of the long one before it."""
    rank_N = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    ones_N = torch.ones(5, dtype=torch.int64)
    rows = (Rows(slice(0, 5), (2, 4, 5)),)
    limits = Budget(("all",), torch.zeros_like(ones_N), ones_N, torch.tensor([3]), None, Policy(align=2), rows)
    assert largest_that_fits(rank_N, limits).tolist() == [True, True, False, False, False]
    for allowed, kept in ((1, 0), (2, 2), (4, 4), (5, 5)):
        limits = replace(limits, allowed_C=torch.tensor([allowed]))
        assert int(largest_that_fits(rank_N, limits).sum()) == kept


def test_equal_ranks_do_not_let_a_short_row_overtake():
    rank_N = torch.full((50,), 0.1)
    ones_N = torch.ones(50, dtype=torch.int64)
    rows = (Rows(slice(0, 50), (48, 50)),)
    limits = Budget(("all",), torch.zeros_like(ones_N), ones_N, torch.tensor([0]), None, Policy(align=48), rows)
    for allowed, kept in ((47, 0), (48, 48), (49, 48), (50, 50)):
        limits = replace(limits, allowed_C=torch.tensor([allowed]))
        assert int(largest_that_fits(rank_N, limits).sum()) == kept


@pytest.mark.parametrize("scope", ["model", "kind", "layer", "expert"])
def test_a_shape_that_asks_for_nothing_keeps_what_ragged_keeps(description, scope):
    for shape in ("aligned:1", "tp:1"):
        limits, free = budget(description, shape, 0.4, scope), budget(description, "ragged", 0.4, scope)
        rank_N = ranks(description)
        assert torch.equal(largest_that_fits(rank_N, limits), largest_that_fits(rank_N, free))
    if not any(g.experts for g in description.groups):
        assert not free.rows, "dense models are planned unit by unit"


@pytest.mark.parametrize("shape", ["uniform,aligned:16", "uniform,tp:2", "uniform,tp:2,aligned:8"])
def test_equal_widths_are_permitted_ones_within_the_budget(description, shape):
    limits = budget(description, shape, 0.4, "expert")
    found = widths(description, largest_that_fits(ranks(description), limits))
    for kind in description.kinds:
        same = {tuple(found[g.name]) for g in description.groups if g.kind == kind}
        assert len(same) == 1
        group = next(g for g in description.groups if g.kind == kind)
        assert next(iter(same))[0] in permitted(group, limits.policy)
    assert int(limits.allowed_C.sum()) <= 0.6 * description.unit_parameters


# --- stored ----------------------------------------------------------------------------------------------------------


def planned(description, shape, sparsity=0.4, seed=0, close=()):
    parts = by_group(ranks(description, seed), description.groups)
    for name in close:
        parts[name].fill_(-9.0)
    z_N = torch.cat([parts[g.name] for g in description.groups])
    return make_plan(Gates(z_N, description.groups, {}), budget(description, shape, sparsity), shape, lambda _: 1.0)


@pytest.mark.parametrize("shape", ["aligned:16", "tp:2", "tp:3", "tp:2,aligned:8"])
def test_what_is_exported_computes_what_the_gated_model_computes(description, shape, request, tmp_path):
    model = MODELS[request.node.callspec.params["description"]]()
    plan, _ = planned(description, shape, 0.45)
    gated = gated_logits(model, description, plan, tokens())
    export(model, None, description, plan, tmp_path / "model")
    exported = load(tmp_path / "model", dtype=torch.float32)
    assert {n: tuple(p.shape) for n, p in exported.named_parameters()} == pruned_shapes(description, plan)
    assert (gated - dense_logits(model, tokens())).abs().max() > 1e-3
    assert (gated - dense_logits(exported, tokens())).abs().max() < 1e-5
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for layer in config.get("per_layer_config", {"all": config}).values():
        for key in ("num_attention_heads", "intermediate_size", "moe_intermediate_size"):
            assert layer.get(key, 0) % policy_of(shape).ranks == 0


@pytest.mark.parametrize(("shape", "width"), [("ragged", 8), ("aligned:32", 32), ("tp:3", 24), ("tp:2,aligned:12", 48)])
def test_a_mixture_whose_experts_are_all_gone_is_stored_in_a_permitted_width(shape, width, tmp_path):
    model = MODELS["qwen3_moe"]()
    description = describe(model)
    plan, _ = planned(description, shape, 0.5, close=("layers.1.expert_channels",))
    assert plan.sizes(description.groups)["layers.1.expert_channels"] == (width, 2)
    export(model, None, description, plan, tmp_path / "model")
    exported = load(tmp_path / "model", dtype=torch.float32)
    gated = gated_logits(model, description, plan, tokens())
    assert (gated - dense_logits(exported, tokens())).abs().max() < 1e-5


def equal_plan(description, shape, close=(), gone=()):
    """The first half of the units of every group, or of each of its experts, those of `gone` not."""
    kept = {}
    for g in description.groups:
        width = permitted(g, policy_of(shape))[(len(permitted(g, policy_of(shape))) - 1) // 2]
        experts = [e for e in range(g.experts or 1) if e not in gone]
        kept[g.name] = torch.cat([torch.arange(e * g.width, e * g.width + width) for e in experts])
    kept |= {name: torch.arange(0) for name in close}
    return Plan(kept, {name: torch.full((len(index),), 1.3) for name, index in kept.items()}, shape)


@pytest.mark.parametrize("shape", ["ragged", "aligned:16", "tp:3", "uniform"])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "deepseek_v2"])
def test_widths_that_turn_out_equal_are_written_as_a_stock_checkpoint(name, shape, tmp_path):
    model = MODELS[name]()
    description = describe(model)
    plan = equal_plan(description, shape)
    told = []
    export(model, None, description, plan, tmp_path / "model", card=lambda stock: told.append(stock) or "")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert told == [True] and not {"auto_map", "per_layer_config"} & config.keys()
    assert not list((tmp_path / "model").glob("*.py"))
    exported = load(tmp_path / "model", dtype=torch.float32, trust_remote_code=False)
    gated = gated_logits(model, description, plan, tokens())
    assert (gated - dense_logits(exported, tokens())).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gqa", {"close": ("layers.1.channels",)}),
        ("mha", {"close": ("layers.0.heads",)}),
        ("qwen3_moe", {"gone": (1,)}),
    ],
)
def test_equal_widths_around_something_that_is_gone_are_no_stock_checkpoint(name, changes, tmp_path):
    model = MODELS[name]()
    description = describe(model)
    plan = equal_plan(description, "ragged", **changes)
    told = []
    export(model, None, description, plan, tmp_path / "model", card=lambda stock: told.append(stock) or "")
    assert told == [False] and (tmp_path / "model" / "modeling_pruned.py").is_file()
    exported = load(tmp_path / "model", dtype=torch.float32)
    gated = gated_logits(model, description, plan, tokens())
    assert (gated - dense_logits(exported, tokens())).abs().max() < 1e-5
    with pytest.raises(InputError, match=r"--shape ragged|cannot hold this plan"):
        export(model, None, description, replace(plan, shape="uniform"), tmp_path / "uniform")


def test_widths_that_a_stock_class_refuses_are_written_ragged(tmp_path):
    """Heads that do not divide Gemma's hidden size: no word of it where nobody asked for a stock checkpoint."""
    model = tiny("gemma2", hidden_size=64, num_attention_heads=16, num_key_value_heads=8)
    description = describe(model)
    kept = {g.name: torch.arange(3 if g.attends else 20) for g in description.groups}
    plan = Plan(kept, {name: torch.ones(len(index)) for name, index in kept.items()})
    export(model, None, description, plan, tmp_path / "model")
    assert "per_layer_config" in json.loads((tmp_path / "model" / "config.json").read_text())
    gated = gated_logits(model, description, plan, tokens())
    assert (gated - dense_logits(load(tmp_path / "model", dtype=torch.float32), tokens())).abs().max() < 1e-5


def test_experts_are_filled_up_to_what_a_shape_permits():
    group = next(g for g in describe(MODELS["qwen3_moe"]()).groups if g.experts)
    kept = torch.arange(3)
    assert packed(group, kept).channels_EW.shape[1] == 8
    assert packed(group, kept, policy_of("aligned:32")).channels_EW.shape[1] == 32
    assert packed(group, torch.arange(33), policy_of("aligned:48")).channels_EW.shape[1] == 48
    assert packed(group, torch.arange(49), policy_of("aligned:48")).channels_EW.shape[1] == 64


def test_a_plan_file_whose_widths_its_shape_does_not_permit_is_refused(gqa, tmp_path):
    _model, description = gqa
    plan, rounding = planned(description, "tp:2,aligned:8")
    path = tmp_path / "plan.json"
    save_plan(path, plan, rounding, "abc")
    assert load_plan(path, description.groups, "abc")[0].policy == Policy("ragged", 8, 2)
    values = json.loads(path.read_text())
    for shape, reason in (("aligned:32", "does not permit"), ("tp:7", "does not permit"), ("trapezoid", "no shape"),
                          (["ragged"], "not a valid plan"), ("aligned:0", "the least is")):  # fmt: skip
        path.write_text(json.dumps(values | {"shape": shape}))
        with pytest.raises(InputError, match=reason) as error:
            load_plan(path, description.groups, "abc")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
