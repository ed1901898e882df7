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

from secateur.config import Config, save_config
from secateur.files import InputError, replacing
from secateur.gates import Gates, load_gates, save_gates
from secateur.methods import budget_of
from secateur.plan import Rounding
from secateur.run import Run
from secateur.session import Session
from secateur.stages import export_stage, plan_stage


def size_name(config: Config) -> str:
    """What to call a size, and its folder: `0.35`, `params=0.7`, `0.35,kv=0.5`."""
    asked = [] if config.sparsity is None else [f"{config.sparsity:g}"]
    return ",".join([*asked, *config.budget])


def plan_size(
    session: Session, sparsity: float | None, budget: Sequence[str], shape: str | None = None
) -> tuple[Session, Rounding]:
    """Plans another size of a run; the session on it. Raises InputError where it is the run's own, or not possible."""
    run = session.run
    size = size_run(run, sparsity, budget, shape)
    if (size.config.sparsity, size.config.budget) == (
        run.config.sparsity,
        run.config.budget,
    ):
        raise InputError(f"{size_name(size.config)} is the run's own size: `secateur export {run.folder}` writes it")
    inside = session_on(session, size)
    found(inside.run, load_gates(run.gates, session.loaded.description.groups, session.architecture), run)
    return inside, plan_stage(inside)[1]


def export_size(
    session: Session, sparsity: float | None, budget: Sequence[str], shape: str | None = None, low_memory: bool = False
) -> Run:
    """Plans and exports another size of a run."""
    if low_memory:
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
    config = replace(run.config, sparsity=sparsity, budget=tuple(budget), shape=shape or run.config.shape)
    return Run(run.sizes / size_name(config), config)


def session_on(session: Session, size: Run) -> Session:
    """A session on a size of a run, which shares what is loaded. Raises InputError where the size is not possible."""
    inside = Session(size, session.progress)
    inside.loaded = session.loaded
    budget_of(inside)
    inside.bos, inside.blocks = session.bos, session.blocks
    return inside


def found(size: Run, gates: Gates, run: Run) -> None:
    """Makes the folder of a size: settings, gates, tokens."""
    save_config(size.config, size.folder / "config.yaml")
    save_gates(size.gates, gates)
    if run.data.exists():
        with replacing(size.data) as temporary:
            try:
                os.link(run.data, temporary)
            except OSError:  # another filesystem, or one without links
                shutil.copyfile(run.data, temporary)
