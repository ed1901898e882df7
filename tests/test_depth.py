"""Whole sublayers with gates of their own: `--depth`. Width and depth compete for one budget, and what is exported
computes what was gated, also where a norm stands between a sublayer and the hidden states."""

import json
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from safetensors import safe_open

from runs import (
    complaint,
    described,
    gates_of,
    prune_arguments,
    random_tokens,
    same_gates,
    secateur,
    small_llama,
    write_checkpoint,
    write_texts,
)
from secateur.attach import attached
from secateur.budget import largest_that_fits, make_budget
from secateur.config import Config
from secateur.config_file import load_config
from secateur.costs import bounds_of
from secateur.depth import with_depth
from secateur.describe import describe
from secateur.files import InputError
from secateur.joint import price, sublayers_of
from secateur.latency import write_table
from secateur.load import describe_pretrained
from secateur.objective import lagrangian, retention_score
from secateur.optimise import Optimiser
from secateur.order import nested
from secateur.plan import load_plan
from secateur.recipes import RECIPES
from secateur.sensitivity import balanced, gate_sensitivity
from secateur.units import unit_params
from secateur.wanted import read_budgets
from test_latency import table_of
from tiny import MIXTURE, dense_logits, random_plan, tiny, tokens

UNEVEN = {"num_key_value_heads": 4}


def with_gates(model, depth="joint", unit=None):
    return with_depth(describe(model, unit), model, depth)


@pytest.fixture(scope="module")
def llama():
    return small_llama(**UNEVEN)


@pytest.fixture(scope="module")
def joint(llama):
    return with_gates(llama)


# --- what there is ---------------------------------------------------------------------------------------------------


def test_every_sublayer_has_a_gate_beside_those_of_its_units(llama, joint):
    units, gates = describe(llama).groups, joint.groups[6:]
    assert [g.name for g in gates] == [f"layers.{i}.{kind}" for i in range(3) for kind in ("attention", "mlp")]
    assert all(g.units == 1 and not g.slices and not g.writes for g in gates)
    for g, plain in zip(joint.groups, units, strict=False):
        assert replace(g, depth="") == plain
        assert g.depth == f"layers.{g.layer}.{'attention' if g.attends else 'mlp'}"


def test_alone_the_one_unit_of_a_sublayer_is_all_of_it(llama):
    alone = with_gates(llama, "alone")
    assert [g.kind for g in alone.groups] == ["attention", "mlp"] * 3 and {g.units for g in alone.groups} == {1}
    dense = describe(llama)
    assert alone.unit_parameters == dense.unit_parameters
    assert [g.slices for g in alone.groups] == [g.slices for g in dense.groups]
    attention = alone.groups[0]
    assert dict(attention.sizes) == {"num_attention_heads": 8, "num_key_value_heads": 4}


NORMS = {
    "llama": (None, None),
    "cohere": (None, None),
    "granite": (None, None),
    "gemma": (None, None),
    "gemma2": ("post_attention_layernorm", 1.0),
    "gemma3_text": ("post_attention_layernorm", 1.0),
    "glm4": ("post_self_attn_layernorm", 0.0),
    "exaone4": ("post_attention_layernorm", 0.0),
}


@pytest.mark.parametrize("model_type", NORMS)
def test_a_gate_acts_behind_the_norm_that_reads_the_sublayer_s_output(model_type):
    norm, offset = NORMS[model_type]
    group = next(g for g in with_gates(tiny(model_type)).groups if g.name == "layers.1.attention")
    assert group.after == ("" if norm is None else f"model.layers.1.{norm}")
    assert group.offset == (offset or 0.0)


