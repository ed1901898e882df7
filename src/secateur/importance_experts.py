"""Baselines for mixtures of experts: scores of whole experts, or of their channels, from one pass over text.

A score of an expert is that of all its channels, and `config.tie_of` lets these stay or go together. The papers score
experts and nothing else, so these methods want `--units expert_channels`, the default for mixtures.

Shape suffixes: E experts, C channels of an expert, T tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.experts import Inside, inside_experts
from secateur.units import Group


@dataclass
class Usage:
    """What was seen of the experts of a layer: sums over the tokens routed to each."""

    tokens_E: torch.Tensor
    """Number of tokens."""
    output_E: torch.Tensor
    """Σ π ‖f_e(x)‖₂, where it was asked for."""
    squares_EC: torch.Tensor
    """Σ (π x_j)², x_j what channel j gives to the down projection."""


def down_projection(module: Any, e: int) -> torch.Tensor:
    """Down projection of an expert, shape (H, C)."""
    weight: torch.Tensor = module.down_proj[e].detach().float()
    return weight.T if module.is_transposed else weight


def column_norms(model: nn.Module, group: Group, p: int) -> torch.Tensor:
    """p-norm of every channel's column of the down projection, shape (E, C)."""
    module = model.get_submodule(group.gate_at)
    return torch.stack([down_projection(module, e).norm(p=p, dim=0) for e in range(group.experts)])


@torch.no_grad()
def read(model: Any, ids_NT: torch.Tensor, on_row: Callable[[int], None] = lambda _: None) -> None:
    """One forward pass a row, without logits, for hooks and the like to listen to."""
    for row, ids_T in enumerate(ids_NT, start=1):
        model.base_model(ids_T[None], use_cache=False)
        on_row(row)


@contextmanager
def watching_experts(model: nn.Module, groups: tuple[Group, ...], outputs: bool = False) -> Iterator[dict[str, Usage]]:
    """Usage by name of the groups that have experts, summed over what the model reads within the context.

    `outputs`: what the experts give, too, which costs a down projection more of each.
    """
    found: dict[str, Usage] = {}
    calls = {}
    for g in (g for g in groups if g.experts):
        module: Any = model.get_submodule(g.gate_at)
        zeros_E = torch.zeros(g.experts, device=module.down_proj.device)
        found[g.name] = Usage(zeros_E, zeros_E.clone(), zeros_E[:, None].repeat(1, g.width))
        calls[g.gate_at] = _listening(module, found[g.name], outputs)
    with inside_experts(model, calls):
        yield found


def _listening(module: Any, usage: Usage, outputs: bool) -> Inside:
    def inside(e: int, x_TC: torch.Tensor, routing_T1: torch.Tensor) -> torch.Tensor:
        x, routing = x_TC.float(), routing_T1.float()
        usage.tokens_E[e] += len(x)
        if outputs:
            output_TH = x @ down_projection(module, e).T
            usage.output_E[e] += (routing[:, 0] * output_TH.norm(dim=1)).sum()
        usage.squares_EC[e] += (routing * x).square().sum(0)
        return x_TC

    return inside


# --- the scores ------------------------------------------------------------------------------------------------------


def frequency(usage: Usage, _model: nn.Module, group: Group) -> torch.Tensor:
    """How many tokens were sent to an expert, for all its channels alike; shape (E, C)."""
    return usage.tokens_E[:, None].expand(-1, group.width)


def reap(usage: Usage, _model: nn.Module, group: Group) -> torch.Tensor:
    """REAP (Lasby et al. 2025, arXiv 2510.13999): the mean of π ‖f_e(x)‖₂ over the tokens sent to an expert, for all
    its channels alike; shape (E, C)."""
    return (usage.output_E / usage.tokens_E.clamp(min=1))[:, None].expand(-1, group.width)


def camera(usage: Usage, model: nn.Module, group: Group) -> torch.Tensor:
    """CAMERA-P (Xu et al. 2026, arXiv 2508.02322): the energy ‖v_j‖₂² Σ (π x_j)² of a micro-expert, one channel with
    its column v_j of the down projection; shape (E, C). The paper may mix the largest (π x_j)² in; this is without."""
    return usage.squares_EC * column_norms(model, group, 2).square()


EXPERT_SCORES: dict[str, Callable[[Usage, nn.Module, Group], torch.Tensor]] = {
    "frequency": frequency,
    "reap": reap,
    "camera": camera,
}
"""`--method` → its score of every channel of a layer's experts."""
