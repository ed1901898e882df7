"""Weights + plan → smaller weights, one tensor at a time, so that a model larger than memory twice over can be written.

The gate of a unit scales its block of the writer's input (attach); a linear map cannot tell that from scaled columns of
its own weight, so gates are folded in exactly and cost nothing. Method §1: y = Σ_k m_k f_k(X).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from secateur.describe import Description
from secateur.plan import Plan
from secateur.units import sliced_shapes, take


def sliced(
    tensors: Iterable[tuple[str, Tensor]], description: Description, plan: Plan, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The pruned checkpoint's tensors in the order of `tensors`, floating-point ones cast to `dtype` (None: kept).

    What a fully closed sublayer leaves over is dropped: empty tensors and the parameters all its units shared.
    """
    cuts = {s.param: (group, s) for group in description.groups for s in group.slices}
    remaining = pruned_shapes(description, plan)
    dropped = description.shapes.keys() - remaining.keys()
    for name, tensor in tensors:
        if name in dropped:
            continue
        if name in cuts:
            group, s = cuts[name]
            tensor = take(tensor, s, group.units, plan.kept[group.name])
            if name == f"{group.gate_at}.weight":
                tensor = _folded(tensor, plan.scales[group.name], dtype)
            assert tuple(tensor.shape) == remaining[name], f"{name}: {tuple(tensor.shape)} is not {remaining[name]}"
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def pruned_shapes(description: Description, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that the pruned checkpoint holds."""
    shapes = sliced_shapes(description.groups, plan.counts(), description.shapes)
    return {name: shape for name, shape in shapes.items() if 0 not in shape}


def _folded(weight_OI: Tensor, scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The writer's weight with the columns of unit k times its gate: multiplied in float32, rounded once."""
    block = weight_OI.shape[1] // len(scale)
    columns_I = scale.to(weight_OI.device, torch.float32).repeat_interleave(block)
    return (weight_OI.float() * columns_I).to(dtype or weight_OI.dtype)
