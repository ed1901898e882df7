"""What may be kept: constraints over the units, each unit weighted by its parameters, and exact figures of a model.

Method §3: the sparsity term s̄ − ρ; here s̄ is a mean of retention scores weighted by parameters, so that a head counts
for as much as it holds. `model` is one budget over all units, `kind` the paper's one a kind, `layer` equal widths.

Shape suffixes: N units of the whole model, C constraints.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, prod

import torch

from secateur.config import Tie
from secateur.describe import Description
from secateur.files import InputError
from secateur.policy import RAGGED, Policy, nearest, permitted
from secateur.units import Group, Shapes, Size, sliced_shapes, unit_params, whole


@dataclass(frozen=True)
class Rows:
    """A group whose units go together in rows, by their rank: a kept set then has one of a few widths.

    The first row holds the best units, as many as the least width, the next one those up to the next width, and so on;
    of experts, as many of each. A row stays only if the rows before it do.
    """

    where: slice
    """The group's units among all."""
    widths: tuple[int, ...]
    """What the group, or each of its experts, may be wide, rising; units beyond the last are never kept."""
    experts: int = 0
    """How many experts the units are those of; 0: none."""
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
        moved = {name: getattr(self, name).to(device) for name in ("constraint_N", "params_N", "allowed_C")}
        return replace(self, **moved)


def make_budget(
    groups: Sequence[Group],
    shapes: Shapes,
    sparsity: float,
    scope: str,
    tie: Tie | None = None,
    policy: Policy = RAGGED,
) -> Budget:
    """The constraints that remove the share `sparsity` of all parameters that belong to units.

    With scope `layer` or `expert` all layers keep as many units of a kind: heads rounded to the nearest whole number,
    channels take up the rest; `expert` asks the same of the experts of a layer. `tie` says what of a mixture goes
    together, `policy` which widths there may be, at least one for each group (`Description.check_shape`). Raises
    InputError when no such widths meet the budget.
    """
    params = {g.name: unit_params(g, shapes) for g in groups}

    def wrong(shape: Policy) -> str | None:
        try:
            _equal_or_checked(groups, params, sparsity, scope, tie, shape)
        except InputError as error:
            return str(error)
        return None

    if not policy.free and (reason := wrong(policy)):
        instead = nearest(policy, lambda shape: all(permitted(g, shape) for g in groups) and not wrong(shape), groups)
        raise InputError(f"{reason}; {instead}" if instead else reason)
    widths = _equal_or_checked(groups, params, sparsity, scope, tie, policy)
    equal = scope in ("layer", "expert")
    allowed: dict[str, int] = {}
    numbers: dict[str, int] = {}
    constraints, start = [], 0
    rows: list[Rows] = []
    for g in groups:
        free = policy.free and not g.experts
        if not free and not (g.experts and (tie is None or scope == "expert")):
            where = slice(start, start + g.units)
            rows.append(Rows(where, permitted(g, policy), g.experts, bool(g.experts) and not g.shared))
        start += g.units
        parts = g.experts if scope == "expert" and g.experts else 1
        for part in range(parts):
            name = {"model": "all units", "kind": g.kind}.get(scope, f"{g.name}.{part}" if parts > 1 else g.name)
            units = widths.get(g.name, g.width) * (g.experts or 1) // parts
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
    )


def everything(groups: Sequence[Group]) -> Budget:
    """The budget that lets all units stay, each counted as one."""
    count = sum(g.units for g in groups)
    ones_N = torch.ones(count, dtype=torch.int64)
    return Budget(("all units",), torch.zeros_like(ones_N), ones_N, torch.tensor([count]))


def largest_that_fits(rank_N: torch.Tensor, limits: Budget) -> torch.Tensor:
    """The kept set, a mask of shape (N,): units by falling rank as long as they fit, then smaller ones that do.

    Where units go together, by their mean rank: ranks stand for what a parameter is worth, and the units of a group
    are of one size, so a row is worth the mean of its units.
    """
    rank_N, device = rank_N.detach().cpu(), rank_N.device
    params_N, constraint_N = limits.params_N.cpu(), limits.constraint_N.cpu()
    if not limits.rows:
        return _fitting(rank_N, params_N, constraint_N, limits.allowed_C).to(device)
    owner_N, chain_N = _tied(rank_N, limits)
    has_N = owner_N >= 0
    if not has_N.any():
        return torch.zeros(len(rank_N), dtype=torch.bool, device=device)
    owner_M, count = owner_N[has_N], int(owner_N.max()) + 1
    size_O = torch.zeros(count).index_add(0, owner_M, torch.ones(len(owner_M)))
    rank_O = torch.zeros(count).index_add(0, owner_M, rank_N[has_N].float()) / size_O
    params_O = torch.zeros(count, dtype=torch.int64).index_add(0, owner_M, params_N[has_N])
    constraint_O = torch.zeros(count, dtype=torch.int64).index_copy(0, owner_M, constraint_N[has_N])
    chain_O = torch.zeros(count, dtype=torch.int64).index_copy(0, owner_M, chain_N[has_N])
    for rows in range(len(limits.rows)):  # a short row's mean may be rounded above that of the row before it
        rank_O[chain_O == rows] = rank_O[chain_O == rows].cummin(0).values
    kept_O = _fitting(rank_O, params_O, constraint_O, limits.allowed_C, chain_O)
    return (kept_O[owner_N] & has_N).to(device)


