"""`--budget`: every budget is met from below by what is exported, counted here from the files alone, and nothing that
was removed would still fit; what cannot be met is one line that names the nearest that can.
"""

import json
import math
import re
import struct
from dataclasses import replace

import pytest
import torch

from secateur.budget import figures, largest_that_fits, make_budget
from secateur.costs import bounds_of
from secateur.describe import describe
from secateur.export import export
from secateur.files import InputError
from secateur.gates import Gates, by_group
from secateur.objective import lagrangian
from secateur.optimise import Optimiser
from secateur.plan import make_plan
from secateur.policy import policy_of
from secateur.recipes import auto_recipe, paper_recipe, tie_of
from secateur.units import Size
from secateur.wanted import read_budgets
from test_families import ONE_GROUP
from tiny import LATENT, MIXTURE, tiny

MODELS = {
    "mha": lambda: tiny("llama", intermediate_size=64, num_key_value_heads=6, tie_word_embeddings=True),
    "gqa": lambda: tiny("qwen2", intermediate_size=64, num_attention_heads=12, num_key_value_heads=6),
    "mixture": lambda: tiny("qwen3_moe", **MIXTURE | {"moe_intermediate_size": 64}),
    "latent": lambda: tiny("deepseek_v3", **LATENT | ONE_GROUP),
}
FIGURE = {"units": "block_parameters", "params": "active_parameters", "total-params": "parameters",
          "flops": "flops_per_token", "kv": "kv_bytes_per_token"}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return MODELS[name]()


@pytest.fixture(scope="module")
def description(model):
    return describe(model)


def buffer_bytes(model):
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return sum(t.nbytes for name, t in model.state_dict().items() if name not in names)


def budget(description, *words, shape="ragged", scope="model", method="deterministic", itemsize=4, buffers=0):
    bounds = bounds_of(description, read_budgets(words), itemsize, buffers, scope == "kind")
    tie, policy = tie_of(method, shape), policy_of(shape)
    return make_budget(description.groups, description.shapes, 0.0, scope, tie, policy, bounds)


