"""Equal widths that `--sparsity` leaves, and whether a shape can meet it, with one line that says why not.

What `--budget` leaves is in costs.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil, floor

from secateur.files import InputError
from secateur.policy import Policy, permitted
from secateur.recipes import Tie
from secateur.units import Group


def equal_or_checked(
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
        each = {g.name: params[g.name] * g.parts for g in within}
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
        if len({(g.width, g.parts) for g in groups if g.kind == kind}) > 1:
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
            allowed -= float(kept[g.kind] * g.parts * params[g.name])
    a_unit: float = sum(g.parts * params[g.name] for g in groups if g.kind == last)
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
