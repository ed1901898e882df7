"""What may be kept: constraints over the units, each unit weighted by its parameters, and exact figures of a model.

Method §3: the sparsity term s̄ − ρ; here s̄ is a mean of retention scores weighted by parameters, so that a head counts
for as much as it holds. `model` is one budget over all units, `kind` the paper's one a kind, `layer` equal widths.
`--budget` weighs units by other costs (costs.py), each over the whole model.

Shape suffixes: N units of the whole model, C constraints, M units in constraints (a unit once in each), G groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, prod

import torch

from secateur.costs import Bound, Uneven, stored_when_empty, widths_within
from secateur.describe import Description
from secateur.files import InputError
from secateur.joint import Sublayers, sublayers_of
from secateur.knapsack import filled, fitting, prices
from secateur.nested import Pair, path
from secateur.policy import RAGGED, Policy, nearest, permitted, permitted_pairs
from secateur.recipes import Tie
from secateur.units import FEWEST_EXPERTS, Group, Shapes, Size, sliced_shapes, unit_params, whole
from secateur.widths import equal_or_checked


@dataclass(frozen=True)
class Rows:
    """A group whose units go together in rows, by their rank: a kept set then has one of a few widths.

    The first row holds the best units, as many as the least width, the next one those up to the next width, and so on;
    of experts, or of the query heads of each KV head, as many of each. A row stays only if the rows before it do.
    """

    where: slice
    """The group's units among all."""
    widths: tuple[int, ...]
    """What the group, or each of its parts, may be wide, rising; units beyond the last are never kept."""
    parts: int = 1
    """How many experts, or KV heads, the units are those of."""
    experts: bool = False
    """Whether they are those of experts."""
    can_go: bool = False
    """Whether experts without a unit of rank above 0 go whole, and not by rows."""


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
    tie: Tie | None = None
    """What of a mixture goes together."""
    policy: Policy = RAGGED
    """The shape that `rows` follow from."""
    rows: tuple[Rows, ...] = ()
    """Groups whose units go together."""
    pairs: tuple[Pair, ...] = ()
    """Groups of KV heads and of query heads that go together."""
    bounds: tuple[Bound, ...] = ()
    """Budgets on the whole model, which are the constraints then, in the place of those above."""
    groups: tuple[Group, ...] = ()
    """Where there are bounds, whose units these are."""
    sublayers: Sublayers | None = None
    """Gates of sublayers, which cost nothing themselves; None: there are none beside those of units."""

    def __post_init__(self) -> None:
        device, cost_M, allowed_C = self.constraint_N.device, self.params_N, self.allowed_C
        self.unit_M, self.constraint_M = torch.arange(len(cost_M), device=device), self.constraint_N
        if self.sublayers is not None:
            self.unit_M = cost_M.nonzero().flatten()
            cost_M, self.constraint_M = cost_M[self.unit_M], self.constraint_N[self.unit_M]
        if self.bounds:
            self.names = tuple(b.name for b in self.bounds)
            units_G = torch.tensor([g.units for g in self.groups], device=device)
            cost_CG = torch.tensor([[c.at(g.units) for c, g in zip(b.costs, self.groups, strict=True)]
                                    for b in self.bounds], device=device)  # fmt: skip
            self.group_N = torch.arange(len(units_G), device=device).repeat_interleave(units_G)
            spread_CN = (cost_CG.double() / units_G)[:, self.group_N]
            self.constraint_M, self.unit_M = spread_CN.nonzero(as_tuple=True)
            cost_M = spread_CN[self.constraint_M, self.unit_M]
            allowed_C = torch.tensor([b.allowed - b.fixed for b in self.bounds], device=device)
            self.uneven = Uneven(self.bounds, units_G, cost_CG.sum(1))
        total_C = torch.zeros_like(allowed_C, dtype=cost_M.dtype).index_add(0, self.constraint_M, cost_M)
        self.weight_M = (cost_M / total_C[self.constraint_M]).float()
        """Share of its constraint's cost that a unit holds."""
        self.share_N = (self.params_N / self.params_N.sum()).float()
        """Share of all units' parameters that a unit holds."""
        self.behind_N = self.share_N if self.sublayers is None else self.sublayers.sums(self.share_N)
        """The same of a gate: that of a sublayer has all of it behind it."""
        self.target_C = (allowed_C / total_C).float()
        """ρ, the share of its cost that a constraint may keep."""
        share_C = (total_C / self.params_N.sum()).float()
        self.target = None if self.bounds else float((self.target_C * share_C).sum())
        """Share of all units' parameters that may be kept, where that is what is bounded."""

    def entries(self, value_N: torch.Tensor) -> torch.Tensor:
        """Values of the units in constraints, shape (M,)."""
        return value_N[self.unit_M]

    def gathered(self, value_M: torch.Tensor) -> torch.Tensor:
        """Sums over the constraints that a unit is in, shape (N,)."""
        once = not self.bounds and self.sublayers is None  # each unit is in one constraint, in its order
        return value_M if once else torch.zeros_like(self.share_N).index_add(0, self.unit_M, value_M)

    def times(self, value_N: torch.Tensor) -> torch.Tensor:
        """Values of units, times those of their sublayers where these have gates."""
        return value_N if self.sublayers is None else self.sublayers.times(value_N)

    def open(self, open_N: torch.Tensor) -> torch.Tensor:
        """What is kept where these gates are open, a mask."""
        return open_N if self.sublayers is None else self.sublayers.open(open_N)

    def mean(self, value_M: torch.Tensor) -> torch.Tensor:
        """Of every constraint, shape (C,), weighted by cost."""
        return torch.zeros_like(self.target_C).index_add(0, self.constraint_M, self.weight_M * value_M)

    def kept_share(self, score_N: torch.Tensor) -> torch.Tensor:
        """s̄ of every constraint, shape (C,): the mean of the scores, weighted by cost."""
        return self.mean(self.entries(score_N)) + self.excess(score_N)

    def excess(self, score_N: torch.Tensor) -> torch.Tensor:
        """What s̄ misses, shape (C,): its mean spreads over all units of a sublayer what opens it, and what bends. A
        figure without gradient: they feel the mean's alike."""
        if not self.bounds:
            return torch.zeros_like(self.target_C)
        score_N, none_G = score_N.detach(), torch.zeros(len(self.groups), device=score_N.device)
        highest_G = none_G.scatter_reduce(0, self.group_N, score_N, "amax")
        mean_G = none_G.scatter_reduce(0, self.group_N, score_N, "mean", include_self=False)
        return self.uneven.missed(mean_G, highest_G)

    def per_cost(self, value_N: torch.Tensor) -> torch.Tensor:
        """What units are worth for what they cost, shape (N,): for a share of the units' parameters, or of the budgets
        at the prices at which these would be met."""
        if not self.bounds:
            return self.per_share(value_N)
        weight_CN = torch.zeros(len(self.names), len(value_N), device=value_N.device)
        weight_CN[self.constraint_M, self.unit_M] = self.weight_M
        price_C = prices(value_N, weight_CN, self.target_C) if len(self.names) > 1 else torch.ones_like(self.target_C)
        cost_N = (price_C[:, None] * weight_CN).sum(0)  # autocast would round a matrix product
        cost_N = cost_N.clamp(min=1e-6 * float(cost_N.max()))  # some may cost nothing
        return value_N / cost_N if self.sublayers is None else self.sublayers.worth(value_N, cost_N)

    def per_share(self, value_N: torch.Tensor) -> torch.Tensor:
        """What units are worth for a share of the units' parameters, shape (N,)."""
        return value_N / self.share_N if self.sublayers is None else self.sublayers.worth(value_N, self.share_N)

    def share_of(self, score_N: torch.Tensor) -> float:
        """Share of all units' parameters that scores (or a mask) of shape (N,) keep."""
        return float((self.share_N * score_N).sum())

    def to(self, device: torch.device) -> "Budget":
        """The same budget with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("constraint_N", "params_N", "allowed_C")}
        return replace(self, **moved, sublayers=self.sublayers and self.sublayers.to(device))


def make_budget(
    groups: Sequence[Group],
    shapes: Shapes,
    sparsity: float,
    scope: str,
    tie: Tie | None = None,
    policy: Policy = RAGGED,
    bounds: tuple[Bound, ...] = (),
) -> Budget:
    """The constraints that remove the share `sparsity` of all parameters that belong to units, or else the `bounds`.

    With scope `layer` or `expert` all layers keep as many units of a kind: heads rounded to the nearest whole number,
    channels take up the rest; `expert` asks the same of the experts of a layer. `tie` says what of a mixture goes
    together, `policy` which widths there may be, at least one for each group (`Description.check_shape`). Raises
    InputError when no such widths, or no units at all, meet the budget.
    """
    params = {g.name: unit_params(g, shapes) for g in groups}
    if bounds and scope == "layer" and tie != "experts":
        scope = "expert"  # the units of experts that are gone could widen others beyond a bound
    equal = scope in ("layer", "expert")

    def widths_for(shape: Policy) -> dict[str, int]:
        if bounds:
            return widths_within(groups, bounds, equal, tie == "experts", shape)
        return equal_or_checked(groups, params, sparsity, scope, tie, shape)

    def works(shape: Policy) -> bool:
        if not all(permitted(g, shape) for g in groups):
            return False
        try:
            widths_for(shape)
        except InputError:
            return False
        return True

    if equal and any(g.keys for g in groups):
        raise InputError("--attention-unit nested leaves layers of different widths; use kv-groups or heads")
    try:
        widths = widths_for(policy)
    except InputError as error:
        instead = None if policy.free else nearest(policy, works, groups)
        raise InputError(f"{error}; {instead}" if instead else str(error)) from None
    allowed: dict[str, int] = {}
    numbers: dict[str, int] = {}
    constraints, start = [], 0
    rows: list[Rows] = []
    pairs: list[Pair] = []
    where: dict[str, slice] = {}
    for g in groups:
        where[g.name] = slice(start, start + g.units)
        together = tie is not None and scope != "expert" if g.experts else g.parts > 1 or not policy.free
        if g.keys:
            pairs.append(Pair(where[g.keys], where[g.name], permitted_pairs(g, policy)))
        elif g.writes and together:
            can_go = bool(g.experts) and not g.shared
            rows.append(Rows(where[g.name], permitted(g, policy), g.parts, bool(g.experts), can_go))
        start += g.units
        if g.gate_only:  # it costs what is kept of its units
            constraints.append(torch.zeros(1, dtype=torch.int64))
            continue
        parts = g.experts if scope == "expert" and g.experts else 1
        for part in range(parts):
            kind = g.kind if g.writes else "heads"  # nested KV heads and query heads are one constraint
            name = {"model": "all units", "kind": kind}.get(scope, f"{g.name}.{part}" if parts > 1 else g.name)
            units = widths.get(g.name, g.width) * g.parts // parts
            allowed[name] = allowed.get(name, 0) + units * params[g.name]
            constraints.append(torch.full((g.units // parts,), numbers.setdefault(name, len(numbers))))
    if not equal:
        allowed = {name: floor((1.0 - sparsity) * total + 1e-6) for name, total in allowed.items()}
    mixed = any(g.experts for g in groups)
    return Budget(
        tuple(allowed),
        torch.cat(constraints),
        torch.cat([torch.full((g.units,), params[g.name]) for g in groups]),
        torch.tensor(list(allowed.values())),
        tie if mixed and scope != "expert" else None,
        policy,
        tuple(rows),
        tuple(pairs),
        () if equal else bounds,
        tuple(groups) if bounds and not equal else (),
        sublayers_of(groups),
    )


def everything(groups: Sequence[Group]) -> Budget:
    """The budget that lets all units stay, each counted as one."""
    count = sum(g.units for g in groups)
    ones_N = torch.ones(count, dtype=torch.int64)
    return Budget(("all units",), torch.zeros_like(ones_N), ones_N, torch.tensor([count]))


def largest_that_fits(rank_N: torch.Tensor, limits: Budget, in_order: bool = False) -> torch.Tensor:
    """The kept set, a mask of shape (N,): units by falling rank as long as they fit, then smaller ones that do.

    Where units go together, by their mean rank, weighted by parameters: ranks stand for what a parameter is worth.
    `in_order`: nothing after the first that does not fit, so that a smaller budget keeps a subset.
    """
    rank_N, device = rank_N.detach().cpu(), rank_N.device
    if limits.sublayers is not None:
        sublayers = limits.sublayers.to(rank_N.device)
        return sublayers.whole(rank_N, lambda rank_N: _largest(rank_N, limits, in_order), in_order).to(device)
    return _largest(rank_N, limits, in_order).to(device)


def _largest(rank_N: torch.Tensor, limits: Budget, in_order: bool) -> torch.Tensor:
    """The units of the kept set, by the ranks of gates on the CPU."""
    params_N, constraint_N = limits.params_N.cpu(), limits.constraint_N.cpu()
    if not (limits.rows or limits.pairs or limits.bounds):
        return filled(rank_N, params_N, constraint_N, limits.allowed_C, None, in_order)
    owner_N, chain_N = _tied(rank_N, limits)
    has_N = owner_N >= 0
    if not has_N.any():
        return torch.zeros(len(rank_N), dtype=torch.bool)
    owner_M, count = owner_N[has_N], int(owner_N.max()) + 1
    params_O = torch.zeros(count, dtype=torch.int64).index_add(0, owner_M, params_N[has_N])
    worth_O = torch.zeros(count, dtype=torch.float64).index_add(0, owner_M, rank_N[has_N].double() * params_N[has_N])
    rank_O = worth_O / params_O if limits.sublayers is not None else (worth_O / params_O).float()
    constraint_O = torch.zeros(count, dtype=torch.int64).index_copy(0, owner_M, constraint_N[has_N])
    chain_O = torch.zeros(count, dtype=torch.int64).index_copy(0, owner_M, chain_N[has_N])
    for chain in range(len(limits.rows) + len(limits.pairs)):  # a short row's mean may be rounded up
        rank_O[chain_O == chain] = rank_O[chain_O == chain].cummin(0).values
    if limits.bounds:
        chains, group_G = _chains(owner_N, limits)
        chain_O.index_copy_(0, owner_M, group_G[limits.group_N.cpu()[has_N]])
        kept_O = fitting(rank_O, chain_O, chains, limits.bounds, in_order)
    else:
        kept_O = filled(rank_O, params_O, constraint_O, limits.allowed_C, chain_O, in_order)
    return kept_O[owner_N] & has_N


def _chains(owner_N: torch.Tensor, limits: Budget) -> tuple[list[dict[int, torch.Tensor]], torch.Tensor]:
    """The chains that `fitting` takes items from: for each group, or two that go together, the units that are stored
    with nothing kept of it, with the first item, and so on. And the chain of each group, shape (G,)."""
    starts = {rows.where.start: rows for rows in limits.rows}
    paired = {at.start: pair for pair in limits.pairs for at in (pair.keys, pair.heads)}
    chains: list[dict[int, torch.Tensor]] = []
    numbers: dict[int, int] = {}
    number_G, start = [], 0
    for g, group in enumerate(limits.groups):
        rows, pair, owner_U = starts.get(start), paired.get(start), owner_N[start : start + group.units]
        key = start if pair is None else pair.keys.start
        start += group.units
        if key not in numbers:
            numbers[key] = len(chains)
            chains.append({})
        number_G.append(numbers[key])
        if pair is not None:
            step_K, step_U = owner_N[pair.keys], owner_U[owner_U >= 0]
            first = int(step_K[step_K >= 0].min())  # some KV head comes with the first step
            count = int(owner_N[pair.heads].max()) - first + 1  # and query heads with every one
            steps = torch.bincount(step_U - first, minlength=count).cumsum(0).tolist()
        elif rows is None:
            steps = list(range(1, group.units + 1))
        elif group.experts and limits.tie == "experts":
            steps = [group.width * max(FEWEST_EXPERTS, n) for n in range(1, group.experts + 1)]
        else:
            living = int((group.by_part(owner_U) >= 0).any(1).sum())
            parts = max(FEWEST_EXPERTS, living) if group.experts else group.parts
            steps = [width * parts for width in rows.widths]
        chains[number_G[g]][g] = torch.tensor([stored_when_empty(group, limits.policy), *steps])
    return chains, torch.tensor(number_G)


def _tied(rank_N: torch.Tensor, limits: Budget) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of what each unit belongs to, shape (N,): itself, an expert, or a row (of its layer's experts: of all
    of them). −1 for units that cannot stay: those beyond the last width, and experts that go whole.

    And the number of the `Rows` or `Pair` it is in, −1 where it is in none.
    """
    owner_N, chain_N = torch.arange(len(rank_N)), torch.full((len(rank_N),), -1)
    for number, rows in enumerate(limits.rows):
        rank_EC = rank_N[rows.where].unflatten(0, (rows.parts, -1))
        if rows.experts and limits.tie == "experts":
            first_E = owner_N[rows.where].unflatten(0, (rows.parts, -1))[:, :1]
            owner_N[rows.where] = first_E.expand_as(rank_EC).flatten()
            continue
        place_EC = rank_EC.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        row_EC = torch.searchsorted(torch.tensor(rows.widths), place_EC, right=True)
        stays_EC = (row_EC < len(rows.widths)) & ((rank_EC > 0).any(1, keepdim=True) | (not rows.can_go))
        owner_N[rows.where] = torch.where(stays_EC, rows.where.start + row_EC, -1).flatten()
        chain_N[rows.where] = number
    for number, pair in enumerate(limits.pairs, len(limits.rows)):
        rank_K = rank_N[pair.keys]
        cost = int(limits.params_N[pair.keys.start]), int(limits.params_N[pair.heads.start])
        steps = path(rank_K, rank_N[pair.heads].unflatten(0, (len(rank_K), -1)), cost, pair.permitted)
        for at, step in ((pair.keys, steps.keys_K), (pair.heads, steps.heads_KQ.flatten())):
            owner_N[at] = torch.where(step >= 0, pair.keys.start + step, -1)
            chain_N[at] = number
    if limits.sublayers is not None:  # they are kept with their units
        owner_N[limits.sublayers.are_N.cpu()] = -1
    numbers, compact_N = owner_N.unique(return_inverse=True)
    return compact_N - int(numbers[0] < 0), chain_N


