"""Sensitivity measured again while more and more goes: at which gates, and what becomes of the start."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from runs import complaint, described, prune_arguments, random_tokens, small_llama
from secateur import remeasure
from secateur.attach import attached
from secateur.budget import everything, largest_that_fits, make_budget
from secateur.config import Config
from secateur.describe import describe
from secateur.gates import by_group
from secateur.learn import learn
from secateur.recipes import auto_recipe, paper_recipe, remeasured_at
from secateur.remeasure import MOST_GROWTH, remeasured
from secateur.sensitivity import drawn, gate_sensitivity, sensitivity_at, weighed
from test_depth import with_gates
from test_mixtures import only_experts, small_mixture
from tiny import tiny

IDS = random_tokens(6, 9)


def brute_force(model, groups, gate_N, seed):
    """Squared gradients at these gates of the log-likelihood of labels that the gated model draws, by sequence."""
    generator, total_N = torch.Generator().manual_seed(seed), torch.zeros_like(gate_N)
    for row in IDS.split(1):
        at_N = gate_N.clone().requires_grad_()
        with attached(model, groups, by_group(at_N, groups)):
            logits_TV = model(row).logits[0, :-1]
        luck_T1 = torch.rand((len(logits_TV), 1), generator=generator)
        labels_T = drawn(logits_TV.detach().softmax(-1), luck_T1)[:, 0]
        (grad_N,) = torch.autograd.grad(F.cross_entropy(logits_TV, labels_T, reduction="sum"), at_N)
        total_N += grad_N.square() / len(logits_TV)
    return total_N / len(IDS)


def measured(model, groups, limits, recipe=None, **options):
    """The dense model's sensitivity, what it is multiplied by, and the gates it was measured at again."""
    recipe = recipe or auto_recipe(len(IDS))
    sensitivity_N, at = gate_sensitivity(model, groups, IDS), []

    def listening(*arguments):
        at.append((arguments[3], found_N := sensitivity_at(*arguments)))
        return found_N

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remeasure, "sensitivity_at", listening)
        largest = partial(largest_that_fits, limits=limits)
        growth_N = remeasured(model, groups, IDS, sensitivity_N, limits, recipe, largest, **options)
    return sensitivity_N, growth_N, at


@pytest.mark.parametrize("experts", [False, True])
def test_sensitivity_at_other_gates_is_that_of_the_gated_model_removed_units_too(experts):
    model = small_mixture() if experts else small_llama(num_key_value_heads=4)
    groups = only_experts(model) if experts else describe(model).groups
    count = sum(g.units for g in groups)
    gate_N = torch.rand(count, generator=torch.Generator().manual_seed(2)).add(0.5)
    gate_N[::3] = 0.0
    seen = []
    found_N = sensitivity_at(model, groups, IDS, gate_N, seen.append, seed=4)
    torch.testing.assert_close(found_N, brute_force(model, groups, gate_N, seed=4), rtol=1e-4, atol=1e-9)
    assert (found_N[::3] > 0).all() and seen == [1, 2, 3, 4, 5, 6]


