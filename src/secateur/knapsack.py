"""The kept set under several budgets at once: by falling rank what fits all of them, until nothing more fits.

What is taken of a group of units makes a chain of items, by rank: what the i-th of them costs follows from how many are
before it (costs.Cost.at), the first one with what opens the sublayer. Groups whose units go together may share a chain.
Prices say how dear a unit is where several budgets bind.

Shape suffixes: N units of the whole model, O items, C constraints, H chains, W waiting items, I items of a chain.
"""

from collections.abc import Mapping, Sequence

import torch

from secateur.costs import Bound

ROUNDS = 200
"""Steps in which prices are found."""


def fitting(
    rank_O: torch.Tensor,
    chain_O: torch.Tensor,
    chains: Sequence[Mapping[int, torch.Tensor]],
    bounds: Sequence[Bound],
    in_order: bool = False,
) -> torch.Tensor:
    """By falling rank what fits all bounds, a mask of shape (O,); of a chain, nothing after what does not.

    chains: group → its units that are stored with no item of the chain, with the first one, and so on. `in_order`: a
    bound that an item does not fit is closed to all after it, so that a smaller bound keeps a subset; no sublayer is
    left out beforehand, either.
    """
    order_O = rank_O.argsort(descending=True, stable=True)
    cost_OC = torch.zeros(len(rank_O), len(bounds), dtype=torch.int64)
    opening_HC = torch.zeros(len(chains), len(bounds), dtype=torch.int64)
    room_C = torch.tensor([b.allowed - b.fixed for b in bounds])
    by_chain = order_O[chain_O[order_O].argsort(stable=True)]
    for h, items in enumerate(by_chain.split(torch.bincount(chain_O, minlength=len(chains)).tolist())):
        for g, stored_I in chains[h].items():
            cost_IC = torch.stack([b.costs[g].at(stored_I) for b in bounds], dim=1)
            cost_OC[items] += cost_IC.diff(dim=0)[: len(items)]
            opening_HC[h] += torch.tensor([b.costs[g].opening for b in bounds])
            room_C -= cost_IC[0]
    waiting = order_O
    if not in_order:
        admitted_H = _admitted(rank_O, chain_O, opening_HC, room_C)
        waiting = order_O[admitted_H[chain_O[order_O]].logical_not().byte().argsort(stable=True)]
    kept_O = torch.zeros(len(rank_O), dtype=torch.bool)
    closed_C = torch.zeros(len(bounds), dtype=torch.bool)
    while len(waiting):
        fits_WC = ~((cost_OC[waiting] > 0) & closed_C) if in_order else cost_OC[waiting] <= room_C
        waiting = waiting[in_turn(fits_WC.all(1), chain_O[waiting])]
        taken = (cost_OC[waiting].cumsum(0) <= room_C).all(1)
        kept_O[waiting[taken]] = True
        room_C -= cost_OC[waiting[taken]].sum(0)
        waiting = waiting[~taken]
        closed_C |= (cost_OC[waiting[:1]] > room_C).any(0)
    return kept_O


def filled(
    rank_N: torch.Tensor,
    params_N: torch.Tensor,
    constraint_N: torch.Tensor,
    allowed_C: torch.Tensor,
    chain_N: torch.Tensor | None,
    in_order: bool,
) -> torch.Tensor:
    """By falling rank what fits, a mask; of a chain (−1: none), `in_order` of all, nothing after what does not."""
    kept_N = torch.zeros(len(rank_N), dtype=torch.bool)
    ranked = rank_N.argsort(descending=True, stable=True)
    for constraint, allowed in enumerate(allowed_C.tolist()):
        waiting = ranked[constraint_N[ranked] == constraint]
        while len(waiting):
            fits = (params_N[waiting] <= allowed) | in_order
            waiting = waiting[fits if chain_N is None else in_turn(fits, chain_N[waiting])]
            taken = params_N[waiting].cumsum(0) <= allowed
            kept_N[waiting[taken]] = True
            allowed -= int(params_N[waiting[taken]].sum())
            waiting = waiting[:0] if in_order else waiting[~taken]
    return kept_N


def _admitted(
    rank_O: torch.Tensor, chain_O: torch.Tensor, opening_HC: torch.Tensor, room_C: torch.Tensor
) -> torch.Tensor:
    """Chains that may begin first, a mask of shape (H,): where there is no room for all of them to open, those of the
    highest mean rank, for a sublayer that opens for its best unit alone would keep out one that is good throughout."""
    short_C = opening_HC.sum(0) > room_C
    admitted_H = torch.ones(len(opening_HC), dtype=torch.bool)
    if not short_C.any():
        return admitted_H
    sum_H = torch.zeros(len(opening_HC)).index_add(0, chain_O, rank_O.float())
    mean_H = sum_H / torch.bincount(chain_O, minlength=len(opening_HC)).clamp(min=1)
    left_C = room_C.clone()
    for h in mean_H.argsort(descending=True, stable=True).tolist():
        after_C = left_C - opening_HC[h]
        admitted_H[h] = bool((after_C >= 0)[short_C].all())
        left_C = after_C if admitted_H[h] else left_C
    return admitted_H


def in_turn(fits_W: torch.Tensor, chain_W: torch.Tensor) -> torch.Tensor:
    """Of what waits in order, what fits and stands in its chain (−1: in none) behind nothing that does not."""
    place_W, number_W = torch.arange(len(fits_W)), chain_W + 1
    first = torch.full((int(number_W.max()) + 1,), len(fits_W))  # of each chain, what does not fit
    first.scatter_reduce_(0, number_W[~fits_W], place_W[~fits_W], "amin")
    return fits_W & ((chain_W < 0) | (place_W < first[number_W]))


def prices(value_N: torch.Tensor, weight_CN: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
    """What a share of each budget is worth, shape (C,): multipliers μ of the relaxed knapsack, in which those units are
    kept whose value exceeds Σ_c μ_c weight_cn, found by multiplicative steps on how far that misses the targets.

    value_N: what each unit is worth, at least 0; weight_CN: its share of each budget, rows sum to 1.
    """
    price_C = torch.full_like(target_C, float(value_N.sum()))
    mean_C = torch.zeros_like(price_C)
    for step in range(ROUNDS):  # without matrix products, which autocast would round
        kept_N = value_N > (price_C[:, None] * weight_CN).sum(0)
        used_C = weight_CN[:, kept_N].sum(1)
        price_C = price_C * torch.exp((used_C - target_C) * (8.0 / (1 + step) ** 0.5))
        mean_C = mean_C + price_C / ROUNDS if step * 2 >= ROUNDS else mean_C
    return mean_C
