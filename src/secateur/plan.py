"""Learned gates → the plan of what to keep: indices and scales, and the policy that rounds gates to the budget.

Serves `secateur plan RUN`, which writes RUN/plan.json. The kept set is the largest that fits the budget, by falling z.
Where a run arrives at its budget by itself, that set is the set of open gates and the policy has nothing to decide.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from secateur.budget import Budget, largest_that_fits
from secateur.files import InputError, read_json, write_json
from secateur.gates import Gates, by_group
from secateur.policy import Policy, permitted, policy_of
from secateur.report import files
from secateur.units import Group, Packed, Size, packed

PLAN_FORMAT = 1

COSTLY = 0.02
"""Rise of the held-out loss, nats a token, above which rounding to the budget is worth a warning."""


@dataclass(frozen=True)
class Plan:
    """What is kept of every group, and the gate value folded into it."""

    kept: Mapping[str, torch.Tensor]
    """Group name → sorted indices of the units kept, int64, shape (kept,)."""
    scales: Mapping[str, torch.Tensor]
    """Group name → their gate values, float32, shape (kept,)."""
    shape: str = "ragged"
    """`ragged` (widths differ by layer), `uniform` (the same in every layer), `padded` (by expert, too), or the widths
    that policy.py knows."""
    means: Mapping[str, torch.Tensor] | None = None
    """Group name → mean inputs of its writer, by which removed units are replaced; they stay in gates.safetensors."""

    @property
    def policy(self) -> Policy:
        """The shape, read."""
        return policy_of(self.shape)

    @property
    def digest(self) -> str:
        """What tells it from other plans: of its shape, what is kept, and the values."""
        found = hashlib.sha256(self.shape.encode())
        for name in sorted(self.kept):
            found.update(f"{name} {self.kept[name].tolist()} {self.scales[name].tolist()}".encode())
        return found.hexdigest()[:16]

    def pack(self, group: Group) -> Packed:
        """How the channels of a group of experts are stored."""
        return packed(group, self.kept[group.name], self.policy)

    def stored_scales(self, group: Group) -> torch.Tensor:
        """Gate values as the units are stored: shape (kept,), or (experts, width), 0 where a channel only fills up."""
        if group.keys:  # the gate of a KV head multiplies what its query heads give, too
            keys_K = torch.zeros(group.kv_heads).index_copy(0, self.kept[group.keys], self.scales[group.keys])
            scales = self.scales[group.name] * keys_K[self.kept[group.name] // group.width]
            return scales * self.scales[group.depth] if group.depth and not group.after else scales
        if group.is_sublayer and group.after:
            return torch.ones(len(self.kept[group.name]))
        if group.depth and not group.after:
            return self.scales[group.name] * self.scales[group.depth]
        if not group.experts:
            return self.scales[group.name]
        pack, gate_N = self.pack(group), self.gates([group])[group.name]
        return group.by_expert(gate_N)[pack.experts].gather(1, pack.channels_EW)

    def sizes(self, groups: Iterable[Group]) -> dict[str, Size]:
        """Group name → how much of it is stored."""
        sizes = {}
        for g in groups:
            kept = self.kept[g.name]
            if g.experts:
                sizes[g.name] = Size(*reversed(self.pack(g).channels_EW.shape))
            elif g.kv_heads:
                parts = len((kept // g.width).unique()) if g.keys else g.kv_heads
                sizes[g.name] = Size(len(kept) // max(1, parts), parts)
            else:
                sizes[g.name] = Size(len(kept))
        return sizes

    def stored(self, groups: Sequence[Group]) -> list[int]:
        """Units of each group that are stored."""
        sizes = self.sizes(groups)
        return [sizes[g.name].units for g in groups]

    def check_heads(self, groups: Sequence[Group]) -> None:
        """Raises InputError where KV heads have different numbers of query heads, or some that are not there."""
        for g in (g for g in groups if g.kv_heads):
            counts_K = torch.bincount(self.kept[g.name] // g.width, minlength=g.kv_heads)
            there = self.kept[g.keys].tolist() if g.keys else list(range(g.kv_heads))
            uneven = len(counts_K[there].unique()) > 1
            if uneven or (g.keys and counts_K.nonzero().flatten().tolist() != there):
                raise InputError(f"{g.name} keeps {counts_K.tolist()} query heads of its KV heads, not as many of each")

    def gates(self, groups: Iterable[Group]) -> dict[str, torch.Tensor]:
        """Group name → gate of every unit, shape (units,): the scale where kept, 0 where removed."""
        return {g.name: torch.zeros(g.units).index_copy(0, self.kept[g.name], self.scales[g.name]) for g in groups}


@dataclass(frozen=True)
class Rounding:
    """What it took to meet the budget exactly. Shares are of all parameters that belong to units."""

    allowed: float
    """Share that the budget lets stay; where budgets count otherwise, the share kept."""
    open_gates: float
    """Share whose gates were open as learned."""
    kept: float
    """Share that the plan keeps."""
    closed: int
    """Units with an open gate that had to go."""
    reopened: int
    """Units with a closed gate for which there was room."""
    reopened_scale: float
    """Gate value that reopened units got: whichever of 1 and 0 has the lower held-out loss; 1 where that was not
    measured."""
    held_out_learned: float | None
    """Loss on held-out text with the gates as learned, nats a token; None where the model was not loaded."""
    held_out_planned: float | None
    """The same with the plan."""
    budgets: tuple[dict[str, Any], ...] = ()
    """Of each `--budget` its words, what it bounds, the bound, and what the unpruned and the planned model have."""

    @property
    def cost(self) -> float | None:
        """Rise of the held-out loss through rounding: the train–test mismatch, nats a token."""
        if self.held_out_planned is None or self.held_out_learned is None:
            return None
        return self.held_out_planned - self.held_out_learned


def make_plan(
    gates: Gates,
    limits: Budget,
    shape: str,
    held_out_loss: Callable[[Mapping[str, torch.Tensor]], float] | None,
    kept_N: torch.Tensor | None = None,
) -> tuple[Plan, Rounding]:
    """The plan and what rounding did. `held_out_loss` maps gate values by group to a loss in nats a token, None: it is
    not measured, and what opens again is whole; `kept_N` is the kept set, None: the largest that fits, by z."""
    z_N, value_N = gates.z_N.cpu(), gates.deployed().cpu()
    open_N = limits.open(z_N > 0)
    kept_N = largest_that_fits(z_N, limits) if kept_N is None else kept_N
    reopened_N = kept_N & ~open_N

    def loss(gate_N: torch.Tensor) -> float | None:
        return None if held_out_loss is None else held_out_loss(by_group(gate_N, gates.groups))

    learned = loss(value_N)
    scale_N, scale, planned = value_N * kept_N, 0.0, learned
    if not torch.equal(kept_N, open_N):
        planned = loss(scale_N)
    if reopened_N.any():
        whole_N = scale_N + reopened_N
        reopened = loss(whole_N)
        if reopened is None or planned is None or reopened < planned:
            scale_N, scale, planned = whole_N, 1.0, reopened
    masks, values = by_group(kept_N, gates.groups), by_group(scale_N, gates.groups)
    kept = {name: mask.nonzero().flatten() for name, mask in masks.items()}
    plan = Plan(kept, {name: values[name][index] for name, index in kept.items()}, shape, gates.means)
    kept_share = limits.share_of(kept_N)
    allowed = kept_share if limits.bounds else float(limits.allowed_C.sum() / limits.params_N.sum())
    rounding = Rounding(
        allowed, limits.share_of(open_N), kept_share, int((open_N & ~kept_N).sum()),
        int(reopened_N.sum()), scale, learned, planned,
    )  # fmt: skip
    return plan, rounding


def save_plan(path: Path, plan: Plan, rounding: Rounding, architecture: str) -> None:
    """Writes plan.json: the report first, then kept indices and scales (nine digits, so that float32 is exact)."""
    values: dict[str, Any] = {
        "format": PLAN_FORMAT,
        "architecture": architecture,
        "shape": plan.shape,
        "rounding": asdict(rounding),
        "widths": {name: len(index) for name, index in plan.kept.items()},
        "kept": {name: index.tolist() for name, index in plan.kept.items()},
        "scales": {name: [float(f"{v:.9g}") for v in scale.tolist()] for name, scale in plan.scales.items()},
    }
    write_json(path, values)


def load_plan(path: Path, groups: Sequence[Group], architecture: str) -> tuple[Plan, Rounding]:
    """Reads and validates plan.json. Raises InputError when it is broken or made for another architecture."""
    values = read_json(path, "secateur plan RUN")
    if not isinstance(values, dict) or values.get("format") != PLAN_FORMAT:
        raise InputError(f"{path} is not a plan of format {PLAN_FORMAT}; run `secateur plan RUN` again")
    if values.get("architecture") != architecture:
        raise InputError(f"{path} is a plan for another architecture; run `secateur plan RUN` again")
    try:
        TypeAdapter(files.Plan).validate_python(values, strict=True)
        kept = {g.name: torch.tensor(values["kept"][g.name], dtype=torch.int64) for g in groups}
        scales = {g.name: torch.tensor(values["scales"][g.name], dtype=torch.float32) for g in groups}
        rounding = TypeAdapter(Rounding).validate_python(values["rounding"])
        shape = str(policy_of(str(values["shape"])))
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError) as error:
        reason = files.first_fault(error) if isinstance(error, ValidationError) else repr(error)
        raise InputError(f"{path} is not a valid plan ({reason}); run `secateur plan RUN` again") from None
    for g in groups:
        index = kept[g.name]
        in_order = index.ndim == 1 and bool((index.diff() > 0).all())
        if not (scales[g.name].isfinite() & (scales[g.name] >= 0)).all():
            raise InputError(f"{path}: {g.name} has scales that are negative or not finite; plan again")
        in_range = in_order and (not len(index) or 0 <= index[0] <= index[-1] < g.units)
        if not in_range or index.shape != scales[g.name].shape:
            raise InputError(f"{path}: {g.name} does not list units of 0 to {g.units - 1} in order; plan again")
    plan = Plan(kept, scales, shape)
    try:
        plan.check_heads(groups)
    except InputError as error:
        raise InputError(f"{path}: {error}; plan again") from None
    for g in (g for g in groups if g.depth):
        if len(kept[g.name]) and not len(kept[g.depth]):
            raise InputError(f"{path}: {g.name} keeps units, and its sublayer {g.depth} is closed; plan again")
    for g, size in zip(groups, plan.sizes(groups).values(), strict=True):
        if size.width and size.width not in permitted(g, plan.policy):
            raise InputError(f"{path}: {g.name} is {size.width} units wide, which {shape} does not permit; plan again")
    return plan, rounding
