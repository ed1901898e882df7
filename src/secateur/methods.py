"""`--method` put to work: gates that are learned, or scored once, over the same units, budget and calibration text.

Serves `secateur learn RUN`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur import __version__
from secateur.budget import Budget, largest_that_fits, make_budget
from secateur.config import Config, Scope
from secateur.costs import Bound, bounds_of
from secateur.export import buffers
from secateur.files import InputError
from secateur.gates import Gates, save_gates
from secateur.importance import DIFFERENTIATED, ONE_SHOT
from secateur.learn import LearningDiverged, Start, learn
from secateur.load import autocast, load, pick_device
from secateur.offloaded import is_offloaded
from secateur.optimise import BARELY_OPEN, Step
from secateur.order import kept_for, ranked
from secateur.passes import recomputing
from secateur.policy import policy_of
from secateur.ranks import Ranks, here
from secateur.recipes import Recipe, tie_of
from secateur.run import recorded, versions
from secateur.session import Session
from secateur.sharding import sharded
from secateur.speed import lowered, memory_kept
from secateur.teacher import TeacherCache
from secateur.wanted import TIMES, read_budgets


def budget_of(session: Session, shape: str | None = None, scope: Scope | None = None) -> Budget:
    """What the gates of a run are held to, for its own shape and scope or others. Raises InputError where shape and
    sparsity or budgets are not possible."""
    c, description = session.config, session.description
    shape, scope = shape or c.shape, scope or c.per
    assert scope is not None
    description.check_shape(shape)
    tie, policy = tie_of(c.method, shape), policy_of(shape)
    sparsity = 0.0 if c.sparsity is None else description.sparsity_of_rest(c.sparsity)
    bounds = asked_of(session, scope == "kind")
    try:
        return make_budget(description.groups, description.shapes, sparsity, scope, tie, policy, bounds)
    except InputError as error:
        of = f" (--sparsity {c.sparsity} of all units is {sparsity:g} of what --keep leaves, which this speaks of)"
        raise InputError(f"{error}{of if description.kept and not bounds else ''}") from None


def asked_of(session: Session, by_kind: bool = False) -> tuple[Bound, ...]:
    """The budgets of a run, exactly; none where there is a sparsity alone. `by_kind`: that of units, by kind, is of
    those that `--keep` leaves."""
    c, description = session.config, session.description
    if not c.budget:
        return ()
    loaded = session.loaded if session.in_memory else session.described
    buffer_bytes = sum(tensor.numel() * tensor.element_size() for _, tensor in buffers(loaded.model))
    words = list(c.budget)
    if c.sparsity is not None:
        sparsity = description.sparsity_of_rest(c.sparsity) if by_kind else c.sparsity
        words.insert(0, f"units={1.0 - sparsity:.12f}".rstrip("0"))
    size, found = loaded.checkpoint_dtype.itemsize, []
    for wanted in read_budgets(words):
        if wanted.kind in TIMES:
            found.append(session.latency.bound(description, wanted))
        else:
            found += bounds_of(description, [wanted], size, buffer_bytes, by_kind)
    return tuple(found)


def find_gates(session: Session, limits: Budget) -> Gates:
    """Gates of the run's method within `limits`, its budget. Those that are learned go on from a checkpoint where one
    is; the others start over."""
    c = session.config
    about = about_gates(session)
    with session.autocast():
        if session.given is not None:
            return _tuned(session, session.given, limits, about)
        return _score(session, limits, about) if c.method in ONE_SHOT else learned_gates(session, limits, about)


def about_gates(session: Session) -> dict[str, Any]:
    """What a file of gates says of itself."""
    c = session.config
    assert c.learning is not None
    return {
        "version": __version__,
        "architecture": session.architecture,
        "units": session.pruned_shapes,
        "weights": session.weights,
        "method": c.method,
        "model": c.model,
        "sparsity": c.sparsity,
        **({"budget": list(c.budget)} if c.budget else {}),
        "per": c.per,
        "shape": c.shape,
        **({} if c.depth == "off" else {"depth": c.depth}),
        "data": session.blocks.about,
        **({"guard": list(c.guard)} if c.guard else {}),
        "steps": 0 if c.method in ONE_SHOT else c.steps,
        "tokens": (c.scored_rows if c.method in ONE_SHOT else c.steps * c.batch_size) * c.seq_len,
        "recipe": asdict(c.learning),
        "fixing": None,
        "versions": versions(),
        "experts": {group.name: group.experts for group in session.description.groups if group.experts},
    }


def _score(session: Session, limits: Budget, about: dict[str, Any]) -> Gates:
    c, loaded = session.config, session.loaded
    groups, device = loaded.description.groups, next(loaded.model.parameters()).device
    assert c.learning is not None
    score_units = ONE_SHOT[c.method]
    if c.method == "sensitivity":
        score_units = partial(
            score_units, recipe=c.learning, rows=c.micro_batch_size, on_measured=session.progress.measured
        )
    ids_NT = session.blocks.calibration_NT[: c.scored_rows].to(device)
    session.run.metrics.unlink(missing_ok=True)  # of gates learned in this folder before
    loaded.model.eval().requires_grad_(False)

    def on_row(row: int) -> None:
        session.progress.measured(row, len(ids_NT))

    with recomputing(loaded.model, c.gradient_checkpointing and c.method in DIFFERENTIATED):
        scores = score_units(loaded.model, groups, ids_NT, limits.to(device), on_row)
    score_N = scores.score_N.cpu()
    if not torch.isfinite(score_N).all():
        raise InputError(f"scores of --method {c.method} are NaN or infinite; score in --dtype float32")
    means = None if scores.means is None else {name: mean.cpu() for name, mean in scores.means.items()}
    z_N = ranked(score_N, largest_that_fits(score_N, limits))
    return Gates(z_N, groups, about, torch.ones_like(z_N), means)


def _tuned(session: Session, given: Gates, limits: Budget, about: dict[str, Any]) -> Gates:
    """The gates of `--gates`, and with `--steps` their values learned on; what is kept follows from them alone."""
    c = session.config
    assert c.learning is not None
    if not c.steps:
        return replace(given, about=given.about | {"architecture": session.architecture})
    kept_N, value_N = kept_for(given, limits, c.sparsity, c.budget), given.deployed().cpu()
    start = Start(torch.where(value_N > 0, value_N, 1.0), kept_N, given.sensitivity_N)
    before = given.about.get("steps", 0)
    recipe = c.learning if c.lr else going_on(c.learning, c.steps, before)
    about |= {"from": {key: given.about.get(key) for key in ("model", "weights", "sparsity", "budget", "tokens")}}
    about |= {"steps": before + c.steps}
    return learned_gates(session, limits, about, Part(replace(recipe, settle=1.0), 0, c.steps, start))


@dataclass(frozen=True)
class Part:
    """Steps of a run that gates are learned in."""

    recipe: Recipe
    first: int
    """The step whose rows of calibration text come first."""
    steps: int
    start: Start | None


def going_on(recipe: Recipe, steps: int, before: int) -> Recipe:
    """A recipe of so many steps for gates that were learned for some `before`: with the step size of one long run."""
    return replace(recipe, lr=recipe.lr * (steps / (before + steps)) ** 0.5)


def learned_gates(session: Session, limits: Budget, about: dict[str, Any], part: Part | None = None) -> Gates:
    """Gates learned in all steps of a run, or a part of them."""
    run, c, loaded, blocks = session.run, session.config, session.loaded, session.blocks
    groups = loaded.description.groups
    assert c.learning is not None
    whole, part = part is None, part or Part(c.learning, 0, c.steps, None)
    begun = part.first * c.batch_size

    def hear(step: Step) -> None:
        session.progress.step(replace(step, step=part.first + step.step))

    model, ranks = loaded.model, here()
    if ranks.count > 1 and c.micro_batch_size is None and run.checkpoints.exists():
        session.progress.warned(
            f"this run was begun on one rank with all {c.batch_size} sequences at once; in smaller parts sums are "
            "rounded otherwise, and the gates will differ a little from those of one rank"
        )
    if spread := c.shard and ranks.count > 1:
        model = sharded(ranks, c, pick_device(c.device), (model, loaded.description.layers))
    told: dict[str, Any] = ranks.handed({
        "groups": groups,
        "calibration_NT": blocks.calibration_NT[begun:],
        "held_out_NT": blocks.held_out_NT,
        "limits": limits,
        "recipe": part.recipe,
        "steps": part.steps,
        "batch_size": c.batch_size,
        "seed": c.seed,
        "method": c.method,
        "measure_every": c.measure_every,
        "gradient_checkpointing": c.gradient_checkpointing,
        "guarded": {guard: text.after(begun) for guard, text in session.guards.items()},
        "start": part.start,
        "teacher_cache": _teacher_cache(session),
        "micro_batch_size": c.rows_a_pass(ranks.count),
    })  # fmt: skip
    loaded.model.requires_grad_(False)
    with _fast(model, spread), recorded(run.metrics, c.checkpoint_every, hear) as on_step:
        try:
            learned = learn(
                model,
                checkpoints=session.checkpoints(run.checkpoints),
                on_step=on_step,
                on_measured=session.progress.measured,
                ranks=ranks,
                **told,
            )
        except LearningDiverged as error:
            last_good = run.folder / f"gates-step-{error.step}.safetensors"
            save_gates(last_good, _gates(error.z_N, error.value_N, groups, about | {"steps": error.step}))
            raise InputError(f"{error} ({last_good})") from None
    ranks.leave()
    if (found := learned.exactness) is not None:
        about |= {"teacher": {"top_k": c.teacher_top_k, **found._asdict()}}
        session.progress.told(
            f"teacher cut down to {c.teacher_top_k} words: {found.rest:.2%} of its mass is outside of them; KL on the "
            f"last batch {found.kl:.4f}, by all words {found.exact_kl:.4f}"
        )
    fixing = None if learned.fixing is None else asdict(learned.fixing)
    if learned.stopped is not None:
        left_out = part.steps - learned.stopped
        tokens = about["tokens"] - left_out * c.batch_size * c.seq_len
        about |= {"stopped": part.first + learned.stopped, "steps": about["steps"] - left_out, "tokens": tokens}
    z_N = learned.z_N
    if not whole:  # what goes on from these has to know what is kept
        z_N = torch.where(learned.kept_N, z_N.clamp(min=BARELY_OPEN), z_N.clamp(max=0.0))
    gates = _gates(z_N, learned.value_N, groups, about | {"fixing": fixing})
    return replace(gates, order_N=learned.order_N, sensitivity_N=learned.sensitivity_N)


def _teacher_cache(session: Session) -> TeacherCache | None:
    """Where the teacher's distributions are kept, with `--teacher cache`."""
    c = session.config
    if c.teacher != "cache":
        return None
    assert c.learning is not None
    precision = (
        "bfloat16 products" if session.autocast()._enabled else str(next(session.loaded.model.parameters()).dtype)
    )
    about = {"weights": session.weights, "precision": precision.removeprefix("torch.")}
    return TeacherCache(session.run.teacher, about, c.teacher_top_k, c.learning.kd_temperature)


