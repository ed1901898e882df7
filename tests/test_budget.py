"""Budgets are weighted by parameters and met exactly; figures are those of the real model."""

from dataclasses import replace

import pytest
import torch

from runs import small_llama
from secateur.budget import Budget, figures, largest_that_fits, make_budget
from secateur.describe import describe
from secateur.export import export
from secateur.files import InputError
from secateur.slicing import sliced
from secateur.units import unit_params
from tiny import load, random_plan, tiny

SCOPES = ("model", "kind", "layer")


@pytest.fixture(scope="module")
def description():
    return describe(small_llama(num_key_value_heads=4))


def per_unit(description):
    """Of every unit: its group, its parameters."""
    pairs = [(g, unit_params(g, description.shapes)) for g in description.groups for _ in range(g.units)]
    groups, params = zip(*pairs, strict=True)
    return groups, torch.tensor(params)


# --- constraints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_kept_share_is_the_mean_score_weighted_by_parameters(description, scope):
    limits = make_budget(description.groups, description.shapes, 0.3, scope)
    groups, params_N = per_unit(description)
    score_N = torch.rand(len(groups), generator=torch.Generator().manual_seed(0))
    keys = [{"model": "all units", "kind": g.kind, "layer": g.name}[scope] for g in groups]
    assert limits.names == tuple(dict.fromkeys(keys))
    for name, share in zip(limits.names, limits.kept_share(score_N), strict=True):
        inside = torch.tensor([key == name for key in keys])
        expected = (params_N * score_N)[inside].sum() / params_N[inside].sum()
        assert share.item() == pytest.approx(expected.item(), rel=1e-5)
    assert limits.share_of(score_N) == pytest.approx(((params_N * score_N).sum() / params_N.sum()).item(), rel=1e-5)


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.3, 0.5, 0.7, 1 / 3])
def test_the_budget_of_the_model_is_the_share_of_unit_parameters_rounded_down(description, sparsity):
    limits = make_budget(description.groups, description.shapes, sparsity, "model")
    total = description.unit_parameters
    (allowed,) = limits.allowed_C.tolist()
    assert (1 - sparsity) * total - 1 < allowed <= (1 - sparsity) * total + 1e-6
    assert limits.target_C.item() == pytest.approx(1 - sparsity, abs=1 / total)


def test_one_budget_a_kind_asks_the_same_share_of_every_kind(description):
    limits = make_budget(description.groups, description.shapes, 0.25, "kind")
    assert limits.names == ("kv_groups", "channels")
    assert limits.target_C.tolist() == pytest.approx([0.75, 0.75], abs=1e-3)


@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.37, 0.5, 0.8])
def test_equal_widths_are_the_widest_within_the_budget(description, sparsity):
    limits = make_budget(description.groups, description.shapes, sparsity, "layer")
    kept_N = largest_that_fits(torch.randn(len(limits.params_N)), limits)
    widths = {}
    for group, mask in zip(description.groups, kept_N.split([g.units for g in description.groups]), strict=True):
        widths.setdefault(group.kind, set()).add(int(mask.sum()))
    assert all(len(found) == 1 for found in widths.values()), widths
    room = (1 - sparsity) * description.unit_parameters - int(limits.params_N[kept_N].sum())
    channel_everywhere = sum(unit_params(g, description.shapes) for g in description.groups if g.kind == "channels")
    assert -1e-6 < room < channel_everywhere


def test_equal_widths_that_would_close_every_layer_are_refused(description):
    with pytest.raises(InputError, match="no equal widths remove 99%"):
        make_budget(description.groups, description.shapes, 0.99, "layer")


