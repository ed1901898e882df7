"""What can be removed from a model, as pure index arithmetic on its weights.

A `Group` is one sublayer's row of interchangeable units (heads, KV groups, channels, experts' channels); its `Slice`s
say where each unit lives in the weights. These two records carry all that the rest of Secateur knows of an
architecture: `describe` writes them, everything downstream only reads them. Source: method.md section 1 (the paper:
arXiv 2603.08065).

Shape suffixes: E experts, W stored width of an expert.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.policy import RAGGED, Policy, permitted

Shapes = Mapping[str, tuple[int, ...]]
"""Parameter name → shape, as the unpruned checkpoint has them."""


@dataclass(frozen=True)
class Slice:
    """Where the units of a group lie in one parameter: `dim` is laid out as (copies, units, block).

    In fused tensors of experts dimension 0 is the expert, and `dim` is laid out so for each of them.
    """

    param: str
    dim: int
    copies: int = 1


@dataclass(frozen=True)
class Group:
    """One sublayer's units. Closing unit k zeroes block k of what the writer reads."""

    name: str
    """Unique, stable name: `layers.3.channels`."""
    layer: int
    kind: str
    """`heads`, `kv_groups`, `channels` (of an MLP), `shared_channels` (of shared experts) or `expert_channels`; or one
    of `SUBLAYERS`: one unit, all of an attention or MLP module (`--depth`)."""
    units: int
    gate_at: str
    """The linear map that reads the units' outputs (o_proj, down_proj), or the module that holds fused experts."""
    slices: tuple[Slice, ...]
    sizes: tuple[tuple[str, int], ...]
    """Config key → its increment for each unit stored, e.g. (("num_attention_heads", 3), ("num_key_value_heads", 1)).
    Of experts: for each unit of an expert. Empty where the configuration has no key of its own for the width."""
    shared: tuple[str, ...] = ()
    """Parameters of the sublayer that serve all units: kept while one unit is, dropped with the last one. Of experts:
    biases of their outputs, which they give without any channel, too, so that no expert can go."""
    experts: int = 0
    """Experts among which the units are divided evenly, one expert's after the other's; 0: there are none."""
    kv_heads: int = 0
    """KV heads among which query heads are divided so; kernels want as many of each. 0: these units are not divided."""
    keys: str = ""
    """Of query heads: the name of the group of their KV heads, if these can go, too (`--attention-unit nested`). It has
    no columns of the writer; a KV head stays exactly while one of its query heads does."""
    depth: str = ""
    """Name of the group that is the sublayer's own gate, if it has one beside its units' (`--depth joint`). That group
    has no slices: it stays exactly while one of the units does, each of which is multiplied by both gates."""
    after: str = ""
    """The norm that reads the sublayer's output, behind which the sublayer's own gate acts: before a norm a factor does
    nothing. Empty where there is none: the gate acts where the units' do."""
    offset: float = 0.0
    """What that norm adds to its weight before it multiplies by it (Gemma's 1)."""

    @property
    def is_sublayer(self) -> bool:
        """Whether the one unit is a whole sublayer."""
        return self.kind in SUBLAYERS

    @property
    def gate_only(self) -> bool:
        """Whether this is the gate of a sublayer beside those of its units, which hold all of it."""
        return self.is_sublayer and not self.slices

    @property
    def parts(self) -> int:
        """Experts, or KV heads, of which each has the same number of units; else 1."""
        return self.experts or self.kv_heads or 1

    @property
    def width(self) -> int:
        """Units of the group, or of each of its parts."""
        return self.units // self.parts

    @property
    def writer(self) -> str:
        """The parameter whose columns read the units' outputs, into which gates are folded."""
        return f"{self.gate_at}.down_proj" if self.experts else f"{self.gate_at}.weight"

    @property
    def writes(self) -> bool:
        """Whether the writer's columns are cut with these units. Of nested KV heads they are with their query heads."""
        return any(s.param == self.writer for s in self.slices)

    @property
    def writer_slice(self) -> Slice:
        """Where the units lie in the writer."""
        return next(s for s in self.slices if s.param == self.writer)

    def by_part(self, values: Tensor) -> Tensor:
        """Values of shape (units,) as (parts, units of each)."""
        return values.unflatten(0, (self.parts, self.width))

    def by_expert(self, values: Tensor) -> Tensor:
        """Values of shape (units,) as (experts, units of each), or as they are where there are no experts."""
        return values.unflatten(0, (self.experts, self.width)) if self.experts else values

    @property
    def attends(self) -> bool:
        """Whether the units are heads, or groups of them."""
        return self.kind in ("heads", "kv_groups", "attention")


SUBLAYERS = ("attention", "mlp")
"""Kinds whose one unit is a whole sublayer."""


