"""Refit: output projections solved anew, in closed form, so that what is kept reproduces what the dense model computes.

The paper learns gates only and leaves weights to future work. For every map that reads units (o_proj, down_proj), with
x its input in the pruned model and e what its sublayer's output lacks of the dense model's on the same text:

    ΔW = argmin Σ_tokens ‖e − ΔW x‖² + ρ Σ_i (Σ_tokens x_i²) ‖ΔW_i‖²  =  (Σ e xᵀ) (Σ x xᵀ + ρ diag Σ x xᵀ)⁻¹

least squares as in OSSCAR (arXiv 2403.12983), with a ridge that is relative to each input's own size: outlier channels
do not set it for all others. All maps are solved from one pass over the text. The same ρ serves all of them; it is the
one with the lowest loss on held-out text, of the model as a whole, and the weights stay if none lowers it.

Shape suffixes: N rows, T positions, R = tokens, I inputs, O outputs.
"""

from collections.abc import Callable, Sequence
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


def kept_groups(groups: Sequence[Group], plan: Plan) -> list[Group]:
    """The groups as the exported model has them, fit to be gated (attach) but not sliced; those without units are left
    out."""
    return [replace(g, units=len(plan.kept[g.name]), slices=()) for g in groups if len(plan.kept[g.name])]


@torch.no_grad()
def refit(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    groups: Sequence[Group],
    calibration_NT: Tensor,
    held_out_NT: Tensor,
    on_row: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Tensor], Refit]:
    """Solves for the weights of the writers of `groups` (kept_groups) in place; those that changed, and what was done.

    One pass of both models over `calibration_NT`. Memory beside the models: a square matrix of its inputs and one of
    the weight's shape for each writer, float32, however many tokens there are.
    """
    device = next(student.parameters()).device
    sums = {g.gate_at: _Sums(writer(student, g)) for g in groups}
    with ExitStack() as stack:
        for g in groups:
            stack.callback(writer(teacher, g).register_forward_hook(sums[g.gate_at].see_dense).remove)
            stack.callback(writer(student, g).register_forward_hook(sums[g.gate_at].see_pruned).remove)
        for row, ids_BT in enumerate(calibration_NT.split(1), start=1):
            teacher.base_model(ids_BT.to(device), use_cache=False)
            student.base_model(ids_BT.to(device), use_cache=False)
            on_row(row)
    before = best = mean_loss(student, held_out_NT)
    kept = {name: s.linear.weight.data for name, s in sums.items()}
    chosen, weights = None, kept
    for ridge in RIDGES:
        tried = {name: kept[name] + s.solved(ridge).to(kept[name]) for name, s in sums.items()}
        _put(sums, tried)
        loss = mean_loss(student, held_out_NT)
        if not loss < best:
            break
        best, chosen, weights = loss, ridge, tried
    _put(sums, weights)
    done = Refit(chosen, before, best, calibration_NT.numel())
    return {} if chosen is None else {f"{name}.weight": weight for name, weight in weights.items()}, done


def _put(sums: dict[str, "_Sums"], weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        sums[name].linear.weight.data = weight


class _Sums:
    """The normal equations of one writer, filled by hooks: the dense model's first, then the pruned one's."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        outputs, inputs = linear.weight.shape
        self.xx_II = torch.zeros(inputs, inputs, device=linear.weight.device)
        self.ex_OI = torch.zeros(outputs, inputs, device=linear.weight.device)
        self.dense_RO: Tensor | None = None

    def see_dense(self, _module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        self.dense_RO = output.flatten(0, -2).float()

    def see_pruned(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert self.dense_RO is not None, "the dense model goes first"
        with torch.autocast(output.device.type, enabled=False):
            x_RI, lacking_RO = args[0].flatten(0, -2).float(), self.dense_RO - output.flatten(0, -2).float()
            self.xx_II.addmm_(x_RI.T, x_RI)
            self.ex_OI.addmm_(lacking_RO.T, x_RI)
        self.dense_RO = None

    def solved(self, ridge: float) -> Tensor:
        """ΔW of shape (O, I); inputs that were never active stay out of it."""
        diagonal_I = self.xx_II.diagonal()
        scale_I = torch.where(diagonal_I > 0, diagonal_I, 1.0).rsqrt()
        correlation_II = self.xx_II * scale_I * scale_I[:, None]
        correlation_II.diagonal().add_(ridge)
        factor_II = torch.linalg.cholesky(correlation_II)
        return torch.cholesky_solve((self.ex_OI * scale_I).T, factor_II).T * scale_I