@pytest.mark.parametrize("depth", ["joint", "alone"])
@pytest.mark.parametrize("model_type", [*NORMS, "olmo2"])
def test_every_gate_of_a_sublayer_changes_what_the_model_computes(model_type, depth):
    """A factor before a norm would not."""
    model = tiny(model_type)
    description = with_gates(model, depth)
    whole = {g.name: torch.ones(g.units) for g in description.groups}
    dense = dense_logits(model, tokens())
    for name in (g.name for g in description.groups if g.is_sublayer):
        with attached(model, description.groups, whole | {name: torch.tensor([0.6])}):
            assert (dense_logits(model, tokens()) - dense).abs().max() > 1e-3, name
    assert torch.equal(dense_logits(model, tokens()), dense), "the model is as it was"


def test_experts_stay_and_what_has_no_whole_sublayer_is_refused():
    mixture = tiny("qwen3_moe", **MIXTURE)
    assert {g.kind for g in with_gates(mixture).groups if g.is_sublayer} == {"attention"}
    with pytest.raises(InputError, match="--depth joint: none of what this run prunes"):
        with_depth(describe(mixture).only(()), mixture, "joint")
    with pytest.raises(InputError, match=r"--depth alone: the expert channels .* say --units attention"):
        with_gates(mixture, "alone")
    alone = with_depth(describe(mixture).only(("attention",)), mixture, "alone")
    assert {g.kind for g in alone.groups} == {"attention"}


# --- one budget ------------------------------------------------------------------------------------------------------


def test_the_price_of_a_sublayer_is_where_closing_it_is_as_good_as_keeping_it():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        value_K, cost_K = (torch.rand(7, generator=generator) for _ in range(2))
        whole = float(value_K.sum()) * float(torch.rand((), generator=generator))
        found = price(value_K, cost_K, whole)
        stays = float(torch.minimum(value_K, found * cost_K).sum())
        assert stays == pytest.approx(whole, rel=1e-4)
    assert price(value_K, cost_K, 2 * float(value_K.sum())) == pytest.approx(float((value_K / cost_K).max()))


def test_the_kept_set_is_the_best_of_all_that_cost_as_little():
    """By what is lost: a sublayer that closes loses its own value, one that stays those of the units that go."""
    model = small_llama(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=4)
    description = with_gates(model)
    limits = make_budget(description.groups, description.shapes, 0.0, "model")
    generator = torch.Generator().manual_seed(1)
    count, sublayers = len(limits.params_N), sublayers_of(description.groups)
    value_N = torch.rand(count, generator=generator) * limits.behind_N
    gates = sublayers.are_N.nonzero().flatten().tolist()
    inside = {gate: ((sublayers.gate_N == gate) & ~sublayers.are_N).nonzero().flatten() for gate in gates}
    for gate, share in zip(gates, (0.3, 1.4, 0.6, 0.2), strict=True):
        value_N[gate] = value_N[inside[gate]].sum() * share

    def lost(kept_N):
        return sum(
            float(value_N[units][~kept_N[units]].sum()) if kept_N[gate] else float(value_N[gate])
            for gate, units in inside.items()
        )

    def units_of(kept):
        return torch.cat([inside[gate] for gate in kept]) if kept else torch.zeros(0, dtype=torch.int64)

    densities_N, ranks_N = value_N / limits.share_N.clamp(min=1e-9), sublayers.ranks(limits.per_cost(value_N))
    best: dict[int, float] = {}
    for stays in product([True, False], repeat=len(gates)):
        stay = [gate for gate, here in zip(gates, stays, strict=True) if here]
        order = units_of(stay)[densities_N[units_of(stay)].argsort(descending=True)]
        for size in range(len(order) + 1):
            tried_N = torch.zeros(count, dtype=torch.bool).index_fill(
                0, torch.tensor([*stay, *order[:size]]).long(), True
            )
            cost = int(limits.params_N[tried_N].sum())
            best[cost] = min(lost(tried_N), best.get(cost, float("inf")))
    for least in ranks_N[sublayers.inside_N].tolist():
        kept_N = sublayers.open((ranks_N >= least - 1e-7) | sublayers.are_N)
        cost = int(limits.params_N[kept_N].sum())
        assert lost(kept_N) == pytest.approx(min(value for spent, value in best.items() if spent <= cost), abs=1e-6)


