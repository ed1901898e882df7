"""Shapes that kernels, quantisation and tensor parallelism want: every width is one that the shape permits, the budget
is spent from below all the same, and what is exported computes what the gated model computes.
"""

import json
from dataclasses import replace
from io import StringIO
from math import exp, lcm

import pytest
import torch
from rich.console import Console
from torch.nn.functional import kl_div

from runs import gates_of as gates_file
from runs import prune_arguments, secateur, small_llama, small_tokenizer
from secateur.attach import attached
from secateur.budget import Budget, Rows, largest_that_fits, make_budget
from secateur.config import auto_recipe
from secateur.describe import describe
from secateur.export import export
from secateur.files import InputError
from secateur.gates import Gates, by_group
from secateur.importance import ONE_SHOT
from secateur.learn import learn
from secateur.optimise import Optimiser
from secateur.plan import Plan, load_plan, make_plan, save_plan
from secateur.planning import compare_shapes, shapes_table
from secateur.policy import Policy, permitted, policy_of
from secateur.relaxation import RELAXATIONS
from secateur.slicing import pruned_shapes
from secateur.stages import open_session
from secateur.units import packed, unit_params
from test_families import ONE_GROUP
from test_mixtures import small_mixture
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


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["deterministic", "grasprune", "hard-concrete"])
@pytest.mark.parametrize("shape", ["aligned:16", "tp:2"])
def test_values_are_learned_for_the_set_that_is_planned(shape, method):
    model = small_llama(num_key_value_heads=4)
    description = describe(model)
    limits = budget(description, shape, 0.3)
    ids = torch.randint(3, 64, (18, 16), generator=torch.Generator().manual_seed(1))
    learned = learn(
        model, description.groups, ids[:16], ids[16:], limits, auto_recipe(8), steps=8, batch_size=2, method=method
    )
    assert learned.fixing is not None and learned.fixing.kept_after <= 0.7
    assert torch.equal(learned.z_N > 0, largest_that_fits(learned.z_N, limits))
    plan, rounding = make_plan(
        Gates(learned.z_N, description.groups, {}, learned.value_N), limits, shape, lambda _: 1.0
    )
    assert rounding.closed == rounding.reopened == 0
    for g in description.groups:
        assert len(plan.kept[g.name]) in (0, *permitted(g, limits.policy))


def test_learning_does_not_go_on_from_a_checkpoint_for_another_shape(tmp_path):
    model = small_llama(num_key_value_heads=4)
    description = describe(model)
    ids = torch.randint(3, 64, (10, 16), generator=torch.Generator().manual_seed(1))

    def learned(shape, on_step=lambda _: None):
        limits = budget(description, shape, 0.3)
        return learn(
            model, description.groups, ids[:8], ids[8:], limits, auto_recipe(4), steps=4, batch_size=2,
            checkpoint=tmp_path / "checkpoint.safetensors", on_step=on_step,
        )  # fmt: skip

    def interrupt(step):
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learned("aligned:16", interrupt)
    with pytest.raises(InputError, match="belongs to other settings"):
        learned("aligned:8")
    assert torch.equal(learned("aligned:16").z_N, learned("aligned:16").z_N)


