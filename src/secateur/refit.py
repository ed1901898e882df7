"""Refit: output projections solved anew, in closed form, so that what is kept reproduces what the dense model computes.

The paper learns gates only and leaves weights to future work. For every map that reads units (o_proj, down_proj, the
down_proj of every expert over the tokens that are sent to it, weighted by their routing), with
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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.attach import writer
from secateur.evaluate import mean_loss
from secateur.experts import Inside, inside_experts
from secateur.importance_experts import down_projection, read
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


@dataclass(frozen=True)
class Place:
    """Where a map's weight is in the exported model."""

    module: str
    """The linear map, or the module of fused experts."""
    expert: int | None = None
    """Which of the stored experts."""
    columns: Tensor | None = None
    """Those of its columns that are kept channels and do not only fill it up."""

    @property
    def parameter(self) -> str:
        """Name of the parameter."""
        return f"{self.module}.weight" if self.expert is None else f"{self.module}.down_proj"

    def view(self, student: nn.Module) -> Tensor:
        """The weight as it stands, outputs × inputs; writing to it writes to the model."""
        module: Any = student.get_submodule(self.module)
        if self.expert is None:
            return module.weight.data
        weight: Tensor = module.down_proj.data[self.expert]
        return weight.T if module.is_transposed else weight

    def read(self, student: nn.Module) -> Tensor:
        """A copy of the weight of the kept inputs, shape (O, I)."""
        weight = self.view(student)
        return (weight if self.columns is None else weight[:, self.columns]).clone()

    def write(self, student: nn.Module, weight_OI: Tensor) -> None:
        """Puts it back."""
        view = self.view(student)
        view[:, slice(None) if self.columns is None else self.columns] = weight_OI

    def bias(self, student: nn.Module) -> Tensor | None:
        """What the map adds whatever it reads; None for experts, whose biases are those of the dense model."""
        module: Any = student.get_submodule(self.module)
        return module.bias if self.expert is None else None


class Equations:
    """Normal equations of one writer, summed while the dense model reads: float32, of a size that text does not add to.

    Memory: I × I and O × I values.
    """

    def __init__(self, place: Place, outputs: int, kept_I: Tensor, device: torch.device) -> None:
        self.place, self.kept_I, self.tokens = place, kept_I.to(device), 0
        self.xx_II = torch.zeros(len(kept_I), len(kept_I), device=device)
        self.yx_OI = torch.zeros(outputs, len(kept_I), device=device)
        self.x_I = torch.zeros(len(kept_I), device=device)

    def see(self, x: Tensor, y: Tensor) -> None:
        """Takes in what the dense writer read and gave, shapes (..., all inputs) and (..., O)."""
        x_RI = x.flatten(0, -2).index_select(1, self.kept_I).float()
        with torch.autocast(y.device.type, enabled=False):
            self.xx_II.addmm_(x_RI.T, x_RI)
            self.yx_OI.addmm_(y.flatten(0, -2).float().T, x_RI)
        self.x_I += x_RI.sum(0)
        self.tokens += len(x_RI)

    def update(self, weight_OI: Tensor, bias_O: Tensor | None, ridge: float) -> Tensor:
        """ΔW of the pruned writer, shape (O, I), in float32; inputs that were never active stay out of it."""
        with torch.autocast(self.xx_II.device.type, enabled=False):  # sums that are nearly equal are subtracted
            weight_OI = weight_OI.detach().float()
            lacking_OI = self.yx_OI - weight_OI @ self.xx_II  # Σ e xᵀ
            if bias_O is not None:
                lacking_OI = lacking_OI - bias_O.detach().float()[:, None] * self.x_I
            diagonal_I = self.xx_II.diagonal()
            scale_I = torch.where(diagonal_I > 0, diagonal_I, 1.0).rsqrt()
            correlation_II = self.xx_II * scale_I * scale_I[:, None]
            correlation_II.diagonal().add_(ridge)
            factor_II = torch.linalg.cholesky(correlation_II)
            return torch.cholesky_solve((lacking_OI * scale_I).T, factor_II).T * scale_I


