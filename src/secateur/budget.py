"""What may be kept: constraints over the units, each unit weighted by its parameters, and exact figures of a model.

Method §3: the sparsity term s̄ − ρ; here s̄ is a mean of retention scores weighted by parameters, so that a head counts
for as much as it holds. `model` is one budget over all units, `kind` the paper's one a kind, `layer` equal widths.

Shape suffixes: N units of the whole model, C constraints.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor, prod

import torch

from secateur.describe import Description
from secateur.files import InputError
from secateur.units import Group, Shapes, sliced_shapes, unit_params


@dataclass
class Budget:
    """Constraints Σ params_k s_k ≤ allowed, one a scope, counted in whole parameters."""

    names: tuple[str, ...]
    """The constraints."""
    constraint_N: torch.Tensor
    """Constraint of each unit, int64."""
    params_N: torch.Tensor
    """Parameters of each unit, int64."""
    allowed_C: torch.Tensor
    """Parameters that each constraint may keep, int64."""

    def __post_init__(self) -> None:
        total_C = torch.zeros_like(self.allowed_C).index_add(0, self.constraint_N, self.params_N)
        self.weight_N = (self.params_N / total_C[self.constraint_N]).float()
        """Share of its constraint's parameters that a unit holds."""
        self.share_N = (self.params_N / self.params_N.sum()).float()
        """Share of all units' parameters that a unit holds."""
        self.share_C = (total_C / self.params_N.sum()).float()
        self.target_C = (self.allowed_C / total_C).float()
        """ρ, the share of its parameters that a constraint may keep."""

    def kept_share(self, score_N: torch.Tensor) -> torch.Tensor:
        """s̄ of every constraint, shape (C,): the mean of the scores, weighted by parameters."""
        return torch.zeros_like(self.target_C).index_add(0, self.constraint_N, self.weight_N * score_N)

    def share_of(self, score_N: torch.Tensor) -> float:
        """Share of all units' parameters that scores (or a mask) of shape (N,) keep."""
        return float((self.share_N * score_N).sum())

    def to(self, device: torch.device) -> "Budget":
        """The same budget with its tensors on `device`."""
        return Budget(self.names, self.constraint_N.to(device), self.params_N.to(device), self.allowed_C.to(device))


def make_budget(groups: Sequence[Group], shapes: Shapes, sparsity: float, scope: str) -> Budget:
    """The constraints that remove the share `sparsity` of all parameters that belong to units.

    With scope `layer` every layer keeps the same number of units of a kind: heads rounded to the nearest whole number,
    channels take up the rest. Raises InputError when no equal widths meet the budget.
    """
    params = {g.name: unit_params(g, shapes) for g in groups}
    keys = {g.name: {"model": "all units", "kind": g.kind, "layer": g.name}[scope] for g in groups}
    names = tuple(dict.fromkeys(keys.values()))
    totals = dict.fromkeys(names, 0)
    for g in groups:
        totals[keys[g.name]] += g.units * params[g.name]
    allowed = {name: floor((1.0 - sparsity) * total + 1e-6) for name, total in totals.items()}
    if scope == "layer":
        allowed = {g.name: kept * params[g.name] for g, kept in _equal_widths(groups, params, sparsity)}
    index = {name: i for i, name in enumerate(names)}
    return Budget(
        names,
        torch.cat([torch.full((g.units,), index[keys[g.name]]) for g in groups]),
        torch.cat([torch.full((g.units,), params[g.name]) for g in groups]),
        torch.tensor([allowed[name] for name in names]),
    )


def everything(groups: Sequence[Group]) -> Budget:
    """The budget that lets all units stay, each counted as one."""
    count = sum(g.units for g in groups)
    ones_N = torch.ones(count, dtype=torch.int64)
    return Budget(("all units",), torch.zeros_like(ones_N), ones_N, torch.tensor([count]))


