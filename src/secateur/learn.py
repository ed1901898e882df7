"""The learning loop: frozen weights, one vector of gates, multipliers that hold the budget.

Serves `secateur learn`. Each step: the teacher's logits (gates off), the student's (gates on), the gradient of
L_ce + η L_kl by the gates alone, one step of the optimiser. Nothing in it is random once the data is in order, but for
the noise of a method that samples its gates.

Shape suffixes: N units of the whole model, B batch, T positions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from secateur.attach import attached
from secateur.budget import Budget, largest_that_fits
from secateur.checkpoints import Checkpoints, State
from secateur.config import Recipe
from secateur.evaluate import mean_loss
from secateur.files import InputError
from secateur.gates import by_group
from secateur.objective import distillation_loss
from secateur.optimise import Optimiser, Step
from secateur.relaxation import RELAXATIONS
from secateur.sensitivity import balanced, gate_sensitivity, weighted
from secateur.units import Group

SAMPLES = 4
"""Samples of noisy gates over which a held-out loss is averaged."""


class LearningDiverged(InputError):
    """The loss is no longer finite. `z_N` and `value_N` hold the last good gates, of step `step`."""

    def __init__(self, step: int, z_N: torch.Tensor, value_N: torch.Tensor) -> None:
        super().__init__(
            f"the loss became NaN or infinite at step {step + 1}; the gates of step {step} are saved. Lower --lr "
            "or learn in --dtype float32"
        )
        self.step, self.z_N, self.value_N = step, z_N, value_N


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
    """What the units rank by; open ones have z > 0."""
    value_N: torch.Tensor
    """Gate values as deployed."""
    fixing: Fixing | None
    """None when the recipe leaves the budget to the plan."""


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
    method: str = "deterministic",
    measure_every: int = 0,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
    on_measured: Callable[[int], None] = lambda _: None,
    teacher: PreTrainedModel | None = None,
    gradient_checkpointing: bool = False,
) -> Learned:
    """Learns the gates of `model`, whose weights are frozen and otherwise left as they are.

    calibration_NT: token ids, steps × batch_size rows, used in their order. held_out_NT: rows of other documents.
    With `checkpoints`, states are saved there, also when interrupted; a run that finds one goes on from it to
    bit-identical gates. `on_measured` hears of the rows that sensitivity is measured on. `method` is
    one of RELAXATIONS; `measure_every` k records the held-out loss every k steps and changes nothing else. `teacher` is
    the model itself without gates unless another one is given. `gradient_checkpointing` computes each layer once more
    in the backward pass instead of keeping what it computed: less memory, the same gates.
    Raises LearningDiverged when the loss is not finite.
    """
    device = next(model.parameters()).device
    model.eval().requires_grad_(False)
    optimiser = Optimiser(recipe, limits.to(device), steps, seed, device, RELAXATIONS[method])
    fixing = None
    settings = f"{method} {recipe} steps={steps} batch_size={batch_size} seed={seed} seq_len={calibration_NT.shape[1]}"
    settings += f" units={[(g.name, g.units) for g in groups]} budget={limits.allowed_C.tolist()} tie={limits.tie}"
    settings += "" if limits.policy.free else f" shape={limits.policy}"
    settings += "".join(f" {b.name}<={b.allowed}/{b.scale}" for b in limits.bounds)
    losses: list[float] = []  # since the last checkpoint, where they can be compared: the kept set is the same, or fits

    def save() -> None:
        if checkpoints is not None:
            tensors, fixed = state  # of a whole step, wherever an interrupt falls
            about, loss = fixed and asdict(fixed), sum(losses) / len(losses) if losses else None
            checkpoints.save(State(int(tensors["done"]), settings, tensors, about, loss))
            losses.clear()

    found = None if checkpoints is None else checkpoints.latest(settings)
    if found is not None:
        optimiser.restore(found.tensors)
        fixing = None if found.about is None else Fixing(**found.about)
    elif recipe.sensitivity_batches:
        rows_NT = calibration_NT[: recipe.sensitivity_batches * batch_size].to(device)
        with recomputing(model, gradient_checkpointing):
            sensitivity_N = gate_sensitivity(model, groups, rows_NT, on_measured)
        sensitivity_N = weighted(sensitivity_N, groups, recipe.attention_weight)
        optimiser.start_from(sensitivity_N, balanced(sensitivity_N, groups, recipe.layer_balance))
    batches = calibration_NT.split(batch_size)[:steps]
    assert len(batches) == steps, f"{steps} steps need {steps} batches, got {len(batches)}"

    state = optimiser.state(), fixing
    if found is None:
        save()  # sensitivity takes as long as many steps
    try:
        while optimiser.done < steps:
            if optimiser.done == optimiser.settles_at and optimiser.kept_N is None:
                fixing = _fix(optimiser, model, groups, held_out_NT)
            z_N = optimiser.z_N.clone().requires_grad_()
            gate_N = optimiser.train_gates(z_N)
            ids_BT = batches[optimiser.done].to(device)
            with torch.no_grad():
                teacher_BTV = (teacher or model)(ids_BT, use_cache=False).logits
            # Gates stay on to the end of the backward pass, which may compute the layers once more.
            with attached(model, groups, by_group(gate_N, groups)):
                with recomputing(model, gradient_checkpointing):
                    student_BTV = model(ids_BT, use_cache=False).logits
                loss, ce, kl = distillation_loss(
                    student_BTV, teacher_BTV, ids_BT, recipe.kd_weight, recipe.kd_temperature
                )
                (grad_N,) = torch.autograd.grad(loss, z_N)
            if not (torch.isfinite(loss) and torch.isfinite(grad_N).all()):
                raise LearningDiverged(optimiser.done, optimiser.ranking(), optimiser.values())
            step = optimiser.advance(grad_N, loss.item(), ce.item(), kl.item(), unseen(grad_N, groups))
            if measure_every and step.step % measure_every == 0:
                step = _measured(step, optimiser, model, groups, held_out_NT)
            if step.held_out_deployed is not None:
                losses[:] = [step.held_out_deployed]
            elif optimiser.kept_N is not None and not measure_every:
                losses.append(step.loss)
            on_step(step)
            state = optimiser.state(), fixing
            if checkpoints is not None and checkpoints.due(optimiser.done, steps):
                save()
    except KeyboardInterrupt:
        if found is None or int(state[0]["done"]) > found.step:
            save()
        raise
    return Learned(optimiser.ranking(), optimiser.values(), fixing)


@contextmanager
def recomputing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Within the context, if `wanted`, layers keep only their inputs for the backward pass; dropout stays off.

    Raises InputError where the model cannot.
    """
    if not wanted:
        yield
        return
    if not model.supports_gradient_checkpointing:
        raise InputError(f"{type(model).__name__} does not support gradient checkpointing; leave the option out")
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        for layer in layers:
            layer.training = True  # of the layer's own flag alone, which is what switches checkpointing on
        yield
    finally:
        for layer in layers:
            layer.training = False
        model.gradient_checkpointing_disable()