def _fitting(
    rank_N: torch.Tensor,
    params_N: torch.Tensor,
    constraint_N: torch.Tensor,
    allowed_C: torch.Tensor,
    chain_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """By falling rank what fits, a mask; of a chain (−1: none), nothing after what does not."""
    kept_N = torch.zeros(len(rank_N), dtype=torch.bool)
    ranked = rank_N.argsort(descending=True, stable=True)
    for constraint, allowed in enumerate(allowed_C.tolist()):
        waiting = ranked[constraint_N[ranked] == constraint]
        while len(waiting):
            fits = params_N[waiting] <= allowed
            if chain_N is not None:
                fits = _in_turn(fits, chain_N[waiting])
            waiting = waiting[fits]
            taken = params_N[waiting].cumsum(0) <= allowed
            kept_N[waiting[taken]] = True
            allowed -= int(params_N[waiting[taken]].sum())
            waiting = waiting[~taken]
    return kept_N


def _in_turn(fits_W: torch.Tensor, chain_W: torch.Tensor) -> torch.Tensor:
    """Of what waits in order, what fits and stands in its chain behind nothing that does not."""
    place_W, number_W = torch.arange(len(fits_W)), chain_W + 1
    first = torch.full((int(number_W.max()) + 1,), len(fits_W))  # of each chain, what does not fit
    first.scatter_reduce_(0, number_W[~fits_W], place_W[~fits_W], "amin")
    return fits_W & ((chain_W < 0) | (place_W < first[number_W]))


def _tied(rank_N: torch.Tensor, limits: Budget) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of what each unit belongs to, shape (N,): itself, an expert, or a row (of its layer's experts: of all
    of them). −1 for units that cannot stay: those beyond the last width, and experts that go whole.

    And the number of the `Rows` it is in, −1 where it is in none.
    """
    owner_N, chain_N = torch.arange(len(rank_N)), torch.full((len(rank_N),), -1)
    for number, rows in enumerate(limits.rows):
        rank_EC = rank_N[rows.where].unflatten(0, (rows.experts or 1, -1))
        if rows.experts and limits.tie == "experts":
            first_E = owner_N[rows.where].unflatten(0, (rows.experts, -1))[:, :1]
            owner_N[rows.where] = first_E.expand_as(rank_EC).flatten()
            continue
        place_EC = rank_EC.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        row_EC = torch.searchsorted(torch.tensor(rows.widths), place_EC, right=True)
        stays_EC = (row_EC < len(rows.widths)) & ((rank_EC > 0).any(1, keepdim=True) | (not rows.can_go))
        owner_N[rows.where] = torch.where(stays_EC, rows.where.start + row_EC, -1).flatten()
        chain_N[rows.where] = number
    numbers, compact_N = owner_N.unique(return_inverse=True)
    return compact_N - int(numbers[0] < 0), chain_N


def ranked(score_N: torch.Tensor, kept_N: torch.Tensor) -> torch.Tensor:
    """Gates z that rank as the scores do, above 0 where kept and at most 0 elsewhere, shape (N,).

    Ranks, not differences to a threshold: scores span many orders of magnitude, and a plan for another sparsity needs
    the order of the removed units as well.
    """
    rank_N = torch.empty_like(score_N, dtype=torch.float32)
    order_N = score_N.argsort(descending=True, stable=True)
    rank_N[order_N] = torch.arange(len(score_N), 0, -1, device=score_N.device) / len(score_N)
    return torch.where(kept_N, rank_N, rank_N - 1.0)


def _equal_or_checked(
    groups: Sequence[Group], params: Mapping[str, int], sparsity: float, scope: str, tie: Tie | None, policy: Policy
) -> dict[str, int]:
    """Group name → units, where widths are equal by layer. Raises InputError where a policy cannot meet a budget."""
    if tie == "experts":
        _check_whole_experts(groups, scope, policy)
    if scope in ("layer", "expert"):
        return dict(_equal_widths(groups, params, sparsity, tie, policy))
    if not policy.free:
        _check_reach(groups, params, sparsity, scope, policy)
    return {}


def _check_whole_experts(groups: Sequence[Group], scope: str, policy: Policy) -> None:
    """Raises InputError where experts cannot go whole."""
    if any(g.experts and g.width not in permitted(g, policy) for g in groups):
        raise InputError(f"--shape {policy}: this method removes whole experts, and their width does not divide so")
    if scope == "expert":
        raise InputError("this method removes whole experts, so equal widths of all experts contradict it")
    if any(g.experts and g.shared for g in groups):
        raise InputError("this method removes whole experts, and those with biases give these without any channel, too")


def _check_reach(
    groups: Sequence[Group], params: Mapping[str, int], sparsity: float, scope: str, policy: Policy
) -> None:
    """Raises InputError where the widths of a policy cannot come within a row of a budget: the widest together leave
    too much of it, or the narrowest is already too wide."""
    for kind in dict.fromkeys(g.kind for g in groups) if scope == "kind" else [None]:
        within = [g for g in groups if kind in (None, g.kind)]
        each = {g.name: params[g.name] * (g.experts or 1) for g in within}
        least = min(each[g.name] * permitted(g, policy)[0] for g in within)
        most = sum(each[g.name] * permitted(g, policy)[-1] for g in within)
        total = sum(each[g.name] * g.width for g in within)
        room = floor((1.0 - sparsity) * total + 1e-6)
        if room < least:
            raise InputError(f"--sparsity {sparsity:g} leaves no room for any width that --shape {policy} permits")
        if room - most >= least:
            raise _unspent(policy, most / total, kind or "the units", sparsity)


def _unspent(policy: Policy, most: float, what: str, sparsity: float) -> InputError:
    """The error for a budget that a policy cannot spend."""
    return InputError(
        f"--shape {policy} permits no more than {most:.1%} of the parameters in {what}, and --sparsity {sparsity:g} "
        f"asks to keep more: use --sparsity {ceil(1000 * (1.0 - most) - 1e-9) / 1000:g} or above"
    )


def _equal_widths(
    groups: Sequence[Group], params: Mapping[str, int], sparsity: float, tie: Tie | None, policy: Policy
) -> Iterator[tuple[str, int]]:
    """Units to keep of each group, or of each of its experts, so that all groups of a kind are equally wide, within the
    budget. One kind takes up what rounding leaves of it: experts' channels, else channels, else heads.

    The width of shared experts that no key of the configuration says is a multiple of the routed experts' width.
    """
    kinds = dict.fromkeys(g.kind for g in groups)
    for kind in kinds:
        if len({(g.width, g.experts) for g in groups if g.kind == kind}) > 1:
            raise InputError(f"the layers differ in their number of {kind}, so equal widths are not possible")
    last = next((k for k in ("expert_channels", "channels") if k in kinds), [*kinds][-1])
    filler = next(g for g in groups if g.kind == last)
    tied = {g.kind: g.width / filler.width for g in groups if not g.sizes} if filler.experts else {}
    allowed = (1.0 - sparsity) * sum(g.units * params[g.name] for g in groups)
    kept: dict[str, int] = {}
    for g in groups:
        if g.kind != last and g.kind not in tied:
            near = round(g.width * (1.0 - sparsity))
            kept.setdefault(g.kind, min(permitted(g, policy), key=lambda width: abs(width - near)) if near else 0)
            allowed -= float(kept[g.kind] * params[g.name])
    a_unit: float = sum((g.experts or 1) * params[g.name] for g in groups if g.kind == last)
    a_unit += sum(tied[g.kind] * params[g.name] for g in groups if g.kind in tied)
    kept[last] = min(filler.width, floor(allowed / a_unit + 1e-9))
    if tie != "experts" or not filler.experts:
        kept[last] = max((w for w in permitted(filler, policy) if w <= kept[last]), default=0)
    unspent = allowed - kept[last] * a_unit
    kept |= {kind: round(kept[last] * multiple) for kind, multiple in tied.items()}
    if min(kept.values()) < 1:
        raise InputError(f"no equal widths remove {sparsity:.0%} of the units; use --shape ragged or lower --sparsity")
    if not policy.free and unspent >= permitted(filler, policy)[0] * a_unit:
        total = sum(g.units * params[g.name] for g in groups)
        raise _unspent(policy, (1.0 - sparsity) - unspent / total, "the units", sparsity)
    yield from ((g.name, kept[g.kind]) for g in groups)


@dataclass(frozen=True)
class Figures:
    """Exact sizes of a model, dense or pruned."""

    parameters: int
    """All parameters; tied ones once."""
    active_parameters: int
    """Those that a token meets: of a mixture's experts, as many as it is routed to. The same where there are none."""
    block_parameters: int
    """Parameters that belong to units: what a budget counts."""
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
        block_parameters=sum(sizes[g.name].units * unit_params(g, description.shapes) for g in groups),
        flops_per_token=round(2 * sum(counts[name] * share for name, share in multiplied.items())),
        kv_bytes_per_token=bytes_per_value * sum(shapes[name][0] for name in description.cached if name in shapes),
    )