def by_writer(groups: Iterable[Group], gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Group name → what its units' outputs are multiplied by, of groups that write: those of nested query heads by the
    gates of their KV heads, too, and all by the gate of their sublayer, unless that acts behind a norm (`by_norm`)."""

    def gate(g: Group) -> Tensor:
        gate = gates[g.name] * gates[g.keys].repeat_interleave(g.width) if g.keys else gates[g.name]
        return gate * gates[g.depth] if g.depth and not g.after else gate

    return {g.name: gate(g) for g in groups if g.writes and not (g.is_sublayer and g.after)}


def by_norm(groups: Iterable[Group], gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Norm → what its output is multiplied by, of the sublayers' own gates that act behind one."""
    return {g.after: gates[g.name] for g in groups if g.is_sublayer and g.after}


class Size(NamedTuple):
    """How much of a group is stored."""

    width: int
    """Units, or units of each part."""
    parts: int = 1
    """Experts, or KV heads that still have query heads; else 1."""

    @property
    def units(self) -> int:
        """Units in all, those included that only fill an expert up to the common width."""
        return self.width * self.parts


def whole(group: Group) -> Size:
    """The unpruned size."""
    return Size(group.width, group.parts)


def said_by_config(group: Group, size: Size) -> dict[str, int]:
    """Config key → its value where so much of a group is stored."""
    count = size.width if group.experts else size.units
    return {key: count * per_unit for key, per_unit in group.sizes}


def unit_params(group: Group, shapes: Shapes) -> int:
    """Number of parameters that removing one unit of `group` removes."""
    return sum(prod(shapes[s.param]) for s in group.slices) // group.units


def block_size(shape: tuple[int, ...], s: Slice, units: int) -> int:
    """Number of consecutive entries a unit along `s.dim`; asserts that the dimension divides."""
    block, rest = divmod(shape[s.dim], s.copies * units)
    assert rest == 0, f"{s.param}: {shape[s.dim]} entries do not divide into {s.copies} × {units} units"
    return block


def take(weight: Tensor, s: Slice, group: Group, kept: Tensor, policy: Policy = RAGGED) -> Tensor:
    """The rows or columns of `weight` that belong to the units `kept` (sorted indices, shape (kept,)).

    Of experts: those that `packed` lays out, for a shape policy.
    """
    if not group.experts:
        return _take(weight, s, group.units, kept)
    one = Slice(s.param, s.dim - 1, s.copies)
    pack = packed(group, kept, policy)
    experts = zip(pack.experts.tolist(), pack.channels_EW, strict=True)
    return torch.stack([_take(weight[e], one, group.width, channels_W) for e, channels_W in experts])


def _take(weight: Tensor, s: Slice, units: int, kept: Tensor) -> Tensor:
    block = block_size(tuple(weight.shape), s, units)
    split = weight.unflatten(s.dim, (s.copies, units, block))
    return split.index_select(s.dim + 1, kept.to(weight.device)).flatten(s.dim, s.dim + 2).contiguous()


class Packed(NamedTuple):
    """How kept channels of experts lie in fused tensors, which have one width for all experts."""

    experts: Tensor
    """The experts stored, sorted, shape (E,)."""
    channels_EW: Tensor
    """Their channels, each row sorted but for what fills it up: channels that are not kept, at its end."""
    filled_EW: Tensor
    """Which of these are kept."""


FEWEST_EXPERTS = 2
"""A mixture with one expert is not read back by transformers 5."""


def packed(group: Group, kept: Tensor, policy: Policy = RAGGED) -> Packed:
    """The layout of `kept` (sorted indices over all experts): experts without a unit are left out, if they have no
    biases, and the others are as wide as the widest of them, rounded up to what the shape policy permits."""
    assert group.experts, f"{group.name} has no experts"
    open_EC = torch.zeros(group.units, dtype=torch.bool, device="cpu")
    open_EC[kept.cpu()] = True
    open_EC = group.by_expert(open_EC)
    counts_E = open_EC.sum(1)
    experts = torch.arange(group.experts)
    if not group.shared:
        order_E = counts_E.bool().logical_not().byte().argsort(stable=True)
        experts = order_E[: max(FEWEST_EXPERTS, int(counts_E.count_nonzero()))].sort().values
    open_EC = open_EC[experts]
    order_EC = open_EC.logical_not().byte().argsort(dim=1, stable=True)  # the open ones first, both in order
    channels_EW = order_EC[:, : aligned(group, int(counts_E.max()), policy)]
    return Packed(experts, channels_EW, open_EC.gather(1, channels_EW))


def aligned(group: Group, width: int, policy: Policy = RAGGED) -> int:
    """The least width of experts that can be stored and is not below `width`."""
    return next((w for w in permitted(group, policy) if w >= width), group.width)


def sliced_shapes(groups: Iterable[Group], sizes: Mapping[str, Size], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes after keeping `sizes[group.name]` of every group; parameters of closed sublayers are absent."""
    result = dict(shapes)
    for group in groups:
        size = sizes[group.name]
        for s in group.slices:
            shape = list(result[s.param])
            if group.experts:
                shape[s.dim] = shape[s.dim] // group.width * size.width
                shape[0] = size.parts
            else:
                shape[s.dim] = shape[s.dim] // group.units * size.units
            result[s.param] = tuple(shape)
        if size.units == 0:
            for name in group.shared:
                del result[name]
    return result