def ranks(description, seed=0):
    """Layers differ in what they are worth; a tenth of the units would rather close."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(g.units, generator=generator) + 1.2 + 0.4 * (n % 3) for n, g in enumerate(description.groups)]
    return torch.cat(parts)


def planned(description, limits, shape="ragged", seed=0):
    gates = Gates(ranks(description, seed), description.groups, {})
    return make_plan(gates, limits, shape, lambda _: 1.0)


# --- the counter: files and nothing else -----------------------------------------------------------------------------

ITEM = {"F32": 4, "BF16": 2}


def stored(folder):
    """Name → (shape, bytes a value) of every tensor, read off the headers."""
    found = {}
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        found |= {n: (e["shape"], ITEM[e["dtype"]]) for n, e in header.items() if n != "__metadata__"}
    return found


def counted(folder):
    """Figures of an exported checkpoint by the names that transformers gives to weights."""
    config, tensors = json.loads((folder / "config.json").read_text()), stored(folder)
    experts = next(
        (config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config), 1
    )
    met = config.get("num_experts_per_tok", 1) / experts
    sizes = {n: math.prod(shape) * (met if ".mlp.experts." in n else 1) for n, (shape, _) in tensors.items()}
    parameters = {n for n in tensors if not n.endswith("e_score_correction_bias")}
    tied = "lm_head.weight" not in tensors
    maps = {n for n in parameters if n.endswith(("_proj.weight", "lm_head.weight", "_proj_with_mqa.weight"))}
    maps |= {"model.embed_tokens.weight"} if tied else set()
    cached = [n for n in tensors if re.search(r"self_attn\.(k_proj|v_proj|kv_a_proj_with_mqa)\.weight$", n)]
    return {
        "params": round(sum(sizes[n] for n in parameters)),
        "total-params": sum(math.prod(tensors[n][0]) for n in parameters),
        "flops": round(2 * sum(sizes[n] for n in maps)),
        "kv": sum(tensors[n][0][0] * tensors[n][1] for n in cached),
        "bytes": sum(math.prod(shape) * item for shape, item in tensors.values()),
    }


def steps(description, plan):
    """The sizes of the plan with one more unit (of experts: one more of each that is stored) in one of the groups."""
    sizes = plan.sizes(description.groups)
    for g in description.groups:
        wider = sizes[g.name].width + (8 if g.experts else 1)
        if sizes[g.name].width < g.width and wider <= g.width:
            yield {**sizes, g.name: Size(wider, sizes[g.name].parts)}


def kinds_of(description, sizes, itemsize, buffers):
    found = figures(description, sizes, itemsize)
    return {kind: getattr(found, field) for kind, field in FIGURE.items()} | {
        "bytes": found.parameters * itemsize + buffers
    }


BUDGETS = [
    ("units=0.6",), ("params=0.7",), ("total-params=0.75",), ("flops=0.7",), ("kv=0.5",), ("bytes=0.7",),
    ("params=0.7", "kv=0.5"), ("flops=0.8", "kv=0.7"), ("bytes=0.7", "kv=0.34"), ("total-params=0.8", "params=0.7"),
    ("units=0.5", "bytes=0.8", "kv=0.9"),
]  # fmt: skip


@pytest.mark.parametrize("words", BUDGETS, ids="+".join)
def test_what_is_exported_is_within_every_budget_and_no_further_unit_fits(model, description, words, tmp_path):
    buffers = buffer_bytes(model)
    dense = kinds_of(description, None, 4, buffers)
    limits = budget(description, *words, buffers=buffers)
    bound = {w.split("=")[0]: math.floor(round(float(w.split("=")[1]) * dense[w.split("=")[0]], 6)) for w in words}
    for seed in range(2):
        plan, _ = planned(description, limits, seed=seed)
        export(model, None, description, plan, tmp_path / f"{seed}")
        found = counted(tmp_path / f"{seed}")
        sizes = plan.sizes(description.groups)
        now = kinds_of(description, sizes, 4, buffers)
        assert found == {kind: value for kind, value in now.items() if kind != "units"}
        assert all(now[kind] <= most for kind, most in bound.items()), (now, bound)
        nexts = [kinds_of(description, more, 4, buffers) for more in steps(description, plan)]
        assert nexts and all(any(more[kind] > most for kind, most in bound.items()) for more in nexts)
        if len(bound) == 1:
            ((kind, most),) = bound.items()
            costs = [more[kind] - now[kind] for more in nexts]
            assert most - now[kind] < min(costs)


def test_the_unpruned_model_costs_what_its_own_files_hold(model, description, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    found = counted(tmp_path / "dense")
    bounds = bounds_of(description, read_budgets(f"{kind}=0.5" for kind in found), 4, buffer_bytes(model))
    assert {b.name: round(b.dense / b.scale) for b in bounds} == found


def test_figures_count_as_absolute_bounds_and_bytes_go_by_the_dtype_of_the_checkpoint(tmp_path):
    model = MODELS["gqa"]().to(torch.bfloat16)
    description = describe(model)
    limits = budget(description, "bytes=110kB", "kv=0.25KiB", "params=0.06M", itemsize=2)
    plan, _ = planned(description, limits)
    export(model, None, description, plan, tmp_path / "model", dtype=torch.bfloat16)
    found = counted(tmp_path / "model")
    assert found["bytes"] <= 110_000 and found["kv"] <= 256 and found["params"] <= 60_000
    bounds = {"bytes": 110_000, "kv": 256, "params": 60_000}
    for more in steps(description, plan):
        assert any(kinds_of(description, more, 2, 0)[kind] > most for kind, most in bounds.items())


# --- what is not linear ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_latent_of_a_cache_goes_with_whole_layers_those_that_are_worth_least(best):
    description = describe(MODELS["latent"]())
    limits = budget(description, "kv=0.34")  # of three layers one
    z_N = ranks(description)
    for g, part in zip(description.groups, z_N.split([g.units for g in description.groups]), strict=True):
        if g.attends:
            part.copy_(torch.full_like(part, 2.0 if g.layer == best else 1.0))
            part[0] = 2.5 if g.layer == best else 3.0  # the best unit alone does not open a layer
    kept = by_group(largest_that_fits(z_N, limits), description.groups)
    assert [bool(kept[f"layers.{n}.heads"].any()) for n in range(3)] == [n == best for n in range(3)]
    assert kept[f"layers.{best}.heads"].all()


def test_learning_sees_what_opens_a_sublayer_by_its_highest_score_and_all_its_units_feel_it():
    description = describe(MODELS["latent"]())
    limits = budget(description, "kv=0.34")
    score_N = torch.zeros(len(limits.params_N), requires_grad=True)
    parts = by_group(torch.arange(len(score_N)), description.groups)
    with torch.no_grad():
        score_N[parts["layers.1.heads"][2]] = 0.75
    share = limits.kept_share(score_N)
    assert share.item() == pytest.approx(0.75 / 3)
    (grad_N,) = torch.autograd.grad(share.sum(), score_N)
    heads = torch.cat([parts[f"layers.{n}.heads"] for n in range(3)])
    torch.testing.assert_close(grad_N[heads], torch.full((len(heads),), 1 / len(heads)))
    assert grad_N.count_nonzero() == len(heads)  # channels hold no cache


@pytest.mark.parametrize("living", [1, 2, 4])
@pytest.mark.parametrize("words", [("params=0.5",), ("bytes=0.4", "units=0.6")], ids="+".join)
def test_experts_that_are_gone_are_counted_as_they_are_stored(words, living, tmp_path):
    """Of one living expert two are stored."""
    model = MODELS["mixture"]()
    description = describe(model).only(())
    limits = budget(description, *words)
    z_N = ranks(description).abs()
    for part in z_N.split([g.units for g in description.groups]):
        part.unflatten(0, (5, -1))[living:] = -1.0
    plan, _ = make_plan(Gates(z_N, description.groups, {}), limits, "ragged", lambda _: 1.0)
    sizes = plan.sizes(description.groups)
    assert {s.parts for s in sizes.values() if s.width > 8} == {max(2, living)}
    export(model, None, description, plan, tmp_path / "model")
    found = counted(tmp_path / "model")
    dense = kinds_of(description, None, 4, 0)
    bounds = {kind: float(share) * dense[kind] for kind, share in (w.split("=") for w in words)}
    assert all(found[kind] <= most for kind, most in bounds.items() if kind != "units")
    nexts = [kinds_of(description, more, 4, 0) for more in steps(description, plan)]
    assert all(any(more[kind] > most for kind, most in bounds.items()) for more in nexts)


@pytest.mark.parametrize("share", [0.4, 0.5, 0.8])
def test_experts_that_go_whole_are_within_the_budget(share, tmp_path):
    model = MODELS["mixture"]()
    description = describe(model).only(())
    words = f"total-params={share}"
    plan, _ = planned(description, budget(description, words, method="reap"))
    export(model, None, description, plan, tmp_path / "model")
    found, dense = counted(tmp_path / "model"), figures(description, None, 4).parameters
    assert found["total-params"] <= share * dense
    (expert,) = {3 * 48 * g.width for g in description.groups}
    assert share * dense - found["total-params"] < 2 * expert  # the first expert of a layer brings a second one


def test_parameters_that_serve_all_units_go_with_the_last_one(tmp_path):
    """Keys of multi-query attention: the cache of a layer stays whole or goes."""
    model = tiny("llama", num_attention_heads=6, num_key_value_heads=1)
    description = describe(model)
    plan, _ = planned(description, budget(description, "kv=0.67"))
    export(model, None, description, plan, tmp_path / "model")
    assert counted(tmp_path / "model")["kv"] == 2 * (2 * 8 * 4)
    assert sorted(len(plan.kept[f"layers.{n}.heads"]) for n in range(3)) == [0, 6, 6]


@pytest.mark.parametrize("words", [("params=0.7",), ("flops=0.8", "kv=0.67"), ("units=0.6", "kv=0.5")], ids="+".join)
@pytest.mark.parametrize("unit", ["heads", "nested", "kv-groups"])
@pytest.mark.parametrize("shape", ["ragged", "tp:2"])
def test_attention_units_keep_every_budget(unit, shape, words, tmp_path):
    """Single query heads leave the cache of a layer whole or close it; nested ones cost in two groups at once."""
    model = MODELS["gqa"]()
    description = describe(model, unit)
    plan, _ = planned(description, budget(description, *words, shape=shape), shape)
    export(model, None, description, plan, tmp_path / "model")
    found, dense = counted(tmp_path / "model"), kinds_of(description, None, 4, 0)
    found["units"] = kinds_of(description, plan.sizes(description.groups), 4, 0)["units"]
    assert found | kinds_of(description, plan.sizes(description.groups), 4, 0) == found
    spent = [found[kind] / (float(share) * dense[kind]) for kind, share in (word.split("=") for word in words)]
    assert max(spent) <= 1 + 1e-9
    assert 1 - spent[0] < 0.01 if len(words) == 1 and shape == "ragged" else max(spent) > 0.8


def test_what_keep_leaves_whole_is_in_the_figures_that_are_bounded(tmp_path):
    model = MODELS["gqa"]()
    description = describe(model).keeping(("layers.0", "layers.2.attention"))
    dense = kinds_of(describe(model), None, 4, 0)
    plan, _ = planned(description, budget(description, "units=0.7", "kv=0.8"))
    export(model, None, description, plan, tmp_path / "model")
    now = kinds_of(description, plan.sizes(description.groups), 4, 0)
    assert now["units"] <= 0.7 * dense["units"] and counted(tmp_path / "model")["kv"] == now["kv"] <= 0.8 * dense["kv"]
    bounds = {"units": 0.7 * dense["units"], "kv": 0.8 * dense["kv"]}
    for more in steps(description, plan):
        assert any(kinds_of(description, more, 4, 0)[kind] > most for kind, most in bounds.items())
    assert "cannot be met" in refused(description, "kv=0.6")  # two of three layers keep their cache


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("params=0.6",), ("flops=0.75", "kv=0.67"), ("params=0.9", "kv=0.34")], ids="+".join)
@pytest.mark.parametrize("shape", ["aligned:16", "tp:2", "tp:2,aligned:8", "uniform", "uniform,aligned:16"])
@pytest.mark.parametrize("which", ["gqa", "mixture"])
def test_shapes_keep_every_budget(which, shape, words, tmp_path):
    model = MODELS[which]()
    description = describe(model)
    scope = "expert" if "uniform" in shape else "model"
    try:
        limits = budget(description, *words, shape=shape, scope=scope)
    except InputError as error:
        assert (which, "tp" in shape) == ("mixture", True) and "nearest" in str(error)  # three KV groups a layer
        return
    plan, _ = planned(description, limits, shape)
    export(model, None, description, plan, tmp_path / "model")
    found, dense = counted(tmp_path / "model"), kinds_of(description, None, 4, 0)
    bounds = {kind: float(share) * dense[kind] for kind, share in (w.split("=") for w in words)}
    assert all(found[kind] <= most for kind, most in bounds.items())
    sizes, widths = plan.sizes(description.groups), {g.kind: g.width for g in description.groups}
    if "uniform" not in shape:
        policy = policy_of(shape)
        step = math.lcm(policy.align, 8 if which == "mixture" else 1) * policy.ranks
        assert all(sizes[g.name].width % step in (0, g.width % step) for g in description.groups if not g.attends)
        assert any(found[kind] > 0.9 * most for kind, most in bounds.items())
        return
    for kind in widths:  # no kind could be wider in all layers
        wider = {
            g.name: sizes[g.name]._replace(width=sizes[g.name].width + (g.kind == kind)) for g in description.groups
        }
        step = 16 if "aligned" in shape and kind != "kv_groups" else 8 if kind == "expert_channels" else 1
        wider = {
            g.name: sizes[g.name]._replace(width=sizes[g.name].width + step * (g.kind == kind))
            for g in description.groups
        }
        if all(wider[g.name].width <= g.width for g in description.groups):
            assert any(kinds_of(description, wider, 4, 0)[k] > most for k, most in bounds.items()), kind


def test_equal_widths_of_shared_experts_follow_the_routed_ones(tmp_path):
    model = MODELS["latent"]()
    description = describe(model).only(("expert_channels", "shared_channels"))
    plan, _ = planned(description, budget(description, "bytes=0.8", shape="uniform", scope="expert"), "uniform")
    export(model, None, description, plan, tmp_path / "model")
    dense = figures(description, None, 4).parameters * 4
    assert 0.7 * dense < counted(tmp_path / "model")["bytes"] <= 0.8 * dense


def test_equal_layers_of_experts_hold_though_units_of_one_are_all_that_is_worth_anything(tmp_path):
    model = MODELS["mixture"]()
    description = describe(model).only(())
    limits = budget(description, "total-params=0.4995", scope="layer")
    z_N = ranks(description).abs()
    for part in z_N.split([g.units for g in description.groups]):
        part[64:] = -1.0  # all but the first expert's
    plan, _ = make_plan(Gates(z_N, description.groups, {}), limits, "ragged", lambda _: 1.0)
    export(model, None, description, plan, tmp_path / "model")
    dense = figures(description, None, 4).parameters
    assert 0.3 * dense < counted(tmp_path / "model")["total-params"] <= 0.4995 * dense


# --- one multiplier each ---------------------------------------------------------------------------------------------


def trained(limits, steps=100, recipe=auto_recipe, seed=0, informed=True):
    """Gates whose loss falls with every unit that opens, by what it is worth; the steps. All start open unless
    `informed` of that."""
    optimiser = Optimiser(recipe(steps), limits, steps, seed, CPU)
    generator = torch.Generator().manual_seed(seed)
    worth_N = (torch.rand(limits.share_N.shape, generator=generator) + 0.1) * limits.share_N
    if informed:
        optimiser.start_from(worth_N, worth_N)
    records = []
    while optimiser.done < optimiser.settles_at:
        records.append(optimiser.advance(-worth_N, 1.0, 1.0, 0.0))
    return optimiser, records


@pytest.mark.parametrize("recipe", [auto_recipe, paper_recipe])
def test_every_budget_has_a_multiplier_that_moves_by_itself(recipe):
    limits = budget(describe(MODELS["gqa"]()), "params=0.7", "kv=0.5", "bytes=0.99")
    _, records = trained(limits, 400, recipe, informed=recipe == auto_recipe)
    assert limits.names == ("params", "kv", "bytes")
    params, kv, idle = zip(*(step.lambda1 for step in records), strict=True)
    assert min(params[-1], kv[-1]) > 0
    assert params != kv and abs(idle[-1]) < 0.01 * max(params)  # it binds until a hundredth is closed, then has no say
    last = records[-1].budgets
    assert last["params"] == pytest.approx(1, abs=0.03) and last["kv"] == pytest.approx(1, abs=0.03)
    assert last["bytes"] < 0.9 and records[-1].target is None


def test_a_tighter_budget_of_one_kind_closes_more_of_what_it_counts_and_leaves_the_other_its_room():
    description = describe(MODELS["gqa"]())
    kept = {}
    for share in ("0.34", "0.67"):
        optimiser, _ = trained(budget(description, "params=0.7", f"kv={share}"))
        optimiser.fix_kept_set()
        masks = by_group(optimiser.z_N > 0, description.groups)
        kept[share] = {kind: sum(int(masks[g.name].sum()) for g in description.groups if g.kind == kind)
                       for kind in ("kv_groups", "channels")}  # fmt: skip
    assert kept["0.34"]["kv_groups"] == 6 and kept["0.67"]["kv_groups"] <= 12
    assert kept["0.34"]["channels"] > kept["0.67"]["channels"]


def test_a_multiplier_rises_while_one_unit_keeps_a_sublayer_open():
    description = describe(MODELS["latent"]())
    optimiser = Optimiser(auto_recipe(100), budget(description, "kv=0.34"), 100, 0, CPU)
    optimiser.z_N = torch.zeros_like(optimiser.z_N)
    for g, part in zip(description.groups, optimiser.z_N.split([g.units for g in description.groups]), strict=True):
        part[0] = float(g.attends)
    (first, *_) = optimiser.advance(torch.full_like(optimiser.z_N, 1e-3), 1.0, 1.0, 0.0).lambda1
    assert first == 0.0 and optimiser.duals[0].item() > 0.0  # of 18 heads 3 are open, but the whole cache is there


def test_one_budget_is_an_equality_and_several_never_pull_gates_open():
    lambdas = torch.tensor([0.5]), torch.tensor([2.0]), torch.tensor([0.0])
    for violation, equality, at_most in ((0.1, 0.9, 0.9), (-0.1, 0.1, 0.1), (-0.5, -1.5, 0.0)):
        for asked, slope in ((False, equality), (True, at_most)):
            v = torch.tensor([violation], requires_grad=True)
            terms = lagrangian(v, torch.zeros(1), *lambdas, at_most=asked)
            (grad,) = torch.autograd.grad(terms, v)
            assert grad.item() == pytest.approx(slope)
    for lambda1 in (-0.5, 0.0, 0.5):
        v = torch.linspace(-1, 1, 9).requires_grad_()
        terms = lagrangian(v, torch.zeros(9), torch.full((9,), lambda1), *lambdas[1:], at_most=True)
        assert (torch.autograd.grad(terms, v)[0] >= 0).all()


@pytest.mark.parametrize("recipe", [auto_recipe, paper_recipe])
@pytest.mark.parametrize("scope", ["model", "kind", "layer"])
def test_a_sparsity_alone_gives_the_terms_that_it_gave_before_there_were_budgets(recipe, scope):
    description = describe(MODELS["gqa"]())
    limits = make_budget(description.groups, description.shapes, 0.3, scope)
    optimiser = Optimiser(recipe(40), limits, 40, 0, CPU)
    generator = torch.Generator().manual_seed(0)
    total_C = torch.zeros_like(limits.allowed_C).index_add(0, limits.constraint_N, limits.params_N)
    weight_N = (limits.params_N / total_C[limits.constraint_N]).float()

    def mean(value_N):
        return torch.zeros(len(total_C)).index_add(0, limits.constraint_N, weight_N * value_N)

    for _ in range(12):
        grad_N = torch.randn(len(weight_N), generator=generator) * 1e-3
        before = [dual.detach().clone().requires_grad_() for dual in optimiser.duals]
        z_N, mu = optimiser.z_N.clone().requires_grad_(), optimiser.mu
        score_N = optimiser.relaxation.score(z_N, mu)
        violation_C = mean(score_N) - (limits.allowed_C / total_C).float()
        terms = lagrangian(violation_C, mean(score_N * (1.0 - score_N)), *before)
        (expected_N,) = torch.autograd.grad(terms, z_N)
        found_N = optimiser._budget_gradient(grad_N, mu, optimiser._rate())
        scale_C = torch.ones_like(optimiser.unit_C) if optimiser.recipe.adam_duals else optimiser.unit_C
        assert torch.equal(found_N, expected_N * scale_C[limits.constraint_N])
        optimiser.advance(grad_N, 1.0, 1.0, 0.0)


def test_where_two_budgets_bind_units_are_ranked_by_worth_at_their_prices():
    description = describe(MODELS["gqa"]())
    limits = budget(description, "params=0.6", "kv=0.34")
    for seed in range(5):
        worth_N = torch.rand(len(limits.params_N), generator=torch.Generator().manual_seed(seed)) * limits.share_N
        by_price, by_params = (
            float(worth_N[largest_that_fits(rank_N, limits)].sum())
            for rank_N in (limits.per_cost(worth_N), worth_N / limits.share_N)
        )
        assert by_price >= 0.995 * by_params
        with torch.autocast("cpu", torch.bfloat16):  # as where gates are learned
            narrow_N = limits.per_cost(worth_N)
        assert torch.equal(narrow_N, limits.per_cost(worth_N))


def test_a_unit_is_worth_the_more_the_less_it_costs_of_what_is_bounded():
    description = describe(MODELS["mixture"]())
    worth = budget(description, "flops=0.6").per_cost(torch.ones(sum(g.units for g in description.groups)))
    parts = by_group(worth, description.groups)
    channel, keys = parts["layers.0.expert_channels"], parts["layers.0.kv_groups"]
    flops = {"channel": 3 * 48 * 2 * (2 / 5), "keys": 2 * 48 * 8 * (2 + 1 + 1 + 2)}
    assert channel[0] / keys[0] == pytest.approx(flops["keys"] / flops["channel"], rel=1e-4)
    free = by_group(budget(description, "kv=0.5").per_cost(torch.ones_like(worth)), description.groups)
    assert free["layers.0.expert_channels"].min() > 1e3 * free["layers.0.kv_groups"].max()


# --- what cannot be met ----------------------------------------------------------------------------------------------


def refused(description, *words, **options):
    with pytest.raises(InputError) as error:
        budget(description, *words, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "words", ["params=0.05", "bytes=1kB", "kv=0.001", "flops=9", "units=0.001", "total-params=0.1"]
)
@pytest.mark.parametrize("scope", ["model", "expert"])
def test_a_budget_that_cannot_be_met_is_refused_with_the_nearest_that_can(description, words, scope):
    if scope == "expert" and any(not g.sizes for g in description.groups):
        description = replace(description, groups=tuple(g for g in description.groups if g.sizes))
    if len({(g.kind, g.width) for g in description.groups}) > len(description.kinds):
        pytest.skip("layers differ")
    said = refused(description, words, "flops=0.999", scope=scope) if not words.startswith("flops") else refused(
        description, words, "bytes=0.999", scope=scope
    )  # fmt: skip
    assert f"--budget {words} cannot be met" in said
    if scope == "expert" and words.startswith("kv") and any(g.kind == "heads" for g in description.groups if g.shared):
        assert "go with whole layers only" in said  # the latent is one for all heads
        return
    nearest = re.search(r"the nearest is --budget (\S+)$", said)[1]
    limits = budget(description, nearest, scope=scope)
    assert largest_that_fits(ranks(description), limits).any()
    kind, value = nearest.split("=")
    less = float(value) - 0.001 if "." in value else int(value) - 1
    assert "cannot be met" in refused(
        description, f"{kind}={less:.3f}" if "." in value else f"{kind}={less}", scope=scope
    )


def test_a_budget_of_what_is_not_pruned_is_refused():
    description = describe(MODELS["mixture"]()).only(())
    said = refused(description, "kv=0.5")
    assert "none of the bytes of KV cache a token belong to what is pruned (expert_channels)" in said


def test_budgets_that_the_unpruned_model_meets_are_refused_but_one_of_several_may_be_idle():
    description = describe(MODELS["gqa"]())
    said = refused(description, "params=1T", "bytes=1GB")
    assert "--budget params=1T cannot be met to within a unit: the unpruned model has no more than" in said
    assert budget(description, "params=0.5", "bytes=1GB").names == ("params", "bytes")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("size=0.5",), "'size' is no budget; there are units, params, total-params, flops, kv, bytes"),
        (("kv",), "neither a share such as 0.7 nor a figure such as 10KB"),
        (("kv=",), "neither a share"), (("kv=half",), "neither a share"), (("params=-0.5",), "neither a share"),
        (("params=nan",), "neither a share"), (("params=10MB",), "neither a share"), (("bytes=5X",), "neither a share"),
        (("flops=0",), "a share to keep lies between 0 and 1, a figure above 1"), (("kv=1",), "between 0 and 1"),
        (("kv=0.5", "kv=0.5"), "--budget kv=0.5 contradicts --budget kv=0.5: say kv once"),
        (("params=0.5", "params=9M"), "--budget params=0.5 contradicts --budget params=9M"),
    ],
)  # fmt: skip
def test_words_that_are_no_budget_are_named(words, reason):
    with pytest.raises(InputError, match=re.escape(reason)):
        read_budgets(words)


def test_what_padded_mixtures_and_whole_experts_cannot_hold_is_refused():
    mixture = describe(MODELS["mixture"]()).only(())
    assert "--shape padded stores more" in refused(mixture, "params=0.5", shape="padded")
    assert "use --per model" in refused(mixture, "params=0.5", scope="layer", method="reap")


@pytest.mark.parametrize("words", [("params=0.995",), ("params=0.995", "bytes=0.995")], ids="+".join)
def test_a_budget_that_a_shape_cannot_spend_is_refused_with_the_nearest_that_it_can(words):
    description = describe(tiny("llama", intermediate_size=56, num_attention_heads=6, num_key_value_heads=6))
    said = refused(description, *words, shape="aligned:48")
    found = re.search(r"--shape aligned:48 permits no more than .*; the nearest is --budget (params=[0-9.]+)", said)
    budget(description, found[1], shape="aligned:48")
