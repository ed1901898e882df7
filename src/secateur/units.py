"""What can be removed from a model, as pure index arithmetic on its weights.

A `Group` is one sublayer's row of interchangeable units (heads, KV groups or channels); its `Slice`s say where each
unit lives in the weights. These two records carry all that the rest of Secateur knows of an architecture: `describe`
writes them, everything downstream only reads them. Source: method.md section 1 (the paper: arXiv 2603.08065).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

Shapes = Mapping[str, tuple[int, ...]]
"""Parameter name → shape, as the unpruned checkpoint has them."""


@dataclass(frozen=True)
class Slice:
    """Where the units of a group lie in one parameter: `dim` is laid out as (copies, units, block)."""

    param: str
    dim: int
    copies: int = 1


@dataclass(frozen=True)
class Group:
    """One sublayer's units. Closing unit k zeroes block k of the input of the module `gate_at`."""

    name: str
    """Unique, stable name: `layers.3.channels`."""
    layer: int
    kind: str
    """`heads`, `kv_groups` or `channels`."""
    units: int
    gate_at: str
    """The linear map that reads the units' outputs (o_proj, down_proj)."""
    slices: tuple[Slice, ...]
    sizes: tuple[tuple[str, int], ...]
    """Config key → its increment for each unit kept, e.g. (("num_attention_heads", 3), ("num_key_value_heads", 1))."""
    shared: tuple[str, ...] = ()
    """Parameters of the sublayer that serve all units: kept while one unit is, dropped with the last one."""


def unit_params(group: Group, shapes: Shapes) -> int:
    """Number of parameters that removing one unit of `group` removes."""
    return sum(prod(shapes[s.param]) for s in group.slices) // group.units


def block_size(shape: tuple[int, ...], s: Slice, units: int) -> int:
    """Number of consecutive entries a unit along `s.dim`; asserts that the dimension divides."""
    block, rest = divmod(shape[s.dim], s.copies * units)
    assert rest == 0, f"{s.param}: {shape[s.dim]} entries do not divide into {s.copies} × {units} units"
    return block


def take(weight: torch.Tensor, s: Slice, units: int, kept: torch.Tensor) -> torch.Tensor:
    """The rows or columns of `weight` that belong to the units `kept` (sorted indices, shape (kept,))."""
    block = block_size(tuple(weight.shape), s, units)
    split = weight.unflatten(s.dim, (s.copies, units, block))
    return split.index_select(s.dim + 1, kept.to(weight.device)).flatten(s.dim, s.dim + 2).contiguous()


def sliced_shapes(groups: Iterable[Group], kept: Mapping[str, int], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes after keeping `kept[group.name]` units of every group; parameters of closed sublayers are absent."""
    result = dict(shapes)
    for group in groups:
        count = kept[group.name]
        for s in group.slices:
            shape = list(result[s.param])
            shape[s.dim] = shape[s.dim] // group.units * count
            result[s.param] = tuple(shape)
        if count == 0:
            for name in group.shared:
                del result[name]
    return result