def test_no_sublayer_is_kept_for_a_part_of_it_that_it_is_not_worth(joint):
    limits = make_budget(joint.groups, joint.shapes, 0.5, "model")
    sublayers = limits.sublayers
    for seed in range(20):
        rank_N = torch.rand(len(limits.params_N), generator=torch.Generator().manual_seed(seed))
        kept_N = largest_that_fits(rank_N, limits)
        above_N = sublayers.inside_N & (rank_N > rank_N[sublayers.gate_N])
        for gate in sublayers.are_N.nonzero().flatten().tolist():
            units_N = above_N & (sublayers.gate_N == gate)
            assert kept_N[units_N].all() or not kept_N[units_N].any() or kept_N[sublayers.gate_N != gate].all()


@pytest.mark.parametrize("unit", [None, "heads", "nested"])
@pytest.mark.parametrize(
    "words", [(), ("params=0.7",), ("kv=0.6", "bytes=0.75"), ("flops=0.6",), ("total-params=0.7",)]
)
def test_kept_sets_fit_their_budget_and_lie_in_each_other(llama, unit, words):
    description = with_gates(llama, unit=unit)
    bounds = bounds_of(description, read_budgets(words), 4)
    limits = make_budget(description.groups, description.shapes, 0.0 if words else 0.4, "model", bounds=bounds)
    generator = torch.Generator().manual_seed(2)
    sublayers = limits.sublayers
    for _ in range(5):
        z_N = torch.rand(len(limits.params_N), generator=generator) - 0.2
        kept_N = largest_that_fits(z_N, limits)
        assert torch.equal(limits.open(kept_N), kept_N), "units of open sublayers, and sublayers with units"
        assert (z_N[kept_N & sublayers.inside_N] > -0.2).all()
        counts = [int(part.sum()) for part in kept_N.split([g.units for g in description.groups])]
        if bounds:
            assert all(b.cost(counts) <= b.allowed for b in bounds)
        else:
            assert int(limits.params_N[kept_N].sum()) <= int(limits.allowed_C)
            left = int(limits.allowed_C) - int(limits.params_N[kept_N].sum())
            if unit is None:
                assert left < min(unit_params(g, description.shapes) for g in description.groups if g.slices)
            tight = make_budget(description.groups, description.shapes, 0.7, "model")
            assert nested(largest_that_fits(z_N, tight, in_order=True), largest_that_fits(z_N, limits, in_order=True))


def test_a_sublayer_that_learned_to_close_opens_last(joint):
    limits = make_budget(joint.groups, joint.shapes, 0.3, "model")
    z_N = torch.linspace(0.5, 1.0, len(limits.params_N))
    gate = limits.sublayers.are_N.nonzero().flatten()[3]
    z_N[gate] = -0.01
    z_N[:4] = -0.1
    kept_N = largest_that_fits(z_N, limits)
    assert not kept_N[limits.sublayers.gate_N == gate].any()
    assert kept_N[limits.sublayers.gate_N != gate].float().mean() > 0.8


def test_the_multipliers_pull_on_products_of_scores(joint):
    """The gradient of the Lagrangian by all gates, those of sublayers included, is that of the exact expression."""
    limits = make_budget(joint.groups, joint.shapes, 0.4, "model")
    recipe = replace(RECIPES["paper"](20), dual_start=(0.7, 1.3, 0.4))
    optimiser = Optimiser(recipe, limits, 20, 0, torch.device("cpu"))
    mu = optimiser.mu
    optimiser.z_N = 0.9 * torch.rand(len(limits.params_N), generator=torch.Generator().manual_seed(3))
    z_N = optimiser.z_N.clone().requires_grad_()
    sublayers = limits.sublayers
    score_N = retention_score(z_N, mu)
    score_N = torch.where(
        sublayers.are_N, 0.0, score_N * torch.where(sublayers.inside_N, score_N[sublayers.gate_N], 1.0)
    )
    mean = (limits.share_N * score_N).sum() - limits.target_C
    undecided = (limits.share_N * score_N * (1 - score_N)).sum()
    (expected_N,) = torch.autograd.grad(lagrangian(mean, undecided, *(d.detach() for d in optimiser.duals)), z_N)
    found_N = optimiser._budget_gradient(torch.ones_like(z_N), mu, 1.0)
    assert torch.allclose(found_N, expected_N, atol=1e-6) and found_N[sublayers.are_N].abs().min() > 1e-4


