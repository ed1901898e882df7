"""Sensitivity measured anew while the budget takes away more and more.

What units are worth alone adds up to what they are worth together as long as little goes; beyond a fifth of the units'
parameters it does not (docs/study.md). So the first fifth goes by the dense model's sensitivity, and each further tenth
by that of the model which is left.

Shape suffixes: N units of the whole model or rows of tokens, T positions.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from secateur.budget import Budget
from secateur.ranks import ALONE, Ranks
from secateur.recipes import Recipe, remeasured_at
from secateur.sensitivity import balanced, sensitivity_at, weighted
from secateur.units import Group

OnMeasured = Callable[[int, int], None]
"""Hears of the rows that have been measured, of how many."""


def weighed(
    sensitivity_N: torch.Tensor, groups: tuple[Group, ...], recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sensitivities by which gates step, and those by which they are worth keeping."""
    sensitivity_N = weighted(sensitivity_N, groups, recipe.attention_weight)
    return sensitivity_N, balanced(sensitivity_N, groups, recipe.layer_balance)


def remeasured(
    model: PreTrainedModel,
    groups: tuple[Group, ...],
    ids_NT: torch.Tensor,
    sensitivity_N: torch.Tensor,
    limits: Budget,
    recipe: Recipe,
    largest: Callable[[torch.Tensor], torch.Tensor],
    on_measured: OnMeasured = lambda _rows, _of: None,
    ranks: Ranks = ALONE,
) -> torch.Tensor:
    """What the dense model's sensitivities are to be multiplied by, shape (N,): 1 where the budget takes no more than a
    fifth.

    `sensitivity_N` was measured on `ids_NT`, whose rows are gone through once more. `largest` makes the kept set of the
    budget from what units are worth for what they cost. What was said last counts as much as what was said first, by
    their geometric mean; units of which nothing was heard change as the others do.
    """
    _, worth_N = weighed(sensitivity_N, groups, recipe)
    growth_N = torch.ones_like(sensitivity_N)
    rows = min(len(ids_NT), round(len(ids_NT) * recipe.remeasured_batches / max(1, recipe.sensitivity_batches)))
    removed = 1.0 - limits.share_of(largest(limits.per_cost(worth_N)))
    for number, share in enumerate(remeasured_at(removed) if rows else [], start=1):
        first = (number - 1) * rows
        taken_N = torch.arange(first, first + rows, device=ids_NT.device) % len(ids_NT)
        gate_N = _without_the_least(limits.per_cost(worth_N * growth_N), limits, largest, share)
        now_N = sensitivity_at(
            model, groups, ids_NT[taken_N], gate_N, lambda done: on_measured(done, rows), number, ranks
        )
        heard_N = (now_N > 0) & (sensitivity_N > 0)
        if not heard_N.any():
            break
        ratio_N = now_N / sensitivity_N
        growth_N = torch.where(heard_N, ratio_N, ratio_N[heard_N].median()).sqrt()
    return growth_N


def _without_the_least(
    worth_N: torch.Tensor, limits: Budget, largest: Callable[[torch.Tensor], torch.Tensor], share: float
) -> torch.Tensor:
    """Gates of which those are 0 that are worth least, up to a share of the units' parameters, of what the budget takes
    away; sublayers' own stay open."""
    goes_N = ~largest(worth_N) & (limits.share_N > 0)
    order_N = torch.where(goes_N, worth_N, torch.inf).argsort(stable=True)
    gone_N = limits.share_N[order_N].double().cumsum(0) <= share
    closed_N = torch.zeros_like(goes_N).index_copy(0, order_N, gone_N) & goes_N
    return 1.0 - closed_N.to(worth_N.dtype)
