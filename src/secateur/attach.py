"""Gates on, gates off: a context in which every gated module sees its input multiplied by its gates.

The model's own code and weights are never touched; leaving the context restores the dense model, which is its own
teacher (method.md section 3). Method §1: y = Σ_k m_k f_k(X).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from secateur.experts import Inside, inside_experts
from secateur.files import InputError
from secateur.offloaded import weight_of
from secateur.units import Group, by_norm, by_writer


def writer(model: nn.Module, group: Group) -> nn.Linear:
    """The linear map that reads the units' outputs, whose input is gated."""
    module = model.get_submodule(group.gate_at)
    assert isinstance(module, nn.Linear), f"{group.gate_at} is a {type(module).__name__}"
    return module


def _multiply_input(gate: torch.Tensor):  # type: ignore[no-untyped-def]
    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *rest = args
        return (x * gate.to(x), *rest)

    return hook


def _multiply_output(gate: torch.Tensor):  # type: ignore[no-untyped-def]
    def hook(_module: nn.Module, _args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output * gate.to(output)

    return hook


def _multiply_channels(gate_EC: torch.Tensor) -> Inside:
    def inside(expert: int, x: torch.Tensor, _routing: torch.Tensor) -> torch.Tensor:
        return x * gate_EC[expert].to(x)

    return inside


def _add_to_output(bias: torch.Tensor):  # type: ignore[no-untyped-def]
    def hook(_module: nn.Module, _args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + bias.to(output)

    return hook


def compensating_bias(weight_OI: torch.Tensor, mean_I: torch.Tensor, gate_K: torch.Tensor) -> torch.Tensor:
    """What the units with a gate of 0 added to the writer's output on average: W · (mean ⊙ removed), shape (O,).

    Float32. FLAP (An et al. 2024, arXiv 2312.11983), baseline bias compensation.
    """
    removed_I = (gate_K == 0).repeat_interleave(len(mean_I) // len(gate_K))
    return weight_OI.detach().float() @ (mean_I * removed_I.to(mean_I.device)).to(weight_OI.device)


def compensation(
    model: nn.Module,
    groups: Sequence[Group],
    gates: Mapping[str, torch.Tensor],
    means: Mapping[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """Group name → the bias that makes up for what its gates remove; empty where there are no means."""
    biases = {}
    for g in groups:
        if means and (gates[g.name] == 0).any():
            if g.name not in means or means[g.name].shape != writer(model, g).weight.shape[1:]:
                raise InputError(f"the gates have not a mean for each input of {g.writer}; run `secateur learn` again")
            biases[g.name] = compensating_bias(weight_of(model, g.writer), means[g.name], gates[g.name])
    return biases


@contextmanager
def attached(
    model: nn.Module,
    groups: Iterable[Group],
    gates: Mapping[str, torch.Tensor],
    biases: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[None]:
    """Within the context, unit k of group g is scaled by `gates[g.name][k]`; gates have shape (g.units,). A sublayer's
    own gate scales what the sublayer adds to the hidden states, but for a bias of its writer, which stays.

    `biases`, where given, are added to the outputs of their groups' writers.
    """
    groups = list(groups)
    with ExitStack() as stack:
        experts = {}
        for norm, gate in by_norm(groups, gates).items():
            stack.callback(model.get_submodule(norm).register_forward_hook(_multiply_output(gate)).remove)
        gates = by_writer(groups, gates)
        for group in (g for g in groups if g.name in gates):
            gate = gates[group.name]
            if group.experts:
                experts[group.gate_at] = _multiply_channels(group.by_expert(gate))
                continue
            module = writer(model, group)
            block = module.in_features // group.units
            gate = gate.repeat_interleave(block) if block > 1 else gate
            stack.callback(module.register_forward_pre_hook(_multiply_input(gate)).remove)
            if biases and group.name in biases:
                stack.callback(module.register_forward_hook(_add_to_output(biases[group.name])).remove)
        stack.enter_context(inside_experts(model, experts))
        yield
