"""Many sizes in one run, the largest model first: `secateur prune MODEL --sweep 0.1:0.6`, `secateur learn RUN --sweep`.

Each size is learned as a run of its share of the steps would: budget, annealing of μ, multipliers and the fixing of
the kept set (optimise.py), so that at each size gates have been pressed to a side, and step sizes have fallen to zero,
before they are saved. But it goes on from the gates of the size before, of which it can only close more. Sensitivity is
measured once. The first size has nothing to go on from and gets a third more steps than any other; later step sizes
are those that one run of all steps so far would have (docs/study.md).

A size is done when its gates are in RUN/sizes; RUN/sweep.json says which sweep they are of. So an interrupted one goes
on with the size that was begun, to the same gates bit for bit.
"""

import hashlib
import json
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from secateur.budget import Budget
from secateur.config import Config
from secateur.config_file import save_config
from secateur.files import write_json
from secateur.gates import Gates, load_gates
from secateur.learn import Start
from secateur.methods import Part, about_gates, budget_of, going_on, learned_gates
from secateur.pareto import compare_sizes, picked
from secateur.recipes import Recipe
from secateur.report.files import Sweep, checked
from secateur.run import Run
from secateur.session import Session
from secateur.sizes import found, session_on, size_run, sizes_of
from secateur.stages import remaining_stages
from secateur.wanted import asked_by, read_sweep


def swept_runs(run: Run) -> list[Run]:
    """The sizes of a run's sweep, the largest model first, whether they are there or not."""
    assert run.config.sweep is not None
    return [size_run(run, *asked_by(size, run.config.budget)) for size in read_sweep(run.config.sweep)]


def steps_of(steps: int, sizes: int) -> list[int]:
    """The steps of each size: as many for all but the first, which has a third more, and what is left over."""
    share = max(1, 3 * steps // (3 * sizes + 1))
    return [steps - (sizes - 1) * share] + [share] * (sizes - 1)


def recipe_for(c: Config, steps: int, before: int) -> Recipe:
    """The recipe of a part of a run, whose settings `c` are a size's; what was set by hand in its own stays."""
    assert c.learning is not None
    usual, part = (replace(c, learning=None, steps=n).resolved().learning for n in (c.steps, steps))
    assert usual is not None and part is not None
    by_hand = {
        f.name: value for f in fields(Recipe) if (value := getattr(c.learning, f.name)) != getattr(usual, f.name)
    }
    part = part if c.lr else going_on(part, steps, before)
    return replace(part, **{"sensitivity_batches": c.learning.sensitivity_batches} | by_hand)


def is_done(run: Run) -> bool:
    """Whether the sweep of a run has been learned."""
    return run.sweep.exists() and bool(checked(run.sweep, Sweep, f"secateur learn {run.folder}")["done"])


def learn_sizes(session: Session) -> Gates:
    """Learns the gates of all sizes of a sweep: RUN/sizes/*/gates.safetensors, metrics.jsonl. Returns the last ones."""
    run, c = session.run, session.config
    sizes = swept_runs(run)
    inside = [session_on(session, size) for size in sizes]  # all are possible before one is learned
    state = _begun(session, sizes)
    gates: Gates | None = None
    first = 0
    for each, steps in zip(inside, steps_of(c.steps, len(sizes)), strict=True):
        session.progress.size(each.run.folder.name)
        if each.run.gates.exists():
            gates = load_gates(each.run.gates, session.loaded.description.groups, session.architecture)
        else:
            save_config(each.config, each.run.folder / "config.yaml")
            part = Part(recipe_for(each.config, steps, first), first, steps, _start(gates))
            with each.timed("learn"), each.autocast():
                gates = _learn(each, budget_of(each), part, gates, state["number"])
            found(each.run, gates, run)
        each.checkpoints(each.run.checkpoints).discard()
        first += steps
    write_json(run.sweep, state | {"done": True})
    assert gates is not None
    return gates


def _begun(session: Session, sizes: list[Run]) -> dict[str, Any]:
    """What RUN/sweep.json holds: of the sweep that goes on, else a new one, for which earlier gates make way."""
    run, c = session.run, session.config
    settings = {
        "sizes": [size.folder.name for size in sizes], "recipe": asdict(c.learning) if c.learning else None,
        "steps": c.steps, "batch_size": c.batch_size, "seed": c.seed, "method": c.method, "shape": c.shape,
        "per": c.per, "data": session.blocks.about["fingerprint"], "weights": session.weights,
        "guards": [(str(guard), text.about["fingerprint"]) for guard, text in session.guards.items()],
    }  # fmt: skip
    number = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    if run.sweep.exists():
        state: dict[str, Any] = checked(run.sweep, Sweep, f"secateur learn {run.folder}")
        if state.get("number") == number and not state.get("done"):
            return state
    for size in sizes:
        for stale in (size.gates, size.plan):
            stale.unlink(missing_ok=True)
        session.checkpoints(size.checkpoints).discard()
    state = {"number": number, "done": False, **settings}
    write_json(run.sweep, state)
    return state


def sweep_stages(session: Session) -> dict[str, Any]:
    """All that `secateur prune --sweep` has left to do; returns what RUN/sizes.json holds and, where `--pick` chooses a
    size, what its eval.json does."""
    run, pick = session.run, session.config.pick
    if not is_done(run):
        learn_sizes(session)
    results = compare_sizes(session)
    if pick is None:
        return results
    chosen = picked(results, pick)
    size = next(each for each in sizes_of(run) if str(each.folder) == chosen["folder"])
    return results | {"picked": chosen["name"], "results": remaining_stages(session_on(session, size))}


def _start(gates: Gates | None) -> Start | None:
    return None if gates is None else Start(gates.z_N, gates.z_N > 0, gates.sensitivity_N)


def _learn(inside: Session, limits: Budget, part: Part, before: Gates | None, number: str) -> Gates:
    """One size. What it keeps ranks above what the size before kept, and that above what was closed earlier."""
    c, steps = inside.config, part.first + part.steps
    about = about_gates(inside) | {
        "sweep": number, "steps": steps, "tokens": steps * c.batch_size * c.seq_len, "recipe": asdict(part.recipe)
    }  # fmt: skip
    gates = learned_gates(inside, limits, about, part)
    if before is None or gates.order_N is None or before.order_N is None:
        return gates
    return replace(gates, order_N=gates.order_N + torch.floor(before.order_N))
