"""One-shot baselines: a score for every unit from the weights, or from one pass over calibration text.

Every function takes the model, its groups, calibration rows and the budget, and gives `Scores`, by which
`largest_that_fits` ranks units; nothing is learned. All see the same rows as the learned methods, and the dense model:
where a paper prunes layer by layer and measures the next one behind the pruned ones, this is not done.

A paper's sum over a unit's weights is divided by the unit's share of the parameters unless the paper ranks otherwise.
Within equal widths (`--per layer`, the rule of magnitude, Wanda-sp and LLM-Pruner) that changes nothing, as all units
compared are of one size; over kinds it makes heads and channels comparable.

Shape suffixes: N units of the whole model or rows of tokens, I inputs of a writer, B batch, T positions, D hidden
size; U units of a group, V weight vectors of a unit, R entries of a vector.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from secateur.attach import writer
from secateur.budget import Budget, largest_that_fits
from secateur.files import InputError
from secateur.importance_experts import EXPERT_SCORES, column_norms, read, watching_experts
from secateur.objective import distillation_loss
from secateur.recipes import Recipe
from secateur.remeasure import OnMeasured, remeasured
from secateur.sensitivity import gate_sensitivity, weighed
from secateur.units import Group, Slice
from secateur.vocabulary import Vocabulary

Groups = tuple[Group, ...]
OnRow = Callable[[int], None]
"""Hears of the rows of calibration text that have been used."""


@dataclass(frozen=True)
class Scores:
    """What ranks the units, and what makes up for those that go."""

    score_N: torch.Tensor
    """The higher, the rather kept: float32, comparable over all units."""
    means: Mapping[str, torch.Tensor] | None = None
    """Group name → mean of every input of its writer, float32: removed units are replaced by it (FLAP)."""


# --- from weights alone ----------------------------------------------------------------------------------------------


def magnitude(model: PreTrainedModel, groups: Groups, _ids_NT: torch.Tensor, limits: Budget, _on_row: OnRow) -> Scores:
    """Σ w² over all weights of a unit: its l2 norm, squared so that it adds up, as in the l2 baseline of LLM-Pruner
    (Ma et al. 2023, arXiv 2305.11627, section 4)."""
    parts = []
    for group in groups:
        weights = ((model.get_parameter(s.param).detach(), s) for s in group.slices)
        squares = [vectors(w.float().square(), s, group).sum((1, 2)) for w, s in weights]
        parts.append(torch.stack(squares).sum(0))
    return Scores(limits.per_cost(torch.cat(parts)))


def vectors(weight: torch.Tensor, s: Slice, group: Group) -> torch.Tensor:
    """A tensor of the shape of `s.param`, as the rows or columns that belong to each unit: shape (U, V, R)."""
    each, dim = (weight, s.dim) if group.experts else (weight[None], s.dim + 1)
    units = group.units // len(each)
    block = each.shape[dim] // (s.copies * units)
    rows = each.movedim(dim, 1).reshape(len(each), s.copies, units, block, -1)
    return rows.transpose(1, 2).flatten(0, 1).flatten(1, 2)


# --- from the inputs of the writers ----------------------------------------------------------------------------------


@dataclass
class _Moments:
    """Mean and sum of squared deviations of every input of a writer, merged row by row (Chan et al. 1983)."""

    mean_I: torch.Tensor
    squares_I: torch.Tensor
    count: int = 0

    def add(self, x: torch.Tensor) -> None:
        x_TI = x.float().flatten(0, -2)
        count, mean_I = self.count + len(x_TI), x_TI.mean(0)
        apart_I = mean_I - self.mean_I
        self.squares_I += (x_TI - mean_I).square().sum(0) + apart_I.square() * (self.count * len(x_TI) / count)
        self.mean_I += apart_I * (len(x_TI) / count)
        self.count = count


@contextmanager
def _watching_inputs(model: PreTrainedModel, groups: Groups) -> Iterator[dict[str, _Moments]]:
    """Moments, by group, of the inputs of the writers that are linear maps, over all tokens that the model reads within
    the context; memory O(inputs)."""
    found = {}
    with ExitStack() as stack:
        for group in (g for g in groups if not g.experts):
            module = writer(model, group)
            zeros_I = torch.zeros(module.in_features, device=module.weight.device)
            moments = found[group.name] = _Moments(zeros_I, zeros_I.clone())

            def listen(_module, args, moments=moments):  # type: ignore[no-untyped-def]
                moments.add(args[0])

            stack.callback(module.register_forward_pre_hook(listen).remove)
        yield found


def wanda_sp(model: PreTrainedModel, groups: Groups, ids_NT: torch.Tensor, limits: Budget, on_row: OnRow) -> Scores:
    """Σ_ij |W_ij| ‖X_j‖₂ over the outputs i and a unit's inputs j of its writer (Wanda, Sun et al. 2024, arXiv
    2306.11695, equation 1, summed over structures as FLAP's authors do for their baseline Wanda-sp). An expert's inputs
    are weighted by its routing, as the sum over experts weighs them."""
    parts = []
    with _watching_inputs(model, groups) as moments, watching_experts(model, groups) as usage:
        read(model, ids_NT, on_row)
    for group in groups:
        if group.experts:
            size_EC = (usage[group.name].squares_EC / ids_NT.numel()).sqrt()  # over all tokens, as for other units
            parts.append((size_EC * column_norms(model, group, 1)).flatten())
            continue
        m = moments[group.name]
        size_I = (m.squares_I / m.count + m.mean_I.square()).sqrt()
        score_I = writer(model, group).weight.detach().float().abs().sum(0) * size_I
        parts.append(score_I.unflatten(0, (group.units, -1)).sum(1))
    return Scores(limits.per_cost(torch.cat(parts)))


def flap(model: PreTrainedModel, groups: Groups, ids_NT: torch.Tensor, _limits: Budget, on_row: OnRow) -> Scores:
    """FLAP (An et al. 2024, arXiv 2312.11983): what fluctuates least is best replaced by its mean.

    S_j = var(X_j) ‖W_:j‖₂² for every input j of a writer, standardised within the layer and kind, S → (S − mean) / std,
    averaged over a head's inputs, then ranked over the whole model as it is: a head counts in the budget for all its
    parameters, but is not asked for more score. The released code squares attention's S first; the paper does not.
    """
    parts, means = [], {}
    if any(g.experts for g in groups):
        raise InputError("--method flap adds biases, which fused experts have no place for; use another method")
    with _watching_inputs(model, groups) as moments:
        read(model, ids_NT, on_row)
    for group in groups:
        m = moments[group.name]
        variance_I = m.squares_I / max(1, m.count - 1)
        score_I = variance_I * writer(model, group).weight.detach().float().square().sum(0)
        score_I = (score_I - score_I.mean()) / score_I.std().clamp(min=1e-30)
        parts.append(score_I.unflatten(0, (group.units, -1)).mean(1))
        means[group.name] = m.mean_I
    return Scores(torch.cat(parts), means)


# --- from gradients --------------------------------------------------------------------------------------------------


def taylor_element(
    model: PreTrainedModel, groups: Groups, ids_NT: torch.Tensor, limits: Budget, on_row: OnRow
) -> Scores:
    """Σ |w ∂L/∂w| over all weights of a unit (LLM-Pruner, arXiv 2305.11627, section 3.2, "element", to first order).

    The gradient is that of the mean loss over all rows, as LLM-Pruner takes it of one batch: a float32 copy of all
    units' weights beside the model. LLM-Pruner removes the same share of each layer that it prunes, and by default
    leaves the first and last layers whole; here all layers are pruned, so that the budget is that of other methods.
    """
    parts = _taylor(model, groups, ids_NT, on_row, by_vector=False)
    return Scores(limits.per_cost(torch.cat(parts)))


def taylor_vector(
    model: PreTrainedModel, groups: Groups, ids_NT: torch.Tensor, limits: Budget, on_row: OnRow
) -> Scores:
    """Σ_v |Σ w ∂L/∂w| over the weight vectors v of a unit: rows of what reads, columns of what writes (LLM-Pruner,
    arXiv 2305.11627, section 3.2, "vector", with the vectors of its released code). Memory: a number a vector, and one
    parameter's gradient at a time."""
    parts = _taylor(model, groups, ids_NT, on_row, by_vector=True)
    return Scores(limits.per_cost(torch.cat(parts)))


