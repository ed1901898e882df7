"""Other sizes of a run, from the gates that it has: `secateur export RUN --sparsity 0.35`, or `--budget`.

Each size is a run of its own in RUN/sizes/NAME, with settings, gates, tokens, plan and checkpoint: verify, eval, bench,
recover and all other commands take it as they take RUN, whose own model stays. What it keeps lies in what larger sizes
keep (order.py). Gates of what it keeps stay as they were learned; those that open again are 1 or 0, whichever has the
lower held-out loss.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace

import torch

from secateur.config import Config
from secateur.config_file import save_config
from secateur.files import InputError, replacing
from secateur.gates import Gates, load_gates, save_gates
from secateur.methods import budget_of
from secateur.order import kept_in_order
from secateur.plan import Rounding
from secateur.report.files import Sweep, checked
from secateur.run import Run, open_run
from secateur.session import Session
from secateur.stages import export_stage, plan_stage


def size_name(config: Config) -> str:
    """What to call a size, and its folder: `0.35`, `params=0.7`, `0.35,kv=0.5`."""
    asked = [] if config.sparsity is None else [f"{config.sparsity:g}"]
    return ",".join([*asked, *config.budget])


def _asked(run: Run) -> tuple[float | None, tuple[str, ...]]:
    return run.config.sparsity, run.config.budget


def sizes_of(run: Run) -> list[Run]:
    """The sizes of a run that have gates."""
    trust = run.config.trust_remote_code
    return [open_run(path.parent, trust) for path in sorted(run.sizes.glob("*/gates.safetensors"))]


def plan_size(
    session: Session, sparsity: float | None, budget: Sequence[str], shape: str | None = None
) -> tuple[Session, Rounding]:
    """Plans another size of a run; the session on it. Raises InputError where it is the run's own, or not possible."""
    run = session.run
    size = size_run(run, sparsity, budget, shape)
    if run.config.sweep is None and _asked(size) == _asked(run):
        raise InputError(f"{size_name(size.config)} is the run's own size: `secateur export {run.folder}` writes it")
    inside = session_on(session, size)
    gates = _gates_for(inside, session)
    found(inside.run, gates, run)
    return inside, plan_stage(inside)[1]


def export_size(session: Session, sparsity: float | None, budget: Sequence[str], shape: str | None = None) -> Run:
    """Plans and exports another size of a run."""
    if session.low_memory:
        size = size_run(session.run, sparsity, budget)
        words = [] if size.config.sparsity is None else [f"--sparsity {size.config.sparsity:g}"]
        words += [f"--budget {word}" for word in size.config.budget]
        first = f"secateur plan {session.run.folder} {' '.join(words)}"
        raise InputError(f"--low-memory cannot plan; run `{first}`, then `secateur export {size.folder} --low-memory`")
    inside, _rounding = plan_size(session, sparsity, budget, shape)
    export_stage(inside)
    return inside.run


def size_run(run: Run, sparsity: float | None, budget: Sequence[str], shape: str | None = None) -> Run:
    """A size of a run, whether it is there or not."""
    config = replace(
        run.config, sweep=None, pick=None, sparsity=sparsity, budget=tuple(budget), shape=shape or run.config.shape
    )
    return Run(run.sizes / size_name(config), config)


def session_on(session: Session, size: Run) -> Session:
    """A session on a size of a run, which shares what is loaded. Raises InputError where the size is not possible."""
    inside = Session(size, session.progress, session.low_memory)
    inside.described = session.described
    if size.config.latency_table is not None:
        inside.latency = session.latency
    budget_of(inside)
    if session.unloadable is None:
        inside.loaded, inside.bos = session.loaded, session.bos
        inside.blocks, inside.guards = session.blocks, session.guards
    return inside


def found(size: Run, gates: Gates, run: Run) -> None:
    """Makes the folder of a size: settings, gates, tokens, the table of times."""
    save_config(size.config, size.folder / "config.yaml")
    save_gates(size.gates, gates)
    tokens = [run.data, *(run.guard(number) for number in range(len(run.config.guard)))]
    for shared in (path for path in (*tokens, run.latency) if path.exists()):
        with replacing(size.folder / shared.name) as temporary:
            try:
                os.link(shared, temporary)
            except OSError:  # another filesystem, or one without links
                shutil.copyfile(shared, temporary)


def _gates_for(inside: Session, session: Session) -> Gates:
    """The gates for a size: the run's own, or of those of its sweep the ones of the nearest size that is not smaller,
    else of the largest; with the order that has all sizes of the sweep lie in each other."""
    run, groups = session.run, session.description.groups
    swept = swept_gates(session)
    if not swept:
        return load_gates(run.gates, groups, session.architecture)
    own = [gates for gates in swept if gates.asked == _asked(inside.run)]
    if own:
        return own[0]
    limits = budget_of(inside)

    def in_sweep(gates: Gates) -> Gates:
        assert gates.order_N is not None
        levels_N = torch.stack([each.z_N > 0 for each in swept]).sum(0)
        return replace(gates, order_N=levels_N + gates.order_N.frac())

    by_size = sorted(swept, key=lambda gates: limits.share_of(gates.z_N > 0))
    kept = limits.share_of(kept_in_order(in_sweep(by_size[0]), limits))
    larger = [gates for gates in by_size if limits.share_of(gates.z_N > 0) >= kept]
    return in_sweep((larger or by_size[-1:])[0])


def swept_gates(session: Session) -> list[Gates]:
    """The gates that the last sweep of the run has learned, each for its own size."""
    run, groups, found = session.run, session.description.groups, []
    if not run.sweep.exists():
        return []
    number = checked(run.sweep, Sweep, f"secateur learn {run.folder} --sweep")["number"]
    for size in sizes_of(run):
        gates = load_gates(size.gates, groups, session.architecture)
        if gates.about.get("sweep") == number and gates.asked == _asked(size):
            found.append(gates)
    return found