def test_equal_widths_of_layers_that_differ_are_refused(description):
    *rest, last = description.groups
    wider = replace(last, units=last.units // 2)
    with pytest.raises(InputError, match=f"differ in their number of {last.kind}"):
        make_budget((*rest, wider), description.shapes, 0.2, "layer")


# --- the kept set ----------------------------------------------------------------------------------------------------


def greedy(rank_N, limits):
    """Unit after unit by falling rank, each kept when it still fits its constraint: Python's integers."""
    left, kept = limits.allowed_C.tolist(), [False] * len(rank_N)
    params, constraint = limits.params_N.tolist(), limits.constraint_N.tolist()
    for unit in sorted(range(len(rank_N)), key=lambda unit: -float(rank_N[unit])):
        if params[unit] <= left[constraint[unit]]:
            left[constraint[unit]] -= params[unit]
            kept[unit] = True
    return torch.tensor(kept), left


@pytest.mark.parametrize("largest", [5, 1_000, 3_000_000_000])
def test_the_kept_set_is_never_over_budget_and_no_removed_unit_would_still_fit(largest):
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        units, constraints = 40, 1 + seed % 3
        sizes = torch.randint(1, largest, (4,), generator=generator)
        params_N = sizes[torch.randint(4, (units,), generator=generator)]
        constraint_N = torch.arange(units) % constraints
        total_C = torch.zeros(constraints, dtype=torch.int64).index_add(0, constraint_N, params_N)
        allowed_C = (total_C.double() * torch.rand(constraints, generator=generator)).long()
        limits = Budget(tuple(map(str, range(constraints))), constraint_N, params_N, allowed_C)
        rank_N = torch.randn(units, generator=generator)
        kept_N = largest_that_fits(rank_N, limits)
        expected_N, left = greedy(rank_N, limits)
        assert torch.equal(kept_N, expected_N)
        for c in range(constraints):
            inside_N = constraint_N == c
            used = int(params_N[kept_N & inside_N].sum())
            removed = params_N[~kept_N & inside_N].tolist()
            assert used <= int(allowed_C[c]) and left[c] == int(allowed_C[c]) - used
            assert not removed or left[c] < min(removed)


@pytest.mark.parametrize("scope", SCOPES)
def test_of_units_of_one_size_the_highest_ranks_are_kept(description, scope):
    limits = make_budget(description.groups, description.shapes, 0.4, scope)
    rank_N = torch.randn(len(limits.params_N), generator=torch.Generator().manual_seed(3))
    kept_N = largest_that_fits(rank_N, limits)
    for constraint in range(len(limits.names)):
        for size in set(limits.params_N.tolist()):
            same_N = (limits.constraint_N == constraint) & (limits.params_N == size)
            if (same_N & kept_N).any() and (same_N & ~kept_N).any():
                assert rank_N[same_N & kept_N].min() > rank_N[same_N & ~kept_N].max()


def test_parameters_beyond_what_floats_can_count_are_counted_exactly():
    params_N = torch.tensor([2**53, 1, 1], dtype=torch.int64)
    limits = Budget(("all",), torch.zeros(3, dtype=torch.int64), params_N, torch.tensor([2**53 + 1]))
    assert largest_that_fits(torch.tensor([3.0, 2.0, 1.0]), limits).tolist() == [True, True, False]


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 4, 1])
def test_figures_of_the_dense_model_equal_a_count_by_hand(tied, kv_heads):
    model = small_llama(tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    vocabulary, hidden, width, layers, heads, size = 64, 32, 64, 3, 8, 4
    queries, keys = heads * size * hidden, kv_heads * size * hidden
    attention, mlp, norms = 2 * queries + 2 * keys, 3 * hidden * width, 2 * hidden
    head = vocabulary * hidden
    found = figures(describe(model), None, bytes_per_value=2)
    assert found.parameters == layers * (attention + mlp + norms) + hidden + head * (1 if tied else 2)
    multi_query = 2 * keys if kv_heads == 1 else 0  # one key head serves all: it belongs to no unit
    assert found.block_parameters == layers * (attention + mlp - multi_query)
    assert found.flops_per_token == 2 * (layers * (attention + mlp) + head)
    assert found.kv_bytes_per_token == layers * 2 * kv_heads * size * 2


@pytest.mark.parametrize("close", [(), ("layers.1.channels",)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 3])
def test_figures_of_the_pruned_model_are_those_of_the_exported_one(tmp_path, tied, kv_heads, close):
    model = tiny("llama", tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    description = describe(model)
    plan = random_plan(description, close=close)
    found = figures(description, plan.sizes(description.groups), bytes_per_value=4)
    shapes = {name: t.shape for name, t in sliced(model.named_parameters(), description, plan)}
    assert found.parameters == sum(shape.numel() for shape in shapes.values())
    export(model, None, description, plan, tmp_path / "model")
    exported = load(tmp_path / "model")
    assert found.parameters == sum(p.numel() for p in exported.parameters())
    linears = [m for m in exported.modules() if isinstance(m, torch.nn.Linear)]
    assert found.flops_per_token == 2 * sum(m.weight.numel() for m in linears)
    cache = exported(torch.arange(5)[None], use_cache=True).past_key_values
    values = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert found.kv_bytes_per_token == 4 * values // 5
    assert found.block_parameters == sum(
        len(plan.kept[g.name]) * unit_params(g, description.shapes) for g in description.groups
    )