def test_at_gates_of_one_it_is_the_dense_models():
    model = small_llama()
    groups, ones_N = describe(model).groups, torch.ones(sum(g.units for g in describe(model).groups))
    at_ones_N = sensitivity_at(model, groups, IDS, ones_N, seed=7)
    torch.testing.assert_close(at_ones_N, gate_sensitivity(model, groups, IDS, seed=7), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(
    ("removed", "times"), [(0.0, 0), (0.1, 0), (0.2, 0), (0.24, 0), (0.25, 1), (0.34, 1), (0.35, 2), (0.5, 3), (0.6, 4)]
)
def test_the_first_fifth_and_each_further_tenth_is_measured(removed, times):
    assert remeasured_at(removed) == pytest.approx([0.2, 0.3, 0.4, 0.5][:times])


def bounded(ratio_N):
    middle = ratio_N.median()
    return ratio_N.clamp(middle / MOST_GROWTH, middle * MOST_GROWTH)


@pytest.mark.parametrize("scope", ["model", "kind", "layer"])
def test_what_is_worth_least_goes_up_to_each_share_and_nothing_that_may_stay(scope):
    model = small_llama(num_key_value_heads=4)
    description, limits = described(model, 0.5, scope)
    groups, recipe = description.groups, auto_recipe(len(IDS))
    sensitivity_N, growth_N, at = measured(model, groups, limits)
    assert len(at) == 3
    largest_unit = limits.share_N.max().item()
    ratio_N = torch.ones_like(sensitivity_N)
    for share, (gate_N, found_N) in zip((0.2, 0.3, 0.4), at, strict=True):
        worth_N = limits.per_cost(weighed(sensitivity_N, groups, recipe)[1] * ratio_N.sqrt())
        closed_N = gate_N == 0
        assert share - largest_unit < limits.share_of(closed_N) <= share + 1e-6
        assert not (closed_N & largest_that_fits(worth_N, limits)).any()
        goes_N = ~largest_that_fits(worth_N, limits)
        assert worth_N[closed_N].max() <= worth_N[goes_N & ~closed_N].min()
        assert set(gate_N.tolist()) == {0.0, 1.0}
        ratio_N = bounded(found_N / sensitivity_N)
    torch.testing.assert_close(growth_N, ratio_N.sqrt())


def test_a_budget_of_a_fifth_is_measured_once():
    model = small_llama()
    description, limits = described(model, 0.2)
    for budget in (limits, everything(description.groups)):
        _, growth_N, at = measured(model, description.groups, budget)
        assert (growth_N == 1).all() and not at


def test_never_where_the_recipe_says_so():
    model = small_llama()
    description, limits = described(model, 0.5)
    _, growth_N, at = measured(model, description.groups, limits, recipe=paper_recipe(len(IDS)))
    assert (growth_N == 1).all() and not at


def test_units_of_which_nothing_was_heard_change_as_the_others_do(monkeypatch):
    model = small_llama()
    description, limits = described(model, 0.3)
    first_N = gate_sensitivity(model, description.groups, IDS)
    first_N[5] = 0.0
    now_N = first_N * torch.linspace(1, 3, len(first_N))
    now_N[:4] = 0.0
    monkeypatch.setattr(remeasure, "sensitivity_at", lambda *_: now_N)
    largest = partial(largest_that_fits, limits=limits)
    growth_N = remeasured(model, description.groups, IDS, first_N, limits, auto_recipe(6), largest)
    heard_N = (now_N > 0) & (first_N > 0)
    middle = (now_N / first_N)[heard_N].median().sqrt()
    assert (growth_N[~heard_N] == middle).all() and (~heard_N).sum() == 5
    torch.testing.assert_close(growth_N[heard_N], (now_N / first_N)[heard_N].sqrt())


def test_gates_of_whole_sublayers_stay_open_and_change_as_their_units_do():
    model = small_llama(num_key_value_heads=4)
    description = with_gates(model, "joint")
    groups = description.groups
    limits = make_budget(groups, description.shapes, 0.5, "model")
    _, growth_N, at = measured(model, groups, limits)
    found = by_group(growth_N, groups)
    for g in groups:
        if g.depth:
            torch.testing.assert_close(found[g.depth][0] ** 2, (found[g.name] ** 2).median())
    assert all((by_group(gate_N, groups)[g.name] == 1).all() for gate_N, _ in at for g in groups if g.is_sublayer)


def budget_of(description, sparsity):
    return make_budget(description.groups, description.shapes, sparsity, "model")


def test_nothing_is_measured_again_where_only_whole_sublayers_go():
    model = small_llama(num_key_value_heads=4)
    description = with_gates(model, "alone")
    _, growth_N, at = measured(model, description.groups, budget_of(description, 0.5))
    assert (growth_N == 1).all() and not at


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo2", "llama"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sublayer_keeps_its_best_unit_as_a_norm_of_nothing_has_no_derivative(kind, seed):
    model = tiny(kind, seed, num_attention_heads=4, num_key_value_heads=4).requires_grad_(False)
    description = describe(model)
    groups = description.groups
    limits = budget_of(description, 0.8)
    sensitivity_N, growth_N, at = measured(model, groups, limits)
    best = by_group(limits.per_cost(weighed(sensitivity_N, groups, auto_recipe(len(IDS)))[1]), groups)
    first = by_group(at[0][0], groups)
    for g in groups:
        assert first[g.name][best[g.name].argmax()] == 1
        assert all(by_group(gate_N, groups)[g.name].any() for gate_N, _ in at)
    last_N = at[-1][1] / sensitivity_N
    assert len(at) == 6
    torch.testing.assert_close(growth_N, bounded(last_N).sqrt())


def test_nested_heads_are_heard_whatever_is_closed():
    model = tiny("llama", num_attention_heads=12, num_key_value_heads=3).requires_grad_(False)
    description = describe(model, "nested")
    groups = description.groups
    _, growth_N, at = measured(model, groups, budget_of(description, 0.7))
    silent, growth = 0, by_group(growth_N**2, groups)
    for gate_N, found_N in at:
        gates, found = by_group(gate_N, groups), by_group(found_N, groups)
        for heads in (g for g in groups if g.keys):
            assert (gates[heads.keys] == 1).all() and (found[heads.name] > 0).all()
            closed_K = ~heads.by_part(gates[heads.name]).bool().any(1)
            assert torch.equal(found[heads.keys] == 0, closed_K)
            if found_N is at[-1][1]:
                silent += int(closed_K.sum())
                of_heads_K = heads.by_part(growth[heads.name]).median(1).values
                torch.testing.assert_close(growth[heads.keys][closed_K], of_heads_K[closed_K])
    assert silent, "some KV head has lost all of its query heads"


def test_gates_start_from_what_was_measured_last():
    model = small_llama(num_key_value_heads=4)
    description, limits = described(model, 0.5)
    heard = []

    def kept(recipe):
        return learn(
            model, description.groups, IDS, IDS[:1], limits, recipe, steps=6, batch_size=1,
            on_measured=lambda rows, of: heard.append((rows, of)),
        )  # fmt: skip

    again, once = kept(auto_recipe(6)), kept(Config("", steps=6, sparsity=0.5, remeasure=False).resolved().learning)
    assert heard == [(rows, 6) for rows in (*range(2, 7, 2), *3 * [*range(1, 7)], *range(2, 7, 2))]
    assert torch.equal(again.sensitivity_N, once.sensitivity_N), "other sizes go by the dense model's"
    assert not torch.equal(again.kept_N, once.kept_N)


def test_measured_again_on_fewer_rows_each_time_others():
    config = Config("", steps=1000, sparsity=0.5, batch_size=2).resolved()
    assert config.learning.remeasured_batches == 24 and config.remeasured_rows(0.5) == 3 * 48
    assert config.remeasured_rows(0.2) == 0
    assert Config("", steps=1000, sparsity=0.5, remeasure=False).resolved().remeasured_rows(0.5) == 0
    model, rows = small_llama(), []
    description, limits = described(model, 0.5)
    recipe = Config("", steps=6, sparsity=0.5).resolved().learning
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remeasure, "sensitivity_at", lambda *a: rows.append(a[2]) or torch.ones_like(a[3]))
        largest = partial(largest_that_fits, limits=limits)
        first_N = gate_sensitivity(model, description.groups, IDS)
        fewer = replace(recipe, remeasured_batches=2)
        remeasured(model, description.groups, IDS, first_N, limits, fewer, largest)
    assert [part.tolist() for part in rows] == [IDS[i : i + 2].tolist() for i in (0, 2, 4)]


@pytest.mark.parametrize(
    ("more", "said"), [(("--recipe", "paper"), "--recipe paper"), (("--method", "flap"), "--method flap")]
)
def test_what_measures_no_sensitivity_has_nothing_to_leave_out(more, said, tmp_path, capsys):
    line = complaint(
        capsys, *prune_arguments(tmp_path / "m", tmp_path / "d", tmp_path / "run"), "--no-remeasure", *more
    )
    assert said in line and "--no-remeasure" in line and not (tmp_path / "run").exists()
