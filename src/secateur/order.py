"""What units rank by for sizes other than the one that gates were learned for, so that a smaller size lies in a larger.

Serves `secateur export RUN --sparsity 0.35` and `--sweep`. Learning ends with all closed gates alike, and an open one's
value does not say what it is worth. So the file of gates has an order: what is kept before all else, then by what a
parameter is worth to the loss, as learning begins with it (sensitivity.py). Where that was not measured, as in the
paper's recipe, by when a gate closed for good, the last one first.

Every size takes units in this order up to the first that does not fit. That leaves up to a unit of the budget unspent,
which smaller units further on would fill, as largest_that_fits has it: but then sizes would not lie in each other.

Shape suffixes: N units of the whole model.
"""

import torch

from secateur.budget import Budget, largest_that_fits
from secateur.files import InputError
from secateur.gates import Gates, by_group


def positions(*keys_N: torch.Tensor) -> torch.Tensor:
    """Places above 0 and below 1 by the first of the keys, where these are equal by the next; the highest is last."""
    order_N = torch.arange(len(keys_N[0]))
    for key_N in reversed(keys_N):
        order_N = order_N[key_N.cpu()[order_N].argsort(stable=True)]
    places_N = torch.arange(1, len(order_N) + 1, dtype=torch.float64) / (len(order_N) + 1)
    return torch.empty_like(places_N).index_copy(0, order_N, places_N).float()


def ranked(score_N: torch.Tensor, kept_N: torch.Tensor) -> torch.Tensor:
    """Gates z that rank as the scores do, above 0 where kept and at most 0 elsewhere, shape (N,).

    Ranks, not differences to a threshold: scores span many orders of magnitude, and a plan for another sparsity needs
    the order of the removed units as well.
    """
    rank_N = torch.empty_like(score_N, dtype=torch.float32)
    order_N = score_N.argsort(descending=True, stable=True)
    rank_N[order_N] = torch.arange(len(score_N), 0, -1, device=score_N.device) / len(score_N)
    return torch.where(kept_N, rank_N, rank_N - 1.0)


def largest_within(rank_N: torch.Tensor, limits: Budget, within_N: torch.Tensor) -> torch.Tensor:
    """The kept set by falling rank that lies in another, a mask of shape (N,)."""
    below = min(float(rank_N.min()), 0.0) - 1.0
    return largest_that_fits(torch.where(within_N, rank_N, below), limits, in_order=True) & within_N


def kept_for(gates: Gates, limits: Budget, sparsity: float | None, budget: tuple[str, ...]) -> torch.Tensor:
    """The kept set for what is asked, a mask of shape (N,): where gates were learned for it by z, of a sweep and of
    tuned gates just the open ones; else in order."""
    if gates.asked != (sparsity, budget):
        return kept_in_order(gates, limits)
    if not {"sweep", "from"} & gates.about.keys():
        return largest_that_fits(gates.z_N.cpu(), limits)
    return gates.z_N.cpu() > 0 if gates.about.get("shape") == str(limits.policy) else kept_in_order(gates, limits)


def kept_in_order(gates: Gates, limits: Budget) -> torch.Tensor:
    """The kept set for any budget, a mask of shape (N,), that lies in those for larger ones. Raises InputError where
    gates would have to open again that an earlier version saved, without their order."""
    order_N = gates.z_N if gates.order_N is None else gates.order_N
    kept_N = largest_that_fits(_living(order_N.cpu(), gates), limits, in_order=True)
    closed_N = gates.z_N.cpu() <= 0
    if gates.order_N is None and (kept_N & closed_N).any() and len(gates.z_N[gates.z_N <= 0].unique()) < closed_N.sum():
        raise InputError(
            "these gates say nothing of the order of what they closed (an earlier version saved them), so only smaller "
            "sizes are possible; for larger ones run `secateur learn` again"
        )
    return kept_N


def _living(order_N: torch.Tensor, gates: Gates) -> torch.Tensor:
    """The order with experts below 0 all of whose gates are closed: they go whole at any size (budget.Rows)."""
    if not any(g.experts for g in gates.groups):
        return order_N
    closed, below = by_group(gates.z_N.cpu() <= 0, gates.groups), float(order_N.max()) + 1.0
    gone = (closed[g.name] & (g.by_part(closed[g.name]).all(1) & bool(g.experts)).repeat_interleave(g.width)
            for g in gates.groups)  # fmt: skip
    return order_N - below * torch.cat(list(gone))


def nested(smaller_N: torch.Tensor, larger_N: torch.Tensor) -> bool:
    """Whether a kept set lies in another."""
    return not bool((smaller_N & ~larger_N).any())