def unseen(grad_N: torch.Tensor, groups: tuple[Group, ...]) -> torch.Tensor | None:
    """Units of experts that no token was sent to: those all of whose gradients are exactly 0. None without experts."""
    if not any(g.experts for g in groups):
        return None
    parts = []
    for part, g in zip(grad_N.split([g.units for g in groups]), groups, strict=True):
        silent_E = (g.by_part(part) == 0).all(1)
        parts.append((silent_E & bool(g.experts)).repeat_interleave(g.width))
    return torch.cat(parts)


def _fix(optimiser: Optimiser, model: PreTrainedModel, groups: tuple[Group, ...], held_out_NT: torch.Tensor) -> Fixing:
    def held_out() -> float:
        return mean_loss(model, held_out_NT, groups, by_group(optimiser.values(), groups))

    def kept() -> float:
        return optimiser.limits.share_of(optimiser.open_N)

    kept_before, held_out_before = kept(), held_out()
    optimiser.fix_kept_set()
    return Fixing(optimiser.done, kept_before, kept(), held_out_before, held_out())


@torch.no_grad()
def _measured(
    step: Step, optimiser: Optimiser, model: PreTrainedModel, groups: tuple[Group, ...], held_out_NT: torch.Tensor
) -> Step:
    """The step with held-out losses: gates as trained, over samples where they are noisy, and as deployed."""

    def held_out(gate_N: torch.Tensor) -> float:
        return mean_loss(model, held_out_NT, groups, by_group(gate_N, groups))

    samples = range(1, 1 + (SAMPLES if optimiser.relaxation.sampled and optimiser.kept_N is None else 1))
    trained = [held_out(optimiser.train_gates(optimiser.z_N, sample)) for sample in samples]
    kept_N = largest_that_fits(optimiser.ranking(), optimiser.limits)
    deployed = held_out(optimiser.values() * kept_N)
    return replace(step, held_out_trained=sum(trained) / len(trained), held_out_deployed=deployed)
