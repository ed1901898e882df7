"""Gates on, gates off: a context in which every gated module sees its input multiplied by its gates.

The model's own code and weights are never touched; leaving the context restores the dense model, which is its own
teacher (method.md section 3). Method §1: y = Σ_k m_k f_k(X).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from secateur.units import Group


def writer(model: nn.Module, group: Group) -> nn.Linear:
    """The linear map that reads the units' outputs, whose input is gated."""
    module = model.get_submodule(group.gate_at)
    assert isinstance(module, nn.Linear), f"{group.gate_at} is a {type(module).__name__}"
    return module


def _multiply_input(gate: torch.Tensor):  # type: ignore[no-untyped-def]
    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *rest = args
        return (x * gate.to(x.dtype), *rest)

    return hook


@contextmanager
def attached(model: nn.Module, groups: Iterable[Group], gates: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the context, unit k of group g is scaled by `gates[g.name][k]`; gates have shape (g.units,)."""
    handles = []
    try:
        for group in groups:
            module, gate = writer(model, group), gates[group.name]
            block = module.in_features // group.units
            gate = gate.repeat_interleave(block) if block > 1 else gate
            handles.append(module.register_forward_pre_hook(_multiply_input(gate)))
        yield
    finally:
        for handle in handles:
            handle.remove()
