"""Weights + plan → smaller weights, one tensor at a time, so that a model larger than memory twice over can be written.

The gate of a unit scales its block of the writer's input (attach); a linear map cannot tell that from scaled columns of
its own weight, so gates are folded in exactly and cost nothing. Method §1: y = Σ_k m_k f_k(X).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from secateur.attach import compensating_bias
from secateur.describe import Description
from secateur.plan import Plan
from secateur.units import Group, sliced_shapes, take


def sliced(
    tensors: Iterable[tuple[str, Tensor]], description: Description, plan: Plan, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The pruned checkpoint's tensors in the order of `tensors`, floating-point ones cast to `dtype` (None: kept).

    What a fully closed sublayer leaves over is dropped: empty tensors and the parameters all its units shared. Where
    the plan replaces removed units by their means, the writer's bias takes them up, one of its own or a new one.
    """
    cuts = {s.param: (group, s) for group in description.groups for s in group.slices}
    remaining = pruned_shapes(description, plan)
    dropped = description.shapes.keys() - remaining.keys()
    added = {f"{g.gate_at}.weight": g for g in compensated(description, plan)}
    norms = {f"{g.after}.{own}": (g, own) for g in description.groups if g.is_sublayer and g.after
             for own in ("weight", "bias")}  # fmt: skip
    biases: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name in added:
            group, bias = added[name], f"{added[name].gate_at}.bias"
            assert plan.means is not None
            biases[bias] = compensating_bias(tensor, plan.means[group.name], plan.gates([group])[group.name])
            if bias not in description.shapes:
                yield bias, biases[bias].to(dtype or tensor.dtype)
        elif name in biases:
            tensor = (tensor.float() + biases[name]).to(dtype or tensor.dtype)
        if name in dropped:
            continue
        if name in norms:
            group, own = norms[name]
            tensor = fold_norm(tensor, group, own, plan.gates([group])[group.name], dtype)
        if name in cuts:
            group, s = cuts[name]
            tensor = take(tensor, s, group, plan.kept[group.name], plan.policy)
            if name == group.writer:
                tensor = fold(tensor, group, plan.stored_scales(group), dtype)
            assert tuple(tensor.shape) == remaining[name], f"{name}: {tuple(tensor.shape)} is not {remaining[name]}"
        buffer = name not in description.shapes  # keeps its dtype: routers' biases are float32 in bfloat16 models, too
        yield name, tensor if dtype is None or buffer or not tensor.is_floating_point() else tensor.to(dtype)


def pruned_shapes(description: Description, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that the pruned checkpoint holds."""
    shapes = sliced_shapes(description.groups, plan.sizes(description.groups), description.shapes) | added_biases(
        description, plan
    )
    return {name: shape for name, shape in shapes.items() if 0 not in shape}


def compensated(description: Description, plan: Plan) -> list[Group]:
    """Groups whose removed units are replaced by their means."""
    gates = plan.gates(description.groups)
    return [g for g in description.groups if plan.means is not None and (gates[g.name] == 0).any()]


def added_biases(description: Description, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Biases that writers have in the pruned model only, with their shapes."""
    names = {f"{g.gate_at}.bias": description.shapes[f"{g.gate_at}.weight"] for g in compensated(description, plan)}
    return {name: shape[:1] for name, shape in names.items() if name not in description.shapes}


def fold(weight: Tensor, group: Group, scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The writer's weight with the columns of unit k times its gate: multiplied in float32, rounded once.

    `scale` has shape (units,), or (experts, units of each) for fused experts.
    """
    dim = group.writer_slice.dim
    columns = scale.to(weight.device, torch.float32).repeat_interleave(weight.shape[dim] // scale.shape[-1], dim=-1)
    if weight.ndim == 3:
        columns = columns.unsqueeze(3 - dim)
    return (weight.float() * columns).to(dtype or weight.dtype)


def fold_norm(weight: Tensor, group: Group, own: str, gate: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The `own` weight or bias of the norm behind which a sublayer's gate acts, so that this scales its output."""
    offset = group.offset if own == "weight" else 0.0
    scaled = (weight.float() + offset) * gate.to(weight.device, torch.float32) - offset
    return scaled.to(dtype or weight.dtype)
