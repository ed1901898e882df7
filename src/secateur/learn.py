"""The learning loop: frozen weights, one vector of gates, multipliers that hold the budget.

Serves `secateur learn`. Each step: the teacher's logits (gates off), the student's (gates on), the gradient of
L_ce + η L_kl by the gates alone, one step of the optimiser. Nothing in it is random once the data is in order.

Shape suffixes: N units of the whole model, B batch, T positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from secateur.attach import attached
from secateur.budget import Budget
from secateur.config import Recipe
from secateur.evaluate import mean_loss
from secateur.files import InputError, replacing
from secateur.gates import by_group
from secateur.objective import distillation_loss, forward_gate
from secateur.optimise import Optimiser, Step
from secateur.sensitivity import gate_sensitivity
from secateur.units import Group


class LearningDiverged(InputError):
    """The loss is no longer finite. `z_N` holds the last good gates, of step `step`."""

    def __init__(self, step: int, z_N: torch.Tensor) -> None:
        super().__init__(
            f"the loss became NaN or infinite at step {step + 1}; the gates of step {step} are saved. Lower --lr or learn "
            "in --dtype float32"
        )
        self.step, self.z_N = step, z_N


@dataclass(frozen=True)
class Fixing:
    """The moment the kept set was fixed to the budget, and what that changed."""

    step: int
    kept_before: float
    """Share of the unit parameters whose gates were open, as learned."""
    kept_after: float
    held_out_before: float
    """Loss on held-out text with the gates as learned, nats a token."""
    held_out_after: float


@dataclass(frozen=True)
class Learned:
    """The result of a learning run."""

    z_N: torch.Tensor
    fixing: Fixing | None
    """None when the recipe leaves the budget to the plan, or the run was resumed after that moment."""


def learn(
    model: PreTrainedModel,
    groups: tuple[Group, ...],
    calibration_NT: torch.Tensor,
    held_out_NT: torch.Tensor,
    limits: Budget,
    recipe: Recipe,
    *,
    steps: int,
    batch_size: int,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    on_step: Callable[[Step], None] = lambda _: None,
) -> Learned:
    """Learns the gates of `model`, whose weights are frozen and otherwise left as they are.

    calibration_NT: token ids, steps × batch_size rows, used in their order. held_out_NT: rows of other documents.
    With `checkpoint`, the state is saved there every `checkpoint_every` steps and when interrupted, and a run that finds
    the file goes on from it to bit-identical gates. Raises LearningDiverged when the loss is not finite.
    """
    device = next(model.parameters()).device
    model.eval().requires_grad_(False)
    optimiser = Optimiser(recipe, limits.to(device), steps, seed, device)
    fixing = None
    if checkpoint is not None and checkpoint.exists():
        optimiser.restore(load_file(checkpoint))
    elif recipe.sensitivity_blocks:
        rows_NT = calibration_NT[: recipe.sensitivity_blocks].to(device)
        optimiser.set_step_sizes(gate_sensitivity(model, groups, rows_NT))
    batches = calibration_NT.split(batch_size)[:steps]
    assert len(batches) == steps, f"{steps} steps need {steps} batches, got {len(batches)}"

    state = optimiser.state()
    try:
        while optimiser.done < steps:
            if optimiser.done == optimiser.settles_at and optimiser.kept_N is None:
                fixing = _fix(optimiser, model, groups, held_out_NT)
            z_N = optimiser.z_N.clone().requires_grad_()
            loss, ce, kl = _losses(model, groups, z_N, batches[optimiser.done].to(device), recipe)
            (grad_N,) = torch.autograd.grad(loss, z_N)
            if not (torch.isfinite(loss) and torch.isfinite(grad_N).all()):
                raise LearningDiverged(optimiser.done, optimiser.z_N)
            on_step(optimiser.advance(grad_N, loss.item(), ce.item(), kl.item()))
            state = optimiser.state()
            if checkpoint is not None and optimiser.done % checkpoint_every == 0:
                _save(checkpoint, state)
    except KeyboardInterrupt:
        if checkpoint is not None:  # `state` is that of a whole step, wherever the interrupt fell
            _save(checkpoint, state)
        raise
    return Learned(optimiser.z_N, fixing)


def _losses(
    model: PreTrainedModel, groups: tuple[Group, ...], z_N: torch.Tensor, ids_BT: torch.Tensor, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        teacher_BTV = model(ids_BT, use_cache=False).logits
    with attached(model, groups, by_group(forward_gate(z_N), groups)):
        student_BTV = model(ids_BT, use_cache=False).logits
    return distillation_loss(student_BTV, teacher_BTV, ids_BT, recipe.kd_weight, recipe.kd_temperature)


def _fix(optimiser: Optimiser, model: PreTrainedModel, groups: tuple[Group, ...], held_out_NT: torch.Tensor) -> Fixing:
    def held_out() -> float:
        return mean_loss(model, held_out_NT, groups, by_group(optimiser.z_N.relu(), groups))

    def kept() -> float:
        return optimiser.limits.share_of(optimiser.z_N > 0)

    kept_before, held_out_before = kept(), held_out()
    optimiser.fix_kept_set()
    return Fixing(optimiser.done, kept_before, kept(), held_out_before, held_out())


def _save(checkpoint: Path, state: dict[str, torch.Tensor]) -> None:
    with replacing(checkpoint) as temporary:
        save_file(state, temporary)
