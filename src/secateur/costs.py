"""What a `--budget` counts, exactly, and what it leaves to the units: for `prune`, `plan` and `export`.

The cost of a model is what stays whole, plus for each group a function of how many of its units are stored. It is
linear but for one step: parameters that serve all units of a sublayer (a latent's maps, keys of multi-query attention,
norms) go with the last unit. Times that were measured (latency.py) bend besides. `Cost.at` is all that the rest sees of
it, so that a budget may count anything that is a sum over sublayers. Fitting takes it as it is; learning spreads it
over the units evenly, and sees what that misses as a figure (`Uneven`).

Shape suffixes: C constraints, G groups, B bends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, lcm, prod
from typing import TypeVar

import torch
from torch import Tensor

from secateur.describe import Description
from secateur.files import InputError
from secateur.policy import Policy, permitted, permitted_pairs
from secateur.units import FEWEST_EXPERTS, Group, aligned
from secateur.wanted import Wanted

Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class Cost:
    """What the units of a group cost."""

    unit: int
    opening: int = 0
    """What goes with the last unit only."""
    bends: tuple[tuple[int, int], ...] = ()
    """(units, how much more each unit beyond so many costs): measured times are not straight. Costs never fall."""

    def at(self, stored: Count) -> Count:
        """Of so many stored units."""
        cost = self.unit * stored + self.opening * (stored > 0)
        for start, change in self.bends:
            cost = cost + change * (stored - start) * (stored > start)
        return cost


@dataclass(frozen=True)
class Bound:
    """One budget on a model. All numbers are multiples of 1 / `scale` of what is counted, so that they are whole though
    a token meets only a share of the experts."""

    name: str
    wanted: Wanted
    costs: tuple[Cost, ...]
    """Of each group."""
    fixed: int
    """What stays whole."""
    scale: int
    dense: int
    """Of the unpruned model."""
    allowed: int
    """The bound."""

    def cost(self, stored: Sequence[int]) -> int:
        """Of the model that stores so many units of each group."""
        return self.fixed + sum(cost.at(units) for cost, units in zip(self.costs, stored, strict=True))

    @property
    def most(self) -> int:
        """The bound in what is counted."""
        return self.allowed // self.scale

    def said(self, cost: int, less: bool = False) -> str:
        """Words for the nearest budget that allows `cost`, or is not above it."""
        figure = cost // self.scale if less else ceil(Fraction(cost, self.scale))
        return f"--budget {self.wanted.instead(figure, Fraction(self.dense, self.scale), less)}"


class Uneven:
    """What bounds count beyond what each unit of a group costs on average, as shares of all that the groups cost."""

    def __init__(self, bounds: Sequence[Bound], units_G: Tensor, total_C: Tensor) -> None:
        opening_CG = torch.tensor([[c.opening for c in b.costs] for b in bounds], device=units_G.device)
        self.opening_CG = (opening_CG / total_C[:, None]).float()
        bends = [(c, g, *bend) for c, b in enumerate(bounds) for g, k in enumerate(b.costs) for bend in k.bends]
        table_B4 = torch.tensor(bends, dtype=torch.int64, device=units_G.device).reshape(-1, 4)
        self.bound_B, self.group_B, self.start_B, change_B = table_B4.unbind(1)
        self.change_B = (change_B / total_C[self.bound_B]).float()
        self.units_B = units_G[self.group_B]

    def missed(self, mean_G: Tensor, highest_G: Tensor) -> Tensor:
        """Where scores have such a mean and such a highest one in each group, shape (C,). What opens a sublayer costs
        as much as its highest score says."""
        mean_B = mean_G[self.group_B]
        beyond_B = (mean_B * self.units_B - self.start_B).clamp(min=0) - mean_B * (self.units_B - self.start_B)
        opened_C = (self.opening_CG * (highest_G - mean_G)).sum(1)  # autocast would round a matrix product
        return opened_C.index_add(0, self.bound_B, self.change_B * beyond_B)


def bounds_of(
    description: Description,
    wanted: Sequence[Wanted],
    bytes_per_value: int,
    buffer_bytes: int = 0,
    by_kind: bool = False,
) -> tuple[Bound, ...]:
    """The budgets on the model of a description. `buffer_bytes` are those of tensors that checkpoints hold beside the
    parameters; `by_kind` divides the budget of units, the same share to each kind."""
    found = []
    for each in wanted:
        whole = per_parameter(description, each.kind, bytes_per_value)
        extra = {"bytes": buffer_bytes, "units": 0 if by_kind else description.held_parameters}.get(each.kind, 0)
        kinds = dict.fromkeys(g.kind for g in description.groups) if by_kind and each.kind == "units" else [None]
        found += [_bound(description.groups, each, whole, extra, kind) for kind in kinds]
    return tuple(found)


def _bound(
    groups: Sequence[Group], wanted: Wanted, whole: Mapping[str, Fraction], extra: int, kind: str | None
) -> Bound:
    none = Fraction(0)
    unit = [sum((whole.get(s.param, none) for s in g.slices), none) / g.units for g in groups]
    unit = [each if kind in (None, g.kind) else none for each, g in zip(unit, groups, strict=True)]
    opening = [sum((whole.get(name, none) for name in g.shared), none) for g in groups]
    inside = {s.param for g in groups for s in g.slices} | {name for g in groups for name in g.shared}
    fixed = sum((cost for name, cost in whole.items() if name not in inside), Fraction(extra))
    scale = lcm(*(cost.denominator for cost in (*unit, *opening, fixed)))
    costs = tuple(Cost(int(u * scale), int(o * scale)) for u, o in zip(unit, opening, strict=True))
    dense = int(fixed * scale) + sum(c.at(g.units) for c, g in zip(costs, groups, strict=True))
    most = wanted.most(Fraction(dense, scale))
    name = wanted.kind if kind is None else f"{wanted.kind} of {kind}"
    return Bound(name, wanted, costs, int(fixed * scale), scale, dense, most * scale)


def per_parameter(description: Description, kind: str, bytes_per_value: int) -> dict[str, Fraction]:
    """Parameter → what it counts for in the unpruned model, as `budget.figures` counts."""
    counts = {name: Fraction(prod(shape)) for name, shape in description.shapes.items()}
    # A share is a ratio of two small numbers, chosen experts over all.
    met = {name: Fraction(share).limit_denominator(2**16) for name, share in description.matmuls.items()}
    if kind == "units":
        sliced = {s.param for g in description.groups for s in g.slices}
        return {name: count for name, count in counts.items() if name in sliced}
    if kind == "params":
        return {name: count * met.get(name, 1) for name, count in counts.items()}
    if kind == "flops":
        return {name: 2 * counts[name] * share for name, share in met.items()}
    if kind == "kv":
        return {name: Fraction(bytes_per_value * description.shapes[name][0]) for name in description.cached}
    return {name: count * (bytes_per_value if kind == "bytes" else 1) for name, count in counts.items()}


def stored_when_empty(group: Group, policy: Policy) -> int:
    """Units that are stored though none is kept: transformers reads no mixture without experts back."""
    if not group.experts:
        return 0
    experts = group.experts if group.shared else min(group.experts, FEWEST_EXPERTS)
    return experts * aligned(group, 0, policy)


# --- what can be met -------------------------------------------------------------------------------------------------


def widths_within(
    groups: Sequence[Group], bounds: Sequence[Bound], equal: bool, whole_experts: bool, policy: Policy
) -> dict[str, int]:
    """Group name → units of it, or of each of its experts, where widths are equal by layer; else nothing.

    Raises InputError that names the nearest budget that can be met, where one cannot.
    """
    _check_counted(groups, bounds)
    if policy.form == "padded" and any(g.experts for g in groups):
        raise InputError(
            f"--shape padded stores more of a mixture than it keeps, so --budget {bounds[0].wanted} cannot be held; "
            "use --sparsity, or --shape ragged"
        )
    if equal and whole_experts:
        raise InputError("this method removes whole experts, so equal widths contradict --budget; use --per model")
    if equal:
        return _equal(groups, bounds, policy)
    lowest = [stored_when_empty(g, policy) for g in groups]
    highest = [g.parts * permitted(g, policy)[-1] for g in groups]
    firsts = [_first(groups, number, policy, whole_experts) for number, g in enumerate(groups) if g.writes]
    gaps = []
    for b in bounds:
        steps = [sum(b.costs[g].at(units) - b.costs[g].at(lowest[g]) for g, units in first.items()) for first in firsts]
        least = b.cost(lowest) + min((step for step in steps if step > 0), default=0)
        if b.allowed < least:
            raise InputError(f"--budget {b.wanted} cannot be met{_by(policy)}: {_nearest(b, least)}")
        gaps.append(least - b.cost(lowest))
    _check_spent(bounds, [b.cost(highest) for b in bounds], gaps, policy)
    return {}


def _first(groups: Sequence[Group], number: int, policy: Policy, whole_experts: bool) -> dict[int, int]:
    """The units of a group, and of another that goes with it, that are the least that may be stored if any are."""
    g = groups[number]
    if g.keys:
        keys, heads = min(permitted_pairs(g, policy))
        return {number: keys * heads, next(n for n, other in enumerate(groups) if other.name == g.keys): keys}
    if g.experts and whole_experts:
        return {number: FEWEST_EXPERTS * g.width}
    return {number: g.parts * permitted(g, policy)[0]}


def _check_counted(groups: Sequence[Group], bounds: Sequence[Bound]) -> None:
    kinds = ", ".join(dict.fromkeys(g.kind for g in groups))
    for b in bounds:
        if not any(cost.at(g.units) for cost, g in zip(b.costs, groups, strict=True)):
            raise InputError(
                f"--budget {b.wanted} cannot be met: none of the {b.wanted.counts} belong to what is pruned "
                f"({kinds}); see --units, or leave it out"
            )


def _check_spent(bounds: Sequence[Bound], most: Sequence[int], steps: Sequence[int], policy: Policy) -> None:
    """Raises InputError where no bound asks for less than the dense model has, or all leave a step or more beyond what
    a policy permits at most."""
    enough = [cost + (step if cost < b.dense else 0) for b, cost, step in zip(bounds, most, steps, strict=True)]
    if any(b.allowed < cost for b, cost in zip(bounds, enough, strict=True)):
        return
    b, cost = bounds[0], most[0]
    has, less = ("the unpruned model has", "below ") if cost == b.dense else (f"--shape {policy} permits", "")
    raise InputError(
        f"--budget {b.wanted} cannot be met to within a unit: {has} no more than {cost // b.scale:,} "
        f"{b.wanted.counts}; the nearest is {less}{b.said(cost, less=bool(less))}"
    )


def _by(policy: Policy) -> str:
    return "" if str(policy) == "ragged" else f" in --shape {policy}"


def _nearest(b: Bound, least: int) -> str:
    what = b.wanted.counts
    return f"the least is {ceil(least / b.scale):,} of {b.dense // b.scale:,} {what}; the nearest is {b.said(least)}"


def _equal(groups: Sequence[Group], bounds: Sequence[Bound], policy: Policy) -> dict[str, int]:
    """The widths of every kind: all near one share of the dense width, the largest for which all bounds hold; then each
    kind in turn as wide as what is left allows, channels first.

    The width of shared experts that no key of the configuration says is a multiple of the routed experts' width.
    """
    kinds = {g.kind: g for g in groups}
    for kind in kinds:
        if len({(g.width, g.parts) for g in groups if g.kind == kind}) > 1:
            raise InputError(f"the layers differ in their number of {kind}, so equal widths are not possible")
    routed = kinds.get("expert_channels")
    tied = {kind: g for kind, g in kinds.items() if routed is not None and not g.sizes}
    free = {kind: permitted(g, policy) for kind, g in kinds.items() if kind not in tied}

    def stored(widths: Mapping[str, int]) -> list[int]:
        return [_width(g, widths) * g.parts for g in groups]

    def _width(g: Group, widths: Mapping[str, int]) -> int:
        if g.kind not in tied:
            return widths[g.kind]
        assert routed is not None
        return round(widths["expert_channels"] * g.width / routed.width)

    def fits(widths: Mapping[str, int]) -> bool:
        return all(b.cost(stored(widths)) <= b.allowed for b in bounds)

    least = {kind: widths[0] for kind, widths in free.items()}
    for b in bounds:
        if b.cost(stored(least)) == b.dense:
            raise InputError(
                f"--budget {b.wanted} cannot be met by equal widths, which leave all {b.wanted.counts}: they go with "
                "whole layers only; leave it out, or use --shape ragged and --per model"
            )
        if b.cost(stored(least)) > b.allowed:
            raise InputError(f"--budget {b.wanted} cannot be met by equal widths: {_nearest(b, b.cost(stored(least)))}")
    most = {kind: widths[-1] for kind, widths in free.items()}
    second = {kind: widths[min(1, len(widths) - 1)] for kind, widths in free.items()}
    steps = [b.cost(stored(second)) - b.cost(stored(least)) for b in bounds]
    _check_spent(bounds, [b.cost(stored(most)) for b in bounds], steps, policy)
    shares = sorted({Fraction(w, kinds[kind].width) for kind, widths in free.items() for w in widths})
    best = least
    for share in shares:
        tried = {
            kind: max((w for w in widths if w <= share * kinds[kind].width), default=widths[0])
            for kind, widths in free.items()
        }
        if fits(tried):
            best = tried
    for kind in sorted(free, key=lambda kind: (kinds[kind].attends, kind != "expert_channels")):
        best[kind] = max(w for w in free[kind] if w >= best[kind] and fits(best | {kind: w}))
    return {g.name: _width(g, best) for g in groups}