def kept_groups(groups: Sequence[Group], plan: Plan) -> list[Group]:
    """The groups as the exported model has them, fit to be gated (attach) and folded; empty ones are left out."""
    sizes = plan.sizes(groups)
    kept = [g for g in groups if sizes[g.name].units and g.writes]
    return [
        replace(
            g,
            units=sizes[g.name].units,
            experts=sizes[g.name].parts if g.experts else 0,
            kv_heads=0,  # all that are left stay
            keys="",
            depth="",
            after="",
            slices=(g.writer_slice,),
        )
        for g in kept
    ]


@torch.no_grad()
def normal_equations(
    teacher: PreTrainedModel,
    groups: Sequence[Group],
    plan: Plan,
    calibration_NT: Tensor,
) -> list[Equations]:
    """Equations of every writer, or every expert's, that keeps a unit; one forward pass of the dense model."""
    equations: list[Equations] = []
    calls: dict[str, Inside] = {}
    with ExitStack() as stack:
        for g in (g for g in groups if len(plan.kept[g.name]) and g.writes):
            if g.experts:
                found = _of_experts(teacher, g, plan)
                calls[g.gate_at] = _seeing(teacher.get_submodule(g.gate_at), found)
                equations += found.values()
                continue
            linear = writer(teacher, g)
            inputs_I = torch.arange(linear.in_features).unflatten(0, (g.units, -1))[plan.kept[g.name]].flatten()
            sums = Equations(Place(g.gate_at), linear.out_features, inputs_I, linear.weight.device)
            equations.append(sums)

            def see(_module, args, output, sums=sums):  # type: ignore[no-untyped-def]
                sums.see(args[0], output)

            stack.callback(linear.register_forward_hook(see).remove)
        stack.enter_context(inside_experts(teacher, calls))
        read(teacher, calibration_NT.to(teacher.device))
    return equations


def _of_experts(teacher: nn.Module, group: Group, plan: Plan) -> dict[int, Equations]:
    """Equations by expert of the dense model, of those that keep a channel."""
    pack, weight = plan.pack(group), teacher.get_parameter(group.writer)
    outputs = weight.shape[2 if teacher.get_submodule(group.gate_at).is_transposed else 1]
    found = {}
    for stored, e in enumerate(pack.experts.tolist()):
        columns = pack.filled_EW[stored].nonzero().flatten()
        if len(columns):
            place = Place(group.gate_at, stored, columns)
            found[e] = Equations(place, outputs, pack.channels_EW[stored][columns], weight.device)
    return found


def _seeing(module: Any, equations: Mapping[int, Equations]) -> Inside:
    def inside(e: int, x_TC: Tensor, routing_T1: Tensor) -> Tensor:
        if e in equations:
            x = (x_TC * routing_T1).float()
            with torch.autocast(x.device.type, enabled=False):
                equations[e].see(x, x @ down_projection(module, e).T)
        return x_TC

    return inside


@torch.no_grad()
def refit(
    student: PreTrainedModel, equations: Sequence[Equations], held_out_NT: Tensor
) -> tuple[dict[str, Tensor], Refit]:
    """Solves for the writers' weights of `student`, in place; those that changed by name, and what was done."""
    weights = kept = [sums.place.read(student) for sums in equations]
    before = best = mean_loss(student, held_out_NT)
    chosen = None
    for ridge in RIDGES:
        tried = [
            weight + sums.update(weight, sums.place.bias(student), ridge).to(weight)
            for sums, weight in zip(equations, kept, strict=True)
        ]
        _put(student, equations, tried)
        loss = mean_loss(student, held_out_NT)
        if not loss < best:
            break
        best, chosen, weights = loss, ridge, tried
    _put(student, equations, weights)
    done = Refit(chosen, before, best, max(sums.tokens for sums in equations))
    changed = {} if chosen is None else {sums.place.parameter for sums in equations}
    return {name: student.get_parameter(name).data for name in changed}, done


def _put(student: nn.Module, equations: Sequence[Equations], weights: Sequence[Tensor]) -> None:
    for sums, weight in zip(equations, weights, strict=True):
        sums.place.write(student, weight)