def test_units_behind_a_closed_gate_count_as_closed(joint):
    limits = make_budget(joint.groups, joint.shapes, 0.4, "model")
    optimiser = Optimiser(RECIPES["auto"](20), limits, 20, 0, torch.device("cpu"))
    closed_N = limits.sublayers.gate_N == limits.sublayers.are_N.nonzero().flatten()[1]
    optimiser.go_on_from(torch.where(closed_N & limits.sublayers.are_N, -0.1, 1.0), torch.ones_like(closed_N))
    assert torch.equal(optimiser.open_N, ~closed_N)
    step = optimiser.advance(torch.zeros_like(optimiser.z_N), 0.0, 0.0, 0.0)
    share = 1.0 - float(limits.share_N[closed_N].sum())
    assert step.kept == pytest.approx(share) and step.score == pytest.approx(share)


def test_what_sublayers_are_worth_is_measured_as_that_of_units(llama):
    ids_NT = random_tokens(6, 12)
    joint, alone = (with_gates(llama, depth).groups for depth in ("joint", "alone"))
    together_N = gate_sensitivity(llama, joint, ids_NT)[-6:]
    assert torch.allclose(together_N, gate_sensitivity(llama, alone, ids_NT), rtol=1e-4)
    units_N = gate_sensitivity(llama, describe(llama).groups, ids_NT)
    assert torch.allclose(gate_sensitivity(llama, joint, ids_NT)[:-6], units_N, rtol=1e-4)
    plain_N = gate_sensitivity(llama, joint, ids_NT)
    ratio_N = balanced(plain_N, joint, 0.5) / plain_N
    of_layer = [ratio_N[:-6].split([g.units for g in joint[:-6]])[2 * i + 1][0] for i in range(3)]
    assert torch.allclose(torch.stack(of_layer), ratio_N[-6:][1::2]), "as much as its channels"


def test_gates_behind_norms_are_heard():
    model = tiny("gemma2").requires_grad_(False)
    found_N = gate_sensitivity(model, with_gates(model).groups, tokens(2, 10))
    assert (found_N[-6:] > 1e-6).all()


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), **UNEVEN)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl", documents=60)


