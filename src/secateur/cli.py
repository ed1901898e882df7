"""The command line: a subcommand is one dataclass (options.py) and one function.

What a user can put right is one line, exit code 2. `Config` serves `prune`; the stages read it from RUN.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from safetensors import SafetensorError

from secateur import __version__, interrupts
from secateur.config import Config
from secateur.files import InputError
from secateur.measure import Bench
from secateur.options import (
    Estimate,
    Eval,
    Export,
    Inspect,
    Learn,
    OnRun,
    Plan,
    Prune,
    Push,
    Recover,
    Refit,
    Report,
    Sizes,
    Verify,
    parse,
)

if TYPE_CHECKING:
    from secateur.run import Run

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


# --- commands --------------------------------------------------------------------------------------------------------


def prune(options: Prune) -> None:
    """`secateur prune`."""
    from secateur import ranks
    from secateur.logs import check_installed
    from secateur.run import new_run, open_run

    check_installed(options.log)
    if options.resume is not None:
        run = open_run(options.resume, options.trust_remote_code)
        # How gates are learned is for the machine at hand to say.
        own = {name: getattr(options, name) for name in ("micro_batch_size", "shard", "gradient_checkpointing")}
        run = replace(run, config=replace(run.config, **own))
    else:
        config = Config(**{f.name: getattr(options, f.name) for f in fields(Config)})
        ranks.check(config)
        run = new_run(replace(config, micro_batch_size=config.rows_a_pass(ranks.here().count)))
    ranks.call(run.config, learns=not run.gates.exists())
    results = _staged(run, "remaining_stages")
    if run.config.sweep is None:
        _print(run, results)
        return console.print(f"to look at: {run.report}", markup=False, soft_wrap=True)
    from secateur.pareto import show

    show(console, results, run.folder / "sizes.png")
    if "picked" in results:
        return _print(open_run(run.sizes / results["picked"], options.trust_remote_code), results["results"])
    again = f"secateur export {run.folder}"
    return console.print(f"to write one: `{again} --sparsity 0.3`, or `{again} --pick 'loss<=1.05'`", markup=False)


def inspect(options: Inspect) -> None:
    """`secateur inspect`."""
    from secateur.inspection import refusals, routing, routing_table, units_table
    from secateur.load import describe_pretrained

    description, config = describe_pretrained(options.model, options.trust_remote_code)
    console.print(units_table(options.model, description, config))
    default = description.only(()).unit_parameters
    which = "units" if default == description.unit_parameters else "experts' channels, which --units can add to"
    console.print(f"{default:,} parameters belong to {which}; --sparsity is a share of these.")
    for line in refusals(description):
        console.print(line, markup=False)
    if options.data is not None:
        found, tokens = routing(options.model, options.data, trust_remote_code=options.trust_remote_code)
        console.print(routing_table(found, tokens, options.data))


def estimate(options: Estimate) -> None:
    """`secateur estimate`."""
    from secateur import estimate as estimating

    values = {f.name: getattr(options, f.name) for f in fields(Config)}
    if options.sparsity is None and not options.budget and options.sweep is None:
        values["sparsity"] = 0.5
    config = Config(**values)
    found = estimating.estimate(config, options.hardware, options.devices)
    for table in estimating.tables(found):
        console.print(table)
    estimating.check_fit(found)


def learn(options: Learn) -> None:
    """`secateur learn`."""
    from secateur import ranks

    run = _open(options, sweeps=True)
    if options.sweep is not None:
        run = replace(run, config=replace(run.config, sparsity=None, sweep=options.sweep))
    ranks.call(run.config)
    if run.config.sweep is None:
        _staged(run, "learn_stage")
        return
    from secateur.sweep import learn_sizes

    _staged(run, learn_sizes)
    console.print(f"compare them with `secateur sizes {run.folder}`", markup=False, soft_wrap=True)


def plan(options: Plan) -> None:
    """`secateur plan`."""
    from secateur.planning import said, show
    from secateur.sizes import plan_size

    low = options.low_memory
    if options.compare:
        return show(console, *_staged(_open(options), "compare_shapes", low, shape=options.shape))
    if asked := _asked(options):
        size, rounding = _staged(_open(options, sweeps=True), plan_size, low, shape=options.shape, **asked)
        return console.print(f"{said(rounding)}\nwrote {size.run.plan}", markup=False, soft_wrap=True)
    rounding, beside = _staged(_open(options), "plan_beside_ragged", low, shape=options.shape)
    console.print(said(rounding))
    if beside is not None:
        console.print(beside, markup=False)
    return None


def export(options: Export) -> None:
    """`secateur export`."""
    asked, low = _asked(options), options.low_memory
    run = _open(options, sweeps=bool(asked or options.pick))
    if options.pick is not None:
        from secateur.pareto import compare_sizes, picked

        if asked:
            raise InputError(f"--pick {options.pick} says a size, so another one contradicts it")
        size = picked(_staged(run, compare_sizes), options.pick)
        console.print(f"picked {size['name']}: loss × {size['shares']['loss']:.3f}", markup=False)
        run = _open(options, folder=Path(size["folder"]))
    if asked:
        from secateur.sizes import export_size

        run = _staged(run, export_size, low, shape=options.shape, **asked)
        console.print(f"wrote {run.model}; go on with `secateur verify {run.folder}`", markup=False, soft_wrap=True)
        if options.format == "hf":
            return None
        options = replace(options, shape=None)
    if options.format == "gguf":
        from secateur.equivalence import gguf_stage

        kind, shape = options.gguf_type, options.shape
        path, written = _staged(run, gguf_stage, low, kind=kind, shape=shape)
        return console.print(f"wrote {path} ({written})", markup=False, soft_wrap=True)
    _staged(run, "export_stage", low, shape=options.shape)
    return console.print(f"wrote {run.model}", markup=False, soft_wrap=True)


def sizes(options: Sizes) -> None:
    """`secateur sizes`."""
    from secateur.pareto import compare_sizes, show

    run = _open(options, sweeps=True)
    show(console, _staged(run, compare_sizes), run.folder / "sizes.png")


def verify(options: Verify) -> None:
    """`secateur verify`."""
    if options.runtime != "transformers":
        from secateur.equivalence import runtime_stage, table

        own = {name: getattr(options, name) for name in ("runtime", "prompts", "new_tokens")}
        return console.print(table(_staged(_open(options), runtime_stage, **own)))
    for c in _staged(_open(options), "verify_stage"):
        console.print(f"{c.dtype}: logits differ by at most {c.max_difference:.2g} on {c.tokens:,} tokens: passed")
    return None


def refit(options: Refit) -> None:
    """`secateur refit`."""
    run = _open_with(options, offload="none")
    for done in _staged(run, "refit_stage"):
        ridge = "no ridge lowered it" if done.ridge is None else f"ridge {done.ridge:g}"
        console.print(f"held-out loss {done.held_out_before:.4f} → {done.held_out_after:.4f} ({ridge})")


def recover(options: Recover) -> None:
    """`secateur recover`."""
    run = _open_with(options, offload="none")
    updates = _staged(run, "recover_stage")
    console.print(f"wrote {run.model} ({', '.join(updates)})", markup=False, soft_wrap=True)


def evaluate(options: Eval) -> None:
    """`secateur eval`."""
    run = _open_with(options)
    _print(run, _staged(run, "eval_stage"))


def bench(options: Bench) -> None:
    """`secateur bench`."""
    from secateur.bench_table import command

    command(options, lambda said: console.print(said, markup=False, soft_wrap=True), console)


def report(options: Report) -> None:
    """`secateur report`."""
    from secateur.report.page import write_report

    console.print(f"wrote {write_report(options.runs, options.out)}", markup=False, soft_wrap=True)


def push(options: Push) -> None:
    """`secateur push`."""
    from secateur.push import push
    from secateur.run import open_one

    own = {name: value for name, value in vars(options).items() if name != "run"}
    pushed = push(open_one(options.run, trust_remote_code=None), **own)
    for line in pushed.lines():
        console.print(line, markup=False, soft_wrap=True)
    done = f"pushed to {pushed.url}" if pushed.url else f"nothing was sent; without --dry-run it goes to {options.repo}"
    console.print(done, markup=False, soft_wrap=True)


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "prune": (Prune, prune),
    "inspect": (Inspect, inspect),
    "estimate": (Estimate, estimate),
    "learn": (Learn, learn),
    "plan": (Plan, plan),
    "export": (Export, export),
    "sizes": (Sizes, sizes),
    "verify": (Verify, verify),
    "refit": (Refit, refit),
    "recover": (Recover, recover),
    "eval": (Eval, evaluate),
    "bench": (Bench, bench),
    "report": (Report, report),
    "push": (Push, push),
}
IN_RANKS = ("prune", "learn")
"""Commands that several processes share."""


# --- what they share -------------------------------------------------------------------------------------------------


def _open(options: OnRun, sweeps: bool = False, folder: Path | None = None) -> "Run":
    """The run of a command; with `folder` another one that belongs to it."""
    from secateur.run import open_one, open_run

    return (open_run if sweeps else open_one)(folder or options.run, options.trust_remote_code)


def _open_with(options: Any, **settings: Any) -> "Run":
    """The run, its settings overridden by what the options of a stage say, and others."""
    run, ours = _open(options), ("run", "trust_remote_code")
    own = {name: value for name, value in vars(options).items() if name not in ours and value not in (None, ())}
    own |= settings
    return replace(run, config=replace(run.config, **own))


def _asked(options: Plan | Export) -> dict[str, Any]:
    """The other size that is asked for, if one is."""
    asked = {"sparsity": options.sparsity, "budget": options.budget}
    return asked if options.sparsity is not None or options.budget else {}


def _staged(run: "Run", stage: str | Callable[..., Any], low_memory: bool = False, **options: Any) -> Any:
    """Runs a stage (its function, or its name in stages.py), or all of them, with progress on the screen."""
    from secateur import stages
    from secateur.listeners import Listeners
    from secateur.logs import logs_of
    from secateur.progress import Screen
    from secateur.ranks import INTERRUPTED, here
    from secateur.session import Session

    console.print(f"run folder: {run.folder}", markup=False, soft_wrap=True)
    if (count := here().count) > 1:
        c = run.config
        console.print(f"{count} ranks learn, {c.rows_a_pass(count)} of {c.batch_size} sequences at once on each")
    try:
        with Screen(console, run.config) as screen, logs_of(run) as logs:
            function = getattr(stages, stage) if isinstance(stage, str) else stage
            return function(Session(run, Listeners([screen, *logs]), low_memory), **options)
    except KeyboardInterrupt:
        again = f"secateur prune --resume {run.folder}" if stage == "remaining_stages" else "the same command"
        with interrupts.held_back():  # a launcher interrupts once more
            reason = here().why() or INTERRUPTED
            errors.print(f"{reason}; nothing is lost, go on with: {again}", markup=False)
            sys.exit(130)
    except stages.VerificationFailed as error:
        errors.print(f"secateur: {error}", markup=False)
        sys.exit(1)


def _print(run: "Run", results: dict[str, Any]) -> None:
    from secateur.card import print_results

    print_results(console, run, results)


def _overview() -> None:
    console.print(f"secateur {__version__}: makes language models smaller by structured pruning\n")
    for name, (kind, _function) in COMMANDS.items():
        console.print(f"  secateur {name:<8} {(kind.__doc__ or '').splitlines()[0]}", markup=False)
    console.print("\n`secateur COMMAND --help` lists a command's options.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 the export failed verification, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        return _overview()
    if name == "--version":
        return console.print(__version__)
    if name not in COMMANDS:
        errors.print(f"secateur: no command {name!r}; there are {', '.join(COMMANDS)}", markup=False)
        sys.exit(2)
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, which transformers does
    interrupts.listen()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return _in_ranks(name, arguments[1:])
    return _command(name, arguments[1:])


def _in_ranks(name: str, arguments: Sequence[str]) -> None:
    """The command in one of several processes that a launcher has started: rank 0 does it, the others help."""
    from secateur import ranks

    with _errors_in_lines():
        own = ranks.join()
    if not own.first:
        _prepare()
        return ranks.follow(own)
    with ranks.led(own):
        if name not in IN_RANKS:
            errors.print(f"secateur: {name} runs in one process, not in {own.count}; start one", markup=False)
            sys.exit(2)
        _command(name, arguments)
    return None


def _command(name: str, arguments: Sequence[str]) -> None:
    with _errors_in_lines():
        options = parse(name, COMMANDS[name][0], arguments)
        _prepare()
        COMMANDS[name][1](options)


@contextmanager
def _errors_in_lines() -> Iterator[None]:
    """What a user can put right within is said in one line, and ends the program."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)
    except InputError as error:
        errors.print(f"secateur: {error}", markup=False)
        sys.exit(2)
    except SafetensorError as error:
        errors.print(f"secateur: a safetensors file of the run is broken: {error}", markup=False)
        sys.exit(2)
    except OSError as error:
        where = error.filename or "while reading or writing"
        errors.print(f"secateur: {error.strerror or error}: {where}", markup=False)
        sys.exit(2)


def _prepare() -> None:
    """Quietens libraries whose bars and notices would break ours, and sets up the CPU."""
    from logging import getLogger

    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("accelerate").setLevel("ERROR")  # which says that weights are where --offload leaves them
    torch.set_flush_denormal(True)