def _taylor(
    model: PreTrainedModel, groups: Groups, ids_NT: torch.Tensor, on_row: OnRow, by_vector: bool
) -> list[torch.Tensor]:
    """Σ |Σ_rows w ∂L/∂w| by group, each of shape (U,), with the inner sum over a vector's entries, too, or not."""
    totals: dict[str, torch.Tensor] = {}
    vocabulary = Vocabulary(model)
    with ExitStack() as stack:
        for group in groups:
            for s in group.slices:
                parameter = model.get_parameter(s.param)

                def add(p, s=s, group=group):  # type: ignore[no-untyped-def]
                    product_UVR = vectors(p.detach().float() * p.grad.float(), s, group)
                    product = product_UVR.sum(2, keepdim=True) if by_vector else product_UVR
                    totals[s.param] = totals[s.param].add_(product) if s.param in totals else product.contiguous()
                    p.grad = None

                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_()
                stack.callback(parameter.register_post_accumulate_grad_hook(add).remove)
        for row, ids_BT in enumerate(ids_NT.split(1), start=1):
            hidden_BTD = vocabulary.hidden(ids_BT)
            loss, _ce, _kl = distillation_loss(hidden_BTD, hidden_BTD, ids_BT, 0.0, 1.0, vocabulary.head)
            loss.backward()
            on_row(row)
    return [torch.stack([totals[s.param].abs().sum((1, 2)) for s in g.slices]).sum(0) / len(ids_NT) for g in groups]


