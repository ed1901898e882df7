"""Refit: output projections solved anew, in closed form, so that what is kept reproduces what the dense model computes.

The paper learns gates only and leaves weights to future work. For every map that reads units (o_proj, down_proj), with
x the kept part of its input in the dense model and e what its output lacks of the dense one when it sees x alone:

    ΔW = argmin Σ_tokens ‖e − ΔW x‖² + ρ Σ_i (Σ_tokens x_i²) ‖ΔW_i‖²  =  (Σ e xᵀ) (Σ x xᵀ + ρ diag Σ x xᵀ)⁻¹

least squares as in OSSCAR (arXiv 2403.12983), with a ridge that is relative to each input's own size: outlier channels
do not set it for all others. All maps are solved from one pass of the dense model over the text. The same ρ serves all
of them; it is the one with the lowest loss on held-out text, of the model as a whole, and the weights stay if none
lowers it. Inputs of the pruned model, or of one refitted so far, did worse (docs/study.md).

Shape suffixes: N rows, T positions, R = tokens, I kept inputs, O outputs.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.attach import writer
from secateur.evaluate import mean_loss
from secateur.plan import Plan
from secateur.units import Group

RIDGES = (10.0, 3.0, 1.0, 0.3, 0.1)
"""ρ to choose from, strongest first: once one is worse than the one before it, weaker ones are not tried."""


@dataclass(frozen=True)
class Refit:
    """What a refit did; losses on held-out text, nats a token."""

    ridge: float | None
    """ρ; None: no ridge lowered the loss, and the weights are as they were."""
    held_out_before: float
    held_out_after: float
    tokens: int
    """Tokens that the equations were summed over."""


class Equations:
    """Normal equations of one writer, summed while the dense model reads: float32, of a size that text does not add to.

    Memory: I × I and O × I values.
    """

    def __init__(self, dense: nn.Linear, kept_I: Tensor) -> None:
        device = dense.weight.device
        self.kept_I, self.tokens = kept_I.to(device), 0
        self.xx_II = torch.zeros(len(kept_I), len(kept_I), device=device)
        self.yx_OI = torch.zeros(dense.out_features, len(kept_I), device=device)
        self.x_I = torch.zeros(len(kept_I), device=device)

    def see(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook of the dense writer."""
        x_RI = args[0].flatten(0, -2).index_select(1, self.kept_I).float()
        with torch.autocast(output.device.type, enabled=False):
            self.xx_II.addmm_(x_RI.T, x_RI)
            self.yx_OI.addmm_(output.flatten(0, -2).float().T, x_RI)
        self.x_I += x_RI.sum(0)
        self.tokens += len(x_RI)

    def update(self, pruned: nn.Linear, ridge: float) -> Tensor:
        """ΔW of the pruned writer, shape (O, I); inputs that were never active stay out of it."""
        weight_OI = pruned.weight.detach().float()
        lacking_OI = self.yx_OI - weight_OI @ self.xx_II  # Σ e xᵀ
        if pruned.bias is not None:
            lacking_OI = lacking_OI - pruned.bias.detach().float()[:, None] * self.x_I
        diagonal_I = self.xx_II.diagonal()
        scale_I = torch.where(diagonal_I > 0, diagonal_I, 1.0).rsqrt()
        correlation_II = self.xx_II * scale_I * scale_I[:, None]
        correlation_II.diagonal().add_(ridge)
        factor_II = torch.linalg.cholesky(correlation_II)
        return torch.cholesky_solve((lacking_OI * scale_I).T, factor_II).T * scale_I


def kept_groups(groups: Sequence[Group], plan: Plan) -> list[Group]:
    """The groups as the exported model has them, fit to be gated (attach) but not sliced; empty ones are left out."""
    return [replace(g, units=len(plan.kept[g.name]), slices=()) for g in groups if len(plan.kept[g.name])]


@torch.no_grad()
def normal_equations(
    teacher: PreTrainedModel,
    groups: Sequence[Group],
    plan: Plan,
    calibration_NT: Tensor,
) -> dict[str, Equations]:
    """Equations by writer, of every group of the dense model that keeps a unit; one forward pass over the rows."""
    equations = {}
    with ExitStack() as stack:
        for g in groups:
            kept = plan.kept[g.name]
            if len(kept):
                linear = writer(teacher, g)
                inputs_I = torch.arange(linear.in_features).unflatten(0, (g.units, -1))[kept].flatten()
                equations[g.gate_at] = Equations(linear, inputs_I)
                stack.callback(linear.register_forward_hook(equations[g.gate_at].see).remove)
        for ids_BT in calibration_NT.split(1):
            teacher.base_model(ids_BT.to(teacher.device), use_cache=False)
    return equations


@torch.no_grad()
def refit(
    student: PreTrainedModel, equations: Mapping[str, Equations], held_out_NT: Tensor
) -> tuple[dict[str, Tensor], Refit]:
    """Solves for the writers' weights of `student`, in place; those that changed by name, and what was done."""
    writers = {name: student.get_submodule(name) for name in equations}
    weights = kept = {name: linear.weight.data for name, linear in writers.items()}
    before = best = mean_loss(student, held_out_NT)
    chosen = None
    for ridge in RIDGES:
        _put(writers, kept)
        tried = {name: kept[name] + equations[name].update(writers[name], ridge).to(kept[name]) for name in kept}
        _put(writers, tried)
        loss = mean_loss(student, held_out_NT)
        if not loss < best:
            break
        best, chosen, weights = loss, ridge, tried
    _put(writers, weights)
    done = Refit(chosen, before, best, next(iter(equations.values())).tokens)
    return {} if chosen is None else {f"{name}.weight": weight for name, weight in weights.items()}, done


def _put(writers: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    for name, linear in writers.items():
        linear.weight.data = weights[name]