def test_a_hard_mask_has_permitted_widths_at_every_step(gqa):
    _model, description = gqa
    limits = budget(description, "aligned:16")
    recipe = replace(auto_recipe(10), dual_lr=(0.0, 0.0, 0.0), dual_start=(0.0, 0.0, 0.0))
    optimiser = Optimiser(recipe, limits, 10, 0, torch.device("cpu"), RELAXATIONS["grasprune"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimiser.advance(torch.randn(len(limits.params_N), generator=generator), 1.0, 1.0, 0.0)
        open_units = by_group(optimiser.open_N, description.groups)
        for g in description.groups:
            assert int(open_units[g.name].sum()) in (0, *permitted(g, limits.policy))


def test_scores_are_kept_in_rows_and_the_gates_file_repeats_them(dense, text, tmp_path):
    run = tmp_path / "run"
    assert "sensitivity" in ONE_SHOT
    assert secateur(*prune_arguments(dense, text, run, method="sensitivity", shape="aligned:16")) == 0
    plan = json.loads((run / "plan.json").read_text())
    assert all(w % 16 == 0 for name, w in plan["widths"].items() if name.endswith("channels"))
    gates = gates_file(run)
    assert {n: int((z > 0).sum()) for n, z in gates.items() if n in plan["widths"]} == plan["widths"]


# --- the command line ------------------------------------------------------------------------------------------------


def test_prune_learns_exports_and_verifies_an_aligned_model(capsys, dense, text, tmp_path):
    run = tmp_path / "run"
    assert secateur(*prune_arguments(dense, text, run, shape="aligned:16")) == 0
    plan = json.loads((run / "plan.json").read_text())
    assert plan["shape"] == "aligned:16" and (plan["rounding"]["closed"], plan["rounding"]["reopened"]) == (0, 0)
    assert all(w % 16 == 0 for name, w in plan["widths"].items() if name.endswith("channels"))
    assert 0.6 < plan["rounding"]["kept"] <= 0.7 + 1e-6
    assert json.loads((run / "verify.json").read_text())["passed"]
    assert "multiples of 16" in (run / "model" / "README.md").read_text()
    capsys.readouterr()
    assert secateur("plan", run) == 0
    assert "aligned:16 beside ragged" in capsys.readouterr().out
    assert json.loads((run / "plan.json").read_text()) == plan


def test_plan_and_export_take_another_shape_and_say_what_it_costs(capsys, run):
    capsys.readouterr()
    assert secateur("plan", run, "--shape", "aligned:8,tp:2") == 0
    said = " ".join(capsys.readouterr().out.split())
    planned_loss = json.loads((run / "plan.json").read_text())["rounding"]["held_out_planned"]
    session = open_session(run)
    costs, _ = compare_shapes(session, "tp:2,aligned:8")
    by_shape = {c.shape: c for c in costs}
    rise = by_shape["tp:2,aligned:8"].held_out - by_shape["ragged"].held_out
    assert by_shape["tp:2,aligned:8"].held_out == pytest.approx(planned_loss, abs=1e-6)
    assert f"held-out loss {rise:+.4f} (perplexity × {torch.tensor(rise).exp().item():.4f})" in said
    for shape in ("ragged", "tp:2,aligned:8"):
        assert f"{by_shape[shape].kept:.2%}" in said
    assert secateur("export", run, "--shape", "aligned:8,tp:2", "--low-memory") == 0  # which does not plan anew
    assert secateur("verify", run) == 0
    widths_of = json.loads((run / "plan.json").read_text())["widths"]
    assert all(w % (16 if name.endswith("channels") else 2) == 0 for name, w in widths_of.items())
    assert secateur("export", run, "--shape", "uniform,aligned:16") == 0 and secateur("verify", run) == 0
    config = json.loads((run / "model" / "config.json").read_text())
    assert "auto_map" not in config and config["intermediate_size"] % 16 == 0


def test_ragged_is_compared_with_nothing(capsys, run):
    capsys.readouterr()
    assert secateur("plan", run) == 0
    assert "beside" not in capsys.readouterr().out


def test_compare_lists_the_usual_shapes_and_the_one_asked_for(capsys, run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "timings.json"}
    capsys.readouterr()
    assert secateur("plan", run, "--compare", "--shape", "aligned:16") == 0
    said = " ".join(capsys.readouterr().out.split())
    for shape in ("dense", "ragged", "uniform", "aligned:32", "aligned:64", "tp:2", "aligned:16"):
        assert shape in said
    assert "not possible: aligned:128: --shape aligned:128: layers.0.channels has 64 channels, fewer than 128" in said
    assert {path: path.read_bytes() for path in before} == before
    assert "experts gone" not in said and "active" not in said, "what only mixtures have"
    costs, _ = compare_shapes(open_session(run), "aligned:16")
    assert [c.shape for c in costs] == ["dense", "ragged", "uniform", "aligned:32", "aligned:64", "tp:2", "aligned:16"]
    wide = Console(width=200, file=StringIO())
    wide.print(shapes_table(costs))
    said = wide.file.getvalue()
    for c in costs[1:]:
        rise = c.held_out - costs[0].held_out
        assert f"{c.held_out:.3f} ({rise:+.3f})" in said and f"{exp(c.held_out):.4g} (× {exp(rise):.3f})" in said
        assert f"{c.kept:.2%}" in said and c.kept <= 0.7 + 1e-6
        assert f"(−{1 - c.sizes.flops_per_token / costs[0].sizes.flops_per_token:.1%})" in said


def test_the_card_of_an_aligned_run_whose_widths_turn_out_equal_asks_for_no_code(run):
    assert secateur("plan", run, "--shape", "uniform,aligned:16") == 0
    path = run / "plan.json"
    path.write_text(path.read_text().replace('"uniform,aligned:16"', '"aligned:16"'))
    assert secateur("export", run) == 0
    for command in ("verify", "eval"):
        card = (run / "model" / "README.md").read_text()
        assert "no code is needed" in card and "trust_remote_code" not in card
        assert secateur(command, run) == 0
    assert "no code is needed" in (run / "model" / "README.md").read_text()
    load(run / "model", trust_remote_code=False)


def test_a_mixture_goes_the_whole_way_in_multiples(tmp_path, text):
    small_mixture(moe_intermediate_size=48).save_pretrained(tmp_path / "dense")
    small_tokenizer().save_pretrained(tmp_path / "dense")
    run = tmp_path / "run"
    assert secateur(*prune_arguments(tmp_path / "dense", text, run, shape="aligned:16", sparsity=0.4)) == 0
    assert json.loads((run / "verify.json").read_text())["passed"]
    model = load(run / "model")
    assert all(layer.mlp.experts.down_proj.shape[2] % 16 == 0 for layer in model.model.layers)