def sensitivity(
    model: PreTrainedModel,
    groups: Groups,
    ids_NT: torch.Tensor,
    limits: Budget,
    on_row: OnRow,
    *,
    recipe: Recipe,
    rows: int | None = None,
    on_measured: OnMeasured = lambda _rows, _of: None,
) -> Scores:
    """What the default recipe starts from, without the learning: Fisher information of the gates, heads counted more,
    channels evened out between layers (`sensitivity.py`), on as many rows as the recipe measures; measured anew where
    a quarter or more goes (`remeasure.py`), of which `on_measured` hears. `rows`: the most at once."""
    sensitivity_N = gate_sensitivity(model, groups, ids_NT, on_row, rows=rows)
    largest = partial(largest_that_fits, limits=limits)
    growth_N = remeasured(model, groups, ids_NT, sensitivity_N, limits, recipe, largest, on_measured)
    return Scores(limits.per_cost(weighed(sensitivity_N, groups, recipe)[1] * growth_N))


def of_experts(
    model: PreTrainedModel, groups: Groups, ids_NT: torch.Tensor, limits: Budget, on_row: OnRow, *, method: str
) -> Scores:
    """Scores of experts or of their channels (importance_experts.py). Raises InputError where there are other units."""
    others = {g.kind for g in groups if not g.experts}
    if others:
        raise InputError(
            f"--method {method} scores experts, and this run prunes {', '.join(sorted(others))}; use --units "
            "expert_channels, on a mixture of experts"
        )
    with watching_experts(model, groups, outputs=method == "reap") as usage:
        read(model, ids_NT, on_row)
    score = EXPERT_SCORES[method]
    return Scores(limits.per_cost(torch.cat([score(usage[g.name], model, g).flatten() for g in groups])))


ONE_SHOT: dict[str, Callable[..., Scores]] = {
    "sensitivity": sensitivity,
    "magnitude": magnitude,
    "wanda-sp": wanda_sp,
    "flap": flap,
    "taylor-element": taylor_element,
    "taylor-vector": taylor_vector,
    **{method: partial(of_experts, method=method) for method in EXPERT_SCORES},
}
"""`--method` → its scores."""

DIFFERENTIATED = ("sensitivity", "taylor-element", "taylor-vector")
"""Those that go backwards through the model, too."""
