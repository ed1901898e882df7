"""The learning loop: frozen weights, one vector of gates, multipliers that hold the budget.

Serves `secateur learn`. Each step: the passes over a batch, which give the gradient of L_ce + η L_kl by the
gates alone (passes.py), and one step of the optimiser. Nothing in it is random once the data is in order, but for
the noise of a method that samples its gates.

Shape suffixes: N units of the whole model, B batch, T positions.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from pydantic import TypeAdapter
from transformers import PreTrainedModel

from secateur.budget import Budget, largest_that_fits
from secateur.checkpoints import Checkpoints, State
from secateur.data import Blocks, fingerprint
from secateur.evaluate import mean_loss
from secateur.files import InputError
from secateur.gates import by_group
from secateur.guard import LOOKED_AT, Guard, Multipliers
from secateur.interrupts import held_back
from secateur.optimise import Optimiser, Step
from secateur.order import positions
from secateur.passes import Passes, recomputing
from secateur.ranks import ALONE, Ranks
from secateur.recipes import Recipe
from secateur.relaxation import RELAXATIONS
from secateur.remeasure import OnMeasured, remeasured
from secateur.sensitivity import gate_sensitivity, weighed
from secateur.teacher import Exactness, TeacherCache
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


class StopLearning(Exception):
    """Raised by what hears of a step, `on_step`: learning ends with that step, and the gates are as they are then."""


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
class Start:
    """Gates that were learned before, to go on from."""

    z_N: torch.Tensor
    within_N: torch.Tensor
    """The units that may be kept, a mask."""
    sensitivity_N: torch.Tensor | None
    """What they went by, where it was measured: it is not measured again."""


@dataclass(frozen=True)
class Learned:
    """The result of a learning run."""

    z_N: torch.Tensor
    """What the units rank by; open ones have z > 0."""
    value_N: torch.Tensor
    """Gate values as deployed."""
    fixing: Fixing | None
    """None when the recipe leaves the budget to the plan."""
    kept_N: torch.Tensor
    """The kept set, a mask."""
    order_N: torch.Tensor | None = None
    """What the units rank by for other sizes (order.py): above 1 where kept, else below. None: z says it."""
    sensitivity_N: torch.Tensor | None = None
    """What each unit is worth alone, where it was measured."""
    stopped: int | None = None
    """The step after which StopLearning ended it; None where all steps were done."""
    exactness: Exactness | None = None
    """What a teacher kept on disk leaves out, on the last batch; None where the teacher was asked."""


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
    on_measured: OnMeasured = lambda _rows, _of: None,
    teacher: PreTrainedModel | None = None,
    gradient_checkpointing: bool = False,
    guarded: Mapping[Guard, Blocks] | None = None,
    start: Start | None = None,
    teacher_cache: TeacherCache | None = None,
    micro_batch_size: int | None = None,
    ranks: Ranks = ALONE,
) -> Learned:
    """Learns the gates of `model`, whose weights are frozen and otherwise left as they are.

    calibration_NT: token ids, steps × batch_size rows, used in their order. held_out_NT: rows of other documents.
    With `checkpoints`, states are saved there, also when interrupted; a run that finds one goes on from it to
    bit-identical gates. `on_measured` hears of the rows that sensitivity has been measured on, of how many. `method` is
    one of RELAXATIONS; `measure_every` k records the held-out loss every k steps and changes nothing else. `teacher` is
    the model itself without gates unless another one is given. `gradient_checkpointing` computes each layer once more
    in the backward pass instead of keeping what it computed: less memory, the same gates. `guarded`: the texts whose
    loss is bounded, with as many rows as of calibration. `start`: from other gates. `on_step` may raise StopLearning.
    `teacher_cache`: where the teacher's distributions are kept, cut down to their likeliest words. `micro_batch_size`:
    rows that go through the model at once. `ranks`: they do the same with the same arguments, and share the passes;
    only rank 0 has checkpoints. The gates are the same on each, and with equal micro-batches on any number of them.
    Raises LearningDiverged when the loss is not finite.
    """
    device = next(model.parameters()).device
    model.eval().requires_grad_(False)
    optimiser = Optimiser(recipe, limits.to(device), steps, seed, device, RELAXATIONS[method])
    fixing, stopped = None, None
    settings = f"{method} {recipe} steps={steps} batch_size={batch_size} seed={seed} seq_len={calibration_NT.shape[1]}"
    settings += f" units={[(g.name, g.units) for g in groups]} budget={limits.allowed_C.tolist()} tie={limits.tie}"
    settings += "" if limits.policy.free else f" shape={limits.policy}"
    settings += "".join(f" {b.name}<={b.allowed}/{b.scale}" for b in limits.bounds)
    settings += "" if teacher_cache is None else f" teacher_top_k={teacher_cache.top_k}"
    guarded = guarded or {}
    settings += "".join(f" guard={guard} {text.about['fingerprint']}" for guard, text in guarded.items())
    multipliers = Multipliers(tuple(guarded), steps)
    if start is not None:
        settings += f" start={fingerprint(start.z_N.cpu(), start.within_N.cpu())}"
        optimiser.go_on_from(start.z_N.to(device), start.within_N.to(device))
    losses: list[float] = []  # since the last checkpoint, where they can be compared: the kept set is the same, or fits

    def save() -> None:
        if checkpoints is not None:
            tensors, fixed, guards = state  # of a whole step, wherever an interrupt falls
            about = {"fixing": fixed and asdict(fixed), "guards": guards}
            loss = sum(losses) / len(losses) if losses else None
            checkpoints.save(State(int(tensors["done"]), settings, tensors, about, loss))
            losses.clear()

    earlier = ranks.handed(None if checkpoints is None else checkpoints.latest(settings))
    if earlier is not None:
        with nullcontext() if checkpoints is None else checkpoints.restoring():
            optimiser.restore(earlier.tensors)
            multipliers.restore(earlier.about["guards"])
            fixing = TypeAdapter(Fixing | None).validate_python(earlier.about["fixing"])
    elif recipe.sensitivity_batches:
        sensitivity_N = None if start is None else start.sensitivity_N
        growth_N = torch.ones_like(optimiser.z_N)
        if sensitivity_N is None:
            rows = recipe.sensitivity_batches * batch_size
            ids_NT = calibration_NT[:rows].to(device)

            def on_row(done: int) -> None:
                on_measured(done, rows)

            measure = partial(gate_sensitivity, model, groups, on_row=on_row, rows=micro_batch_size, ranks=ranks)
            with recomputing(model, gradient_checkpointing):
                sensitivity_N = measure(ids_NT)
                if start is None:
                    within = optimiser.limits, recipe, optimiser.largest
                    growth_N = remeasured(model, groups, ids_NT, sensitivity_N, *within, on_measured, ranks)
                for weight, text in zip(multipliers.weights, guarded.values(), strict=True):
                    sensitivity_N += weight * measure(text.calibration_NT[:rows].to(device))
        optimiser.sensitivity_N = sensitivity_N.to(device)
        step_N, worth_N = weighed(optimiser.sensitivity_N, groups, recipe)
        optimiser.start_from(step_N * growth_N, worth_N * growth_N)
    batches = calibration_NT.split(batch_size)[:steps]
    guard_batches = [text.calibration_NT.split(batch_size) for text in guarded.values()]
    assert len(batches) == steps, f"{steps} steps need {steps} batches, got {len(batches)}"

    def loss_of(rows_NT: torch.Tensor, gate_N: torch.Tensor | None = None) -> float:
        return mean_loss(model, rows_NT, groups, None if gate_N is None else by_group(gate_N, groups), ranks=ranks)

    looked_at = [text.held_out_NT[: max(1, steps * batch_size // LOOKED_AT)] for text in guarded.values()]
    dense = [loss_of(rows_NT) for rows_NT in looked_at]
    held_out = partial(loss_of, held_out_NT)
    passes = Passes(model, groups, recipe, teacher, gradient_checkpointing, micro_batch_size, ranks, teacher_cache)
    state = optimiser.state(), fixing, multipliers.state()
    if earlier is None:
        save()  # sensitivity takes as long as many steps
    try:
        while optimiser.done < steps:
            if optimiser.done == optimiser.settles_at and optimiser.kept_N is None:
                fixing = _fix(optimiser, held_out)
            found = passes.over(batches[optimiser.done], optimiser.z_N, optimiser.train_gates)
            grad_N, rises = found.grad_N, []
            for weight, own in zip(multipliers.weights, guard_batches, strict=True):
                of_guard = passes.over(own[optimiser.done], optimiser.z_N, optimiser.train_gates, dense=True)
                assert of_guard.dense_ce is not None
                grad_N = grad_N + weight * of_guard.grad_N
                rises.append(of_guard.ce - of_guard.dense_ce)
            if not (math.isfinite(found.loss) and torch.isfinite(grad_N).all()):
                raise LearningDiverged(optimiser.done, optimiser.ranking(), optimiser.values())
            step = optimiser.advance(grad_N, found.loss, found.ce, found.kl, unseen(grad_N, groups))
            step = replace(step, teacher_rest=found.teacher_rest)
            if guarded:
                step = replace(step, guard_rises=rises, guard_weights=list(multipliers.weights))
                multipliers.hear(rises)
                if multipliers.looks_after(step.step):
                    gated = [loss_of(rows_NT, optimiser.values()) for rows_NT in looked_at]
                    multipliers.look([after - before for after, before in zip(gated, dense, strict=True)])
            if measure_every and step.step % measure_every == 0:
                step = _measured(step, optimiser, held_out)
            if step.held_out_deployed is not None:
                losses[:] = [step.held_out_deployed]
            elif optimiser.kept_N is not None and not measure_every:
                losses.append(step.loss)
            try:
                on_step(step)
            except StopLearning:
                stopped = step.step
                break
            state = optimiser.state(), fixing, multipliers.state()
            if checkpoints is not None and checkpoints.due(optimiser.done, steps):
                save()
    except KeyboardInterrupt:
        if earlier is None or int(state[0]["done"]) > earlier.step:
            with held_back():  # a launcher tells every rank of it once more
                save()
        raise
    kept_N = optimiser.kept_N
    if kept_N is None:
        kept_N = optimiser.largest(optimiser.ranking())
    order_N = _order(optimiser, kept_N, groups)
    z_N, value_N, sensitivity_N = optimiser.ranking(), optimiser.values(), optimiser.sensitivity_N
    exactness = passes.exactness(batches[-1], value_N)
    return Learned(z_N, value_N, fixing, kept_N, order_N, sensitivity_N, stopped, exactness)


def _order(optimiser: Optimiser, kept_N: torch.Tensor, groups: tuple[Group, ...]) -> torch.Tensor | None:
    """What the units rank by for other sizes, above 1 where kept; None where z says it (Relaxation.score)."""
    if optimiser.relaxation.score is None:
        return None
    limits, sublayers = optimiser.limits, optimiser.limits.sublayers
    kept = kept_N.cpu().float()
    if optimiser.sensitivity_N is None:
        order_N = positions(optimiser.last_open_N, optimiser.z_N) + kept
    else:
        _, cost_N = weighed(optimiser.sensitivity_N, groups, optimiser.recipe)
        now_N = cost_N * torch.where(kept_N, limits.times(optimiser.values()), 1.0)  # closed: would open whole
        if sublayers is not None:
            now_N = sublayers.rescaled(cost_N, now_N)
        worth_N = limits.per_share(now_N)
        order_N = positions(worth_N if sublayers is None else sublayers.ranks(worth_N), optimiser.z_N) + kept
    return order_N if sublayers is None else sublayers.to(order_N.device).highest(order_N)


def unseen(grad_N: torch.Tensor, groups: tuple[Group, ...]) -> torch.Tensor | None:
    """Units of experts that no token was sent to: those all of whose gradients are exactly 0. None without experts."""
    if not any(g.experts for g in groups):
        return None
    parts = []
    for part, g in zip(grad_N.split([g.units for g in groups]), groups, strict=True):
        silent_E = (g.by_part(part) == 0).all(1)
        parts.append((silent_E & bool(g.experts)).repeat_interleave(g.width))
    return torch.cat(parts)


def _fix(optimiser: Optimiser, held_out: Callable[[torch.Tensor], float]) -> Fixing:
    def kept() -> float:
        return optimiser.limits.share_of(optimiser.open_N)

    kept_before, held_out_before = kept(), held_out(optimiser.values())
    optimiser.fix_kept_set()
    return Fixing(optimiser.done, kept_before, kept(), held_out_before, held_out(optimiser.values()))


@torch.no_grad()
def _measured(step: Step, optimiser: Optimiser, held_out: Callable[[torch.Tensor], float]) -> Step:
    """The step with held-out losses: gates as trained, over samples where they are noisy, and as deployed."""
    samples = range(1, 1 + (SAMPLES if optimiser.relaxation.sampled and optimiser.kept_N is None else 1))
    trained = [held_out(optimiser.train_gates(optimiser.z_N, sample)) for sample in samples]
    kept_N = largest_that_fits(optimiser.ranking(), optimiser.limits)
    deployed = held_out(optimiser.values() * kept_N)
    return replace(step, held_out_trained=sum(trained) / len(trained), held_out_deployed=deployed)