@dataclass(frozen=True)
class Figures:
    """Exact sizes of a model, dense or pruned."""

    parameters: int
    """All parameters; tied ones once."""
    active_parameters: int
    """Those that a token meets: of a mixture's experts, as many as it is routed to. The same where there are none."""
    block_parameters: int
    """Parameters that belong to units, those of `--keep` too: what sparsity is a share of."""
    flops_per_token: int
    """2 × the weights a token is multiplied by, output head included; attention over the context is not counted."""
    kv_bytes_per_token: int
    """Bytes the KV cache takes for a token."""


def figures(
    description: Description, sizes: Mapping[str, Size] | None, bytes_per_value: int, added: int = 0
) -> Figures:
    """Figures of the model that stores `sizes[group.name]` of every group (None: the dense model).

    `added` are parameters that the dense model has not: biases that stand for removed units.
    """
    groups = description.groups
    sizes = {g.name: whole(g) for g in groups} if sizes is None else sizes
    shapes = sliced_shapes(groups, sizes, description.shapes)
    counts = {name: prod(shape) for name, shape in shapes.items()}
    total = sum(counts.values()) + added
    multiplied = {name: share for name, share in description.matmuls.items() if name in shapes}
    idle = sum(counts[name] * (1.0 - share) for name, share in multiplied.items())
    return Figures(
        parameters=total,
        active_parameters=total - round(idle),
        block_parameters=description.held_parameters
        + sum(sizes[g.name].units * unit_params(g, description.shapes) for g in groups),
        flops_per_token=round(2 * sum(counts[name] * share for name, share in multiplied.items())),
        kv_bytes_per_token=bytes_per_value * sum(shapes[name][0] for name in description.cached if name in shapes),
    )
