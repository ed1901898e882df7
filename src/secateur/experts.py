"""Fused experts with a gate on every channel: an experts function registered with transformers, no model code edited.

Method section 1: Σ_e π_e(X) Σ_j m_{e,j} f_{e,j}(X), with m ∈ R^{E×C} a layer. The layout of the weights is read off the
attributes that transformers gives to every class of fused experts (integrations/moe.py), not off names of models.

Shape suffixes: R routed tokens, H hidden size, K experts a token, E experts, C channels of an expert.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "secateur_gated"
"""Name of the experts function in transformers' registry."""

Inside = Callable[[int, Tensor, Tensor], Tensor]
"""(expert, what its channels give, routing weights) → the same, perhaps scaled; shapes (tokens, C) and (tokens, 1)."""


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds fused experts in a layout that `forward` understands."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return {"down_proj"} < names and all(hasattr(module, a) for a in ("has_gate", "has_bias", "is_transposed"))


def reader(module: Any) -> str:
    """Name of the parameter that reads the hidden state."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def forward(module: Any, hidden_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
    """What the experts give, one after the other; experts that no token was sent to do not enter the graph, and what is
    sent to an index past the last one is passed over, as expert parallelism has it.

    Memory: beside the weights, the activations of one expert at a time, plus what the backward pass needs of all.
    """
    inside: Inside | None = getattr(module, "_secateur_inside", None)
    up = reader(module)
    # Unbound once: indexing would make the backward pass of trained weights write all experts for each of them.
    read, write = getattr(module, up).unbind(), module.down_proj.unbind()
    result_RH = torch.zeros_like(hidden_RH)
    for e in index_RK[index_RK < len(read)].unique().tolist():
        token, slot = (index_RK == e).nonzero(as_tuple=True)
        x = _linear(module, hidden_RH[token], read[e], f"{up}_bias", e)
        x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        routing = weight_RK[token, slot, None]
        if inside is not None:
            x = inside(e, x, routing)
        y = _linear(module, x, write[e], "down_proj_bias", e) * routing
        result_RH = result_RH.index_add(0, token, y.to(result_RH.dtype))
    return result_RH


def _linear(module: Any, x: Tensor, weight: Tensor, bias: str, e: int) -> Tensor:
    return F.linear(
        x, weight.T if module.is_transposed else weight, getattr(module, bias)[e] if module.has_bias else None
    )


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


@contextmanager
def inside_experts(model: nn.Module, calls: Mapping[str, Inside]) -> Iterator[None]:
    """Within the context, each experts module named in `calls` passes what its channels give through the call."""
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in calls}
    configs: list[Any] = list({id(m.config): m.config for m in modules.values()}.values())
    before = [config._experts_implementation for config in configs]
    try:
        for name, module in modules.items():
            module._secateur_inside = calls[name]
        for config in configs:
            config._experts_implementation = IMPLEMENTATION
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("_secateur_inside", None)
        for config, implementation in zip(configs, before, strict=True):
            config._experts_implementation = implementation