def largest_that_fits(rank_N: torch.Tensor, limits: Budget) -> torch.Tensor:
    """The kept set, a mask of shape (N,): units by falling rank as long as they fit, then smaller ones that do."""
    kept_N = torch.zeros(len(rank_N), dtype=torch.bool)
    ranked = rank_N.detach().cpu().argsort(descending=True, stable=True)
    params_N, constraint_N = limits.params_N.cpu(), limits.constraint_N.cpu()
    for constraint, allowed in enumerate(limits.allowed_C.tolist()):
        waiting = ranked[constraint_N[ranked] == constraint]
        while len(waiting):
            waiting = waiting[params_N[waiting] <= allowed]
            taken = params_N[waiting].cumsum(0) <= allowed
            kept_N[waiting[taken]] = True
            allowed -= int(params_N[waiting[taken]].sum())
            waiting = waiting[~taken]
    return kept_N.to(rank_N.device)


def ranked(score_N: torch.Tensor, kept_N: torch.Tensor) -> torch.Tensor:
    """Gates z that rank as the scores do, above 0 where kept and at most 0 elsewhere, shape (N,).

    Ranks, not differences to a threshold: scores span many orders of magnitude, and a plan for another sparsity needs
    the order of the removed units as well.
    """
    rank_N = torch.empty_like(score_N, dtype=torch.float32)
    order_N = score_N.argsort(descending=True, stable=True)
    rank_N[order_N] = torch.arange(len(score_N), 0, -1, device=score_N.device) / len(score_N)
    return torch.where(kept_N, rank_N, rank_N - 1.0)


def _equal_widths(groups: Sequence[Group], params: Mapping[str, int], sparsity: float) -> Iterator[tuple[Group, int]]:
    """Units to keep in each group so that all groups of a kind are equally wide, within the budget."""
    sizes: dict[str, set[int]] = {}
    for g in groups:
        sizes.setdefault(g.kind, set()).add(g.units)
    uneven = [kind for kind, found in sizes.items() if len(found) > 1]
    if uneven:
        raise InputError(f"the layers differ in their number of {uneven[0]}, so equal widths are not possible")
    allowed = (1.0 - sparsity) * sum(g.units * params[g.name] for g in groups)
    kept: dict[str, int] = {}
    for kind in sorted(sizes, key=lambda k: k == "channels"):
        (units,) = sizes[kind]
        whole = sum(g.units * params[g.name] for g in groups if g.kind == kind)
        exact = units * allowed / whole if kind == "channels" or "channels" not in sizes else units * (1.0 - sparsity)
        kept[kind] = min(units, floor(exact + 1e-9) if kind == "channels" or "channels" not in sizes else round(exact))
        allowed -= kept[kind] * whole / units
    if min(kept.values()) < 1:
        raise InputError(f"no equal widths remove {sparsity:.0%} of the units; use --shape ragged or lower --sparsity")
    yield from ((g, kept[g.kind]) for g in groups)


@dataclass(frozen=True)
class Figures:
    """Exact sizes of a model, dense or pruned."""

    parameters: int
    """All parameters; tied ones once."""
    block_parameters: int
    """Parameters that belong to units: what a budget counts."""
    flops_per_token: int
    """2 × the weights a token is multiplied by, output head included; attention over the context is not counted."""
    kv_bytes_per_token: int
    """Bytes the KV cache takes for a token."""


def figures(description: Description, kept: Mapping[str, int] | None, bytes_per_value: int, added: int = 0) -> Figures:
    """Figures of the model that keeps `kept[group.name]` units of every group (None: the dense model).

    `added` are parameters that the dense model has not: biases that stand for removed units.
    """
    groups = description.groups
    kept = {g.name: g.units for g in groups} if kept is None else kept
    shapes = sliced_shapes(groups, kept, description.shapes)
    return Figures(
        parameters=sum(prod(shape) for shape in shapes.values()) + added,
        block_parameters=sum(kept[g.name] * unit_params(g, description.shapes) for g in groups),
        flops_per_token=2 * sum(prod(shapes[name]) for name in description.matmuls if name in shapes),
        kv_bytes_per_token=bytes_per_value * sum(shapes[name][0] for name in description.cached if name in shapes),
    )