@pytest.fixture(scope="module", params=["joint", "alone"])
def run(request, checkpoint, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    assert secateur(*prune_arguments(checkpoint, texts, out, depth=request.param, sparsity=0.5, steps=12)) == 0
    return request.param, out


def test_a_run_ends_in_a_verified_checkpoint_without_what_was_closed(run):
    depth, out = run
    assert json.loads((out / "verify.json").read_text())["passed"]
    plan = json.loads((out / "plan.json").read_text())
    closed = [name for name, kept in plan["kept"].items() if name.endswith(("attention", "mlp")) and not kept]
    with safe_open(out / "model" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    for name in closed:
        _, layer, kind = name.split(".")
        module = f"layers.{layer}.{'self_attn' if kind == 'attention' else 'mlp'}."
        assert not [n for n in names if module in n and ("proj" in n)]
    assert depth == "joint" or closed
    assert plan["rounding"]["kept"] <= 0.5
    assert {f"layers.{i}.{kind}" for i in range(3) for kind in ("attention", "mlp")} <= gates_of(out).keys()
    with safe_open(out / "gates.safetensors", "pt") as file:
        about = json.loads(file.metadata()["secateur"])
    assert (about["depth"], about["format"]) == (depth, 2 if depth == "joint" else 1)


def test_stages_sizes_and_the_report_take_such_a_run(run):
    depth, out = run
    assert secateur("plan", out) == 0 and secateur("export", out) == 0 and secateur("verify", out) == 0
    assert secateur("plan", out, "--compare") == 0
    assert secateur("export", out, "--sparsity", "0.7") == 0
    assert secateur("verify", out / "sizes" / "0.7") == 0
    assert secateur("export", out, "--sparsity", "0.2") == 0
    kept = [json.loads((folder / "plan.json").read_text())["kept"] for folder in
            (out / "sizes" / "0.7", out, out / "sizes" / "0.2")]  # fmt: skip
    for smaller, larger in pairwise(kept):
        if depth == "joint":
            assert all(set(smaller[name]) <= set(larger[name]) for name in smaller)
    assert secateur("refit", out) == 0 and secateur("report", out) == 0
    assert "MLP sublayers" in (out / "report.html").read_text()


def test_an_interrupted_run_goes_on_to_the_same_gates(checkpoint, texts, tmp_path, run):
    depth, out = run
    again = tmp_path / "again"
    assert secateur(*prune_arguments(checkpoint, texts, again, depth=depth, sparsity=0.5, steps=12)) == 0
    assert same_gates(out, again)


@pytest.mark.parametrize("method", ["sensitivity", "hard-concrete", "hard-concrete-deterministic"])
def test_other_methods_close_sublayers_too(method, checkpoint, texts, tmp_path):
    arguments = prune_arguments(checkpoint, texts, tmp_path / "run", depth="joint", sparsity=0.6, method=method)
    assert secateur(*arguments) == 0


@pytest.mark.parametrize("method", ["magnitude", "wanda-sp", "taylor-vector", "grasprune"])
def test_baselines_rank_whole_sublayers(method, checkpoint, texts, tmp_path):
    arguments = prune_arguments(checkpoint, texts, tmp_path / "run", depth="alone", sparsity=0.5, method=method)
    assert secateur(*arguments) == 0
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["rounding"]["kept"] <= 0.5


def test_a_sweep_has_sublayers_that_stay_closed(checkpoint, texts, tmp_path):
    arguments = prune_arguments(checkpoint, texts, tmp_path / "run", depth="joint", sweep="0.3:0.7:0.2", steps=16)
    at = arguments.index("--sparsity")
    assert secateur(*arguments[:at], *arguments[at + 2 :]) == 0
    kept = [json.loads((tmp_path / "run" / "sizes" / size / "plan.json").read_text())["kept"] for size in
            ("0.7", "0.5", "0.3")]  # fmt: skip
    for smaller, larger in pairwise(kept):
        assert all(set(smaller[name]) <= set(larger[name]) for name in smaller)


@pytest.mark.parametrize("options", [
    {"shape": "aligned:16"}, {"shape": "tp:2"}, {"attention_unit": "nested"}, {"attention_unit": "heads"},
    {"keep": "layers.0"}, {"recover": "full", "recover_steps": 2}, {"only": "mlp"}, {"recipe": "paper"},
    {"per": "kind"},
], ids=lambda options: "-".join(map(str, options.values())))  # fmt: skip
def test_other_options_go_with_it(options, checkpoint, texts, tmp_path):
    for depth in ("joint", "alone"):
        if depth == "alone" and "attention_unit" in options:
            continue
        out = tmp_path / depth
        assert secateur(*prune_arguments(checkpoint, texts, out, depth=depth, sparsity=0.5, **options)) == 0
        assert json.loads((out / "verify.json").read_text())["passed"]


@pytest.mark.parametrize("budget", ["params=0.8", "flops=0.6", "kv=0.6", "bytes=0.8"])
def test_budgets_are_held_exactly(budget, checkpoint, texts, tmp_path):
    for depth in ("joint", "alone"):
        arguments = prune_arguments(checkpoint, texts, tmp_path / depth, depth=depth, budget=budget)
        at = arguments.index("--sparsity")
        assert secateur(*arguments[:at], *arguments[at + 2 :]) == 0
        (held,) = json.loads((tmp_path / depth / "plan.json").read_text())["rounding"]["budgets"]
        assert held["pruned"] <= held["bound"]


@pytest.mark.parametrize("depth", ["joint", "alone"])
def test_budgets_on_time_go_with_it(depth, checkpoint, texts, tmp_path):
    write_table(tmp_path / "table.json", table_of(describe_pretrained(str(checkpoint))[0]))
    arguments = prune_arguments(checkpoint, texts, tmp_path / "run", depth=depth, budget="latency=0.8",
                                latency_table=tmp_path / "table.json")  # fmt: skip
    at = arguments.index("--sparsity")
    assert secateur(*arguments[:at], *arguments[at + 2 :]) == 0
    (held,) = json.loads((tmp_path / "run" / "plan.json").read_text())["rounding"]["budgets"]
    assert held["pruned"] <= held["bound"] == 80_000


def test_another_text_is_guarded_too(checkpoint, texts, tmp_path):
    other = write_texts(tmp_path / "other.jsonl", documents=50, words=50)
    arguments = prune_arguments(checkpoint, texts, tmp_path / "run", depth="joint", guard=f"{other}:0.1")
    assert secateur(*arguments) == 0
    assert "gates of their own" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_gates_go_to_a_sibling_of_the_same_depth_only(run, checkpoint, texts, tmp_path, capsys):
    depth, out = run
    gates = out / "gates.safetensors"
    tuned = prune_arguments(checkpoint, texts, tmp_path / "tuned", depth=depth, sparsity=0.5, gates=gates, steps=2)
    assert secateur(*tuned) == 0
    plain = prune_arguments(checkpoint, texts, tmp_path / "plain", sparsity=0.5, gates=gates, steps=2)
    said = complaint(capsys, *plain)
    assert f"holds gates of --depth {depth}" in said and f"say --depth {depth}" in said


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "line"), [
    ({"depth": "joint", "shape": "uniform"}, "--depth joint closes whole sublayers .* --shape uniform"),
    ({"depth": "alone", "per": "layer"}, "--depth alone closes whole sublayers .* --per layer"),
    ({"depth": "alone", "attention_unit": "heads"}, "--depth alone leaves widths whole, so --attention-unit heads"),
    ({"depth": "joint", "method": "magnitude"}, "--method magnitude has no scores .* or --depth alone"),
    ({"depth": "joint", "method": "grasprune"}, "--method grasprune has no scores"),
    ({"depth": "alone", "method": "flap"}, "--method flap has no scores .* use deterministic or sensitivity$"),
])  # fmt: skip
def test_what_contradicts_it_is_refused(options, line):
    with pytest.raises(InputError, match=line):
        Config("model", sparsity=0.3, **options)