def learn_along(ranks: Ranks) -> None:
    """What ranks other than the first do: learn the same gates, of which they keep nothing."""
    c: Config = ranks.handed()
    device = pick_device(c.device)
    with ExitStack() as stack:
        if c.shard:
            model = sharded(ranks, c, device)
        else:
            elsewhere: tuple[Any, ...] = ()
            if c.offload != "none":  # to a folder of this rank's own machine, which may not see the run's
                elsewhere = Path(stack.enter_context(TemporaryDirectory(prefix="secateur-"))), None, c.offload
            model = load(c.model, c.device, c.dtype, c.trust_remote_code, *elsewhere).model
        told: dict[str, Any] = ranks.handed()
        with autocast(device, c.precision), _fast(model, c.shard), suppress(LearningDiverged):  # which rank 0 says
            learn(model, ranks=ranks, **told)


@contextmanager
def _fast(model: PreTrainedModel, spread: bool) -> Iterator[None]:
    """Within the context passes are faster; weights that are spread stay as they are dealt out, and memory that
    offloaded ones have taken goes back at once."""
    with nullcontext() if is_offloaded(model) else memory_kept(), nullcontext() if spread else lowered(model):
        yield


def _gates(z_N: torch.Tensor, value_N: torch.Tensor, groups: Any, about: dict[str, Any]) -> Gates:
    """On the CPU, with values only where they are not ReLU(z)."""
    z_N, value_N = z_N.cpu(), value_N.cpu()
    return Gates(z_N, groups, about, None if torch.equal(value_N, z_N.relu()) else value_N)
