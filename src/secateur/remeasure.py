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
from secateur.gates import by_group
from secateur.ranks import ALONE, Ranks
from secateur.recipes import Recipe, remeasured_at
from secateur.sensitivity import sensitivity_at, weighed
from secateur.units import Group

MOST_GROWTH = 100.0
"""The farthest that a unit's sensitivity is taken to have grown or fallen, relative to the median unit's: a unit that
the dense model hardly minds says little by its ratio."""

OnMeasured = Callable[[int, int], None]
"""Hears of the rows that have been measured, of how many."""


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
    """What the dense model's sensitivities are to be multiplied by, shape (N,): 1 where the budget takes less than a
    quarter.

    `sensitivity_N` was measured on `ids_NT`, whose rows are gone through once more. `largest` makes the kept set of the
    budget from what units are worth for what they cost. What was said last counts as much as what was said first, by
    their geometric mean. Units of which nothing was heard change as the median of all does, KV heads of which none of
    their query heads is left as that of these, gates of whole sublayers, whose removal was measured, as that of their
    units; without units nothing is measured.
    """
    if all(g.is_sublayer for g in groups):
        return torch.ones_like(sensitivity_N)
    _, worth_N = weighed(sensitivity_N, groups, recipe)
    growth_N = torch.ones_like(sensitivity_N)
    rows = min(len(ids_NT), round(len(ids_NT) * recipe.remeasured_batches / max(1, recipe.sensitivity_batches)))
    removed = 1.0 - limits.share_of(largest(limits.per_cost(worth_N)))
    for number, share in enumerate(remeasured_at(removed) if rows else [], start=1):
        first = (number - 1) * rows
        taken_N = torch.arange(first, first + rows, device=ids_NT.device) % len(ids_NT)
        gate_N = _without_the_least(limits.per_cost(worth_N * growth_N), groups, limits, largest, share)
        now_N = sensitivity_at(
            model, groups, ids_NT[taken_N], gate_N, lambda done: on_measured(done, rows), number, ranks
        )
        growth_N = _ratio(now_N, sensitivity_N, groups).sqrt()
    return growth_N


def _ratio(now_N: torch.Tensor, first_N: torch.Tensor, groups: tuple[Group, ...]) -> torch.Tensor:
    ratio_N, heard_N = now_N / first_N, (now_N > 0) & (first_N > 0)
    parts, heard = by_group(ratio_N, groups), by_group(heard_N, groups)
    units = torch.cat([parts[g.name][heard[g.name]] for g in groups if not g.is_sublayer] or [ratio_N[:0]])
    if not len(units):
        return torch.ones_like(now_N)
    middle = units.median()
    bounds = middle / MOST_GROWTH, middle * MOST_GROWTH
    found = {name: torch.where(heard[name], ratio, middle).clamp(*bounds) for name, ratio in parts.items()}
    for g in groups:
        if g.keys:
            of_heads_K = g.by_part(found[g.name]).median(1).values
            found[g.keys] = torch.where(heard[g.keys], found[g.keys], of_heads_K)
        if g.depth:
            found[g.depth] = found[g.name].median().expand(1)
    return torch.cat([found[g.name] for g in groups])


def _without_the_least(
    worth_N: torch.Tensor,
    groups: tuple[Group, ...],
    limits: Budget,
    largest: Callable[[torch.Tensor], torch.Tensor],
    share: float,
) -> torch.Tensor:
    """Gates of which those are 0 that are worth least, up to a share of the units' parameters, of what the budget takes
    away. The best unit of each sublayer stays open: where a norm reads the output (Gemma 2, OLMo 2), nothing has no
    derivative. So do sublayers' own gates, and those of KV heads, which close with their query heads: at a product of
    two zeros neither is heard."""
    goes_N = ~largest(worth_N) & (limits.share_N > 0)
    order_N = torch.where(goes_N, worth_N, torch.inf).argsort(stable=True)
    gone_N = limits.share_N[order_N].double().cumsum(0) <= share
    closed_N = torch.zeros_like(goes_N).index_copy(0, order_N, gone_N) & goes_N
    closed, worth = by_group(closed_N, groups), by_group(worth_N, groups)
    for g in groups:
        if g.keys:
            closed[g.name] |= closed[g.keys].repeat_interleave(g.width)
            closed[g.keys][:] = False
        if not g.is_sublayer:
            closed[g.name][worth[g.name].argmax()] = False
    return 1.0 - closed_N.to(worth_N.dtype)
