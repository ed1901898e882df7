"""One-shot scores, each against a slow computation that knows nothing of hooks, chunks or slices."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from runs import described, random_tokens, small_llama
from secateur.attach import attached, compensation, writer
from secateur.budget import largest_that_fits
from secateur.importance import ONE_SHOT, flap, magnitude, sensitivity, taylor_element, taylor_vector, wanda_sp
from secateur.importance_experts import column_norms, read, watching_experts
from secateur.learn import learn
from secateur.optimise import Optimiser
from secateur.order import ranked
from secateur.recipes import OF_EXPERTS, auto_recipe
from tiny import MIXTURE, tiny

IDS = random_tokens(3, 9)


@pytest.fixture(scope="module", params=[8, 4, 1], ids=["multi-head", "grouped-query", "multi-query"])
def model(request):
    return small_llama(num_key_value_heads=request.param, attention_bias=True)


def scores(score, model, scope="model", sparsity=0.3, **options):
    description, limits = described(model, sparsity, scope)
    return description, limits, score(model, description.groups, IDS, limits, lambda _: None, **options)


def owners(description):
    """Of every unit in order: its group, its number, and of each of its parameters the index of its entries."""
    for group in description.groups:
        for unit in range(group.units):
            parts = {}
            for s in group.slices:
                size = description.shapes[s.param][s.dim] // group.units
                index = [slice(None)] * len(description.shapes[s.param])
                index[s.dim] = slice(unit * size, (unit + 1) * size)
                parts[s.param] = (tuple(index), s.dim)
            yield group, unit, parts


def inputs(model, description):
    """Everything that each writer read, tokens × inputs."""
    found, handles = {}, []
    for group in description.groups:

        def keep(_module, args, name=group.name):
            found.setdefault(name, []).append(args[0].flatten(0, -2))

        handles.append(writer(model, group).register_forward_pre_hook(keep))
    for row in IDS:
        model(row[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}


# --- the formulas ----------------------------------------------------------------------------------------------------


def test_magnitude_is_the_sum_of_squares_of_a_units_weights_a_parameter(model):
    description, limits, found = scores(magnitude, model)
    expected = [
        sum(model.get_parameter(name)[index].square().sum().item() for name, (index, _) in parts.items())
        for _, _, parts in owners(description)
    ]
    torch.testing.assert_close(found.score_N, torch.tensor(expected) / limits.share_N)


def test_wanda_is_weight_times_input_norm_summed_over_the_columns_of_a_unit(model):
    description, limits, found = scores(wanda_sp, model)
    read = inputs(model, description)
    expected = []
    for group, unit, _ in owners(description):
        weight_OI, norm_I = writer(model, group).weight.double(), read[group.name].norm(dim=0)
        block = len(norm_I) // group.units
        columns = range(unit * block, (unit + 1) * block)
        expected.append(sum((weight_OI[i, j].abs() * norm_I[j]).item() for i in range(len(weight_OI)) for j in columns))
    expected_N = torch.tensor(expected) / limits.share_N / (IDS.numel() ** 0.5)
    torch.testing.assert_close(found.score_N, expected_N)


def test_wanda_takes_an_experts_inputs_over_all_tokens_as_it_does_those_of_other_units():
    """So that one budget over both compares like with like."""
    model = tiny("mixtral", **MIXTURE).requires_grad_(False)
    description, limits = described(model, 0.3)
    ids_NT = random_tokens(3, 9)
    found = wanda_sp(model, description.groups, ids_NT, limits, lambda _: None)
    with watching_experts(model, description.groups) as usage:
        read(model, ids_NT)
    parts = (found.score_N * limits.share_N).split([g.units for g in description.groups])
    for group, score_U in zip(description.groups, parts, strict=True):
        if group.experts:
            mean_EC = usage[group.name].squares_EC / (3 * 9)
            expected_EC = mean_EC.sqrt() * column_norms(model, group, 1)
            torch.testing.assert_close(score_U, expected_EC.flatten())
    assert any(not g.experts for g in description.groups) and any(g.experts for g in description.groups)


def test_flap_is_the_fluctuation_of_inputs_standardised_by_layer_and_kind_and_averaged_over_a_unit(model):
    description, _, found = scores(flap, model)
    read = inputs(model, description)
    expected = []
    for group in description.groups:
        score_I = read[group.name].var(dim=0) * writer(model, group).weight.double().norm(dim=0) ** 2
        score_I = (score_I - score_I.mean()) / score_I.std()
        expected += [part.mean().item() for part in score_I.chunk(group.units)]
        torch.testing.assert_close(found.means[group.name].double(), read[group.name].mean(dim=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.score_N, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("score", "by_vector"), [(taylor_element, False), (taylor_vector, True)])
def test_taylor_is_weight_times_the_gradient_of_the_mean_loss_over_all_rows(model, score, by_vector):
    description, limits, found = scores(score, model)
    twin = copy.deepcopy(model).requires_grad_(True)
    logits = twin(IDS).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    expected = []
    for _, _, parts in owners(description):
        total = 0.0
        for name, (index, dim) in parts.items():
            parameter = twin.get_parameter(name)
            product = (parameter * parameter.grad)[index].detach()
            if by_vector and product.ndim == 2:
                product = product.sum(1 - dim)
            total += product.abs().sum().item()
        expected.append(total)
    torch.testing.assert_close(found.score_N, torch.tensor(expected) / limits.share_N, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
@pytest.mark.parametrize("scope", ["model", "kind", "layer"])
def test_sensitivity_keeps_the_units_with_which_the_default_method_starts(model, scope, sparsity, monkeypatch):
    recipe, started, start_from = auto_recipe(3), [], Optimiser.start_from
    description, limits, found = scores(sensitivity, model, scope, sparsity, recipe=recipe)
    monkeypatch.setattr(Optimiser, "start_from", lambda own, *a: (start_from(own, *a), started.append(own.z_N)))
    learn(model, description.groups, IDS, IDS[:1], limits, recipe, steps=3, batch_size=1)
    assert torch.equal(largest_that_fits(found.score_N, limits), started[0] == 1.0)


@pytest.mark.parametrize("method", [m for m in ONE_SHOT if m not in ("sensitivity", *OF_EXPERTS)])
def test_scoring_leaves_no_trace_in_the_model_and_reports_its_rows(method):
    model = small_llama(num_key_value_heads=4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    description, limits = described(model, 0.3)
    rows = []
    ONE_SHOT[method](model, description.groups, IDS, limits, rows.append)
    assert rows == ([] if method == "magnitude" else [1, 2, 3])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and not p.requires_grad
        assert not p._post_accumulate_grad_hooks
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_units_whose_removal_changes_nothing_come_last_by_every_score():
    """A channel with a reader of zeros: only its other weights are left to see it."""
    model = small_llama()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[5] = 0.0
    for method in ("wanda-sp", "flap", "taylor-element", "taylor-vector"):
        description, _, found = scores(ONE_SHOT[method], model)
        for group, part_K in zip(
            description.groups, found.score_N.split([g.units for g in description.groups]), strict=True
        ):
            assert group.kind != "channels" or part_K.argmin() == 5, method


# --- what stands for removed units -----------------------------------------------------------------------------------


def test_with_the_compensation_each_writers_output_is_right_on_average(model):
    """One layer at a time, so that what it reads stays as it was measured."""
    description, _, found = scores(flap, model)
    generator = torch.Generator().manual_seed(3)
    for group in description.groups:
        gates = {group.name: (torch.rand(group.units, generator=generator) > 0.5).float()}
        gates[group.name][0] = 0.0
        biases = compensation(model, [group], gates, found.means)
        outputs = []

        def keep(_module, _args, output, outputs=outputs):
            outputs.append(output.mean((0, 1)))

        for given in (None, biases):
            with attached(model, [group], gates, given):
                handle = writer(model, group).register_forward_hook(keep)
                model(IDS)
                handle.remove()
        handle = writer(model, group).register_forward_hook(keep)
        model(IDS)
        handle.remove()
        without, compensated, dense = outputs
        torch.testing.assert_close(compensated, dense, rtol=1e-4, atol=1e-5)
        assert (without - dense).abs().max() > 1e-3


def test_nothing_is_added_where_nothing_is_removed_or_no_means_are_known():
    model = small_llama()
    description, _, found = scores(flap, model)
    ones = {g.name: torch.ones(g.units) for g in description.groups}
    assert compensation(model, description.groups, ones, found.means) == {}
    zeros = {name: gate * 0 for name, gate in ones.items()}
    assert compensation(model, description.groups, zeros, None) == {}
    assert compensation(model, description.groups, zeros, found.means).keys() == zeros.keys()


# --- scores as gates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["model", "kind", "layer"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_gates_from_scores_open_what_fits_and_rank_as_the_scores_do_at_any_sparsity(scope, sparsity):
    model = small_llama(num_key_value_heads=4)
    _, limits = described(model, sparsity, scope)
    score_N = torch.exp(12 * torch.randn(len(limits.params_N), generator=torch.Generator().manual_seed(0)))
    kept_N = largest_that_fits(score_N, limits)
    z_N = ranked(score_N, kept_N)
    assert torch.equal(z_N > 0, kept_N) and torch.equal(largest_that_fits(z_N, limits), kept_N)
    for other_N in (kept_N, ~kept_N):
        assert torch.equal(z_N[other_N].argsort(), score_N[other_N].argsort())
    assert len(z_N.unique()) == len(z_N)


def test_statistics_of_inputs_need_no_logits():
    model = small_llama()
    model.lm_head = nn.Identity()
    assert torch.isfinite(scores(flap, model)[2].score_N).all()