def test_a_plan_that_keeps_units_of_a_closed_sublayer_is_refused(checkpoint, texts, tmp_path):
    out = tmp_path / "run"
    assert secateur(*prune_arguments(checkpoint, texts, out, depth="joint", sparsity=0.3)) == 0
    plan = json.loads((out / "plan.json").read_text())
    name = next(name for name, kept in plan["kept"].items() if name.endswith("mlp") and kept)
    plan["kept"][name], plan["scales"][name] = [], []
    (out / "plan.json").write_text(json.dumps(plan))
    model = small_llama(**UNEVEN)
    with pytest.raises(InputError, match=f"its sublayer {name} is closed"):
        load_plan(out / "plan.json", with_gates(model).groups, plan["architecture"])


def test_ranks_need_no_depth_where_there_is_none(llama):
    _description, limits = described(llama, 0.4)
    assert limits.sublayers is None and limits.behind_N is limits.share_N


def test_config_files_without_it_are_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: somewhere\nsparsity: 0.3\n")
    assert load_config(path).depth == "off"


def test_random_plans_of_the_matrix_close_whole_sublayers(joint):
    plan = random_plan(joint, close=("layers.1.mlp",))
    assert not len(plan.kept["layers.1.channels"]) and len(plan.kept["layers.1.kv_groups"])
