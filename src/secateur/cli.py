"""The command line: a subcommand is one dataclass and one function; what a user can put right is one line, exit code 2.

Help texts are the docstrings of the dataclasses' fields. `Config` serves `prune`; the stages read it from RUN.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from safetensors import SafetensorError

from secateur import __version__, interrupts
from secateur.config import LEARNING_FIELDS, AnyShape, Config, load_config
from secateur.files import InputError
from secateur.measure import Bench

if TYPE_CHECKING:
    from secateur.run import Run

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


# --- options ---------------------------------------------------------------------------------------------------------


@dataclass
class Prune(Config):
    """Prune a model: learn gates, remove what they close, export, verify and evaluate the smaller model.

    Example: secateur prune HuggingFaceTB/SmolLM2-135M --sparsity 0.2 --data texts/ --out runs/smol --steps 300
    """

    config: Path | None = None
    """Take all settings from this file (RUN/config.yaml repeats a run); options given beside it win."""
    resume: Path | None = None
    """Go on with an interrupted run in this folder; its own settings apply."""

    def __post_init__(self) -> None:
        """Leaves it to `prune` to make a Config of these: there its errors are one line, not a box of the parser's."""


@dataclass
class Inspect:
    """List what can be pruned in a model, and what is refused and why. Reads no weights, but for `--data`."""

    model: tyro.conf.Positional[str]
    """Local folder, hub id, or GGUF file."""
    data: str | None = None
    """Text, as for `prune`: count which experts of a mixture its tokens are sent to."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the checkpoint."""


@dataclass
class Learn:
    """Learn the gates of a run again, from its settings and data: gates.safetensors, metrics.jsonl."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""


@dataclass
class Plan:
    """Round the learned gates to the budget: plan.json."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    shape: AnyShape = None
    """Widths of the export, as for `prune` (default: the run's); says what they cost beside ragged ones."""
    compare: bool = False
    """Say what each usual shape, and `--shape`, would cost in loss and save in bytes and FLOPs, and write nothing."""


@dataclass
class Export:
    """Write the pruned checkpoint, RUN/model. With --shape, plan anew for that shape first."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    shape: AnyShape = None
    """Widths of the export, as for `prune` (default: the plan's)."""
    low_memory: bool = False
    """Leave the dense weights on disk and cut one after the other: for models larger than memory. Takes a second copy
    of them in the run folder meanwhile. Memory: a few times the largest weight, and a shard (`--max-shard-size`)."""
    format: Literal["hf", "gguf"] = "hf"
    """`hf`: the checkpoint itself; `gguf`: what is there, else made, in one file, RUN/model-TYPE.gguf."""
    gguf_type: Literal["f32", "f16", "q8_0"] = "f16"
    """Type of the matrices in a GGUF file; norms stay f32."""


@dataclass
class Verify:
    """Compare the logits of the gated and the exported model on held-out text: verify.json."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    runtime: Literal["transformers", "llamacpp", "vllm"] = "transformers"
    """Others: compare greedy text of the export there and in transformers instead: verify-RUNTIME.json."""
    prompts: int = 8
    """Held-out rows whose first 32 tokens another runtime goes on from."""
    new_tokens: int = 32
    """Tokens that it writes."""


@dataclass
class Refit:
    """Solve the output projections of the export anew for the dense model's outputs: RUN/model, refit.json."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    refit_rounds: int | None = None
    """Rounds, with gate values learned again in between (default: the run's)."""
    refit_tokens: int | None = None
    """Calibration tokens that a round is solved on (default: the run's, else an eighth of them)."""


@dataclass
class Recover:
    """Train the weights of the export with the dense model as teacher: RUN/model, recover.jsonl.

    Example: secateur recover RUN --recover lora --recover-steps 200
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    recover: Literal["lora", "full"] | None = None
    """Low-rank updates, merged, or all weights of the layers (default: the run's)."""
    recover_steps: int | None = None
    """Steps, on the run's calibration tokens (default: the run's, else as many as gates were learned in)."""
    recover_lr: float | None = None
    """Peak step size (default: the run's, else 3e-3 for `lora`, 3e-4 for `full`)."""
    recover_rank: int | None = None
    """Rank of the updates that `lora` learns (default: the run's)."""


@dataclass
class Eval:
    """Measure perplexity, sizes and zero-shot tasks, dense against pruned: eval.json.

    Example: secateur eval RUN --tasks arc_easy piqa my_items.jsonl --task-limit 500
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    eval_data: str | None = None
    """Text for the perplexities (default: the run's)."""
    eval_join: Literal["raw", "lines"] | None = None
    """`raw`: text files as they are; `lines`: the papers' WikiText-2 protocol (default: the run's)."""
    eval_windows: int | None = None
    """Windows of evaluation text, 0 for all of it (default: the run's)."""
    eval_length: int | None = None
    """Tokens a window (default: the run's)."""
    tasks: tuple[str, ...] = ()
    """Zero-shot tasks: names of lm-eval's tasks, or files of items (.jsonl; .gz, .zst) (default: the run's)."""
    task_limit: int | None = None
    """Items a task, a random sample by the run's seed (default: the run's, else all)."""


# --- commands --------------------------------------------------------------------------------------------------------


def prune(options: Prune) -> None:
    """`secateur prune`."""
    from secateur.run import new_run, open_run

    if options.resume is not None:
        run = open_run(options.resume)
    else:
        run = new_run(Config(**{f.name: getattr(options, f.name) for f in fields(Config)}))
    _print(run, _staged(run, "remaining_stages"))


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


def learn(options: Learn) -> None:
    """`secateur learn`."""
    _staged(_open(options.run), "learn_stage")


def plan(options: Plan) -> None:
    """`secateur plan`."""
    from secateur.planning import said, show

    if options.compare:
        return show(console, *_staged(_open(options.run), "compare_shapes", shape=options.shape))
    rounding, beside = _staged(_open(options.run), "plan_beside_ragged", shape=options.shape)
    console.print(said(rounding))
    if beside is not None:
        console.print(beside, markup=False)
    return None


def export(options: Export) -> None:
    """`secateur export`."""
    run = _open(options.run)
    if options.format == "gguf":
        from secateur.equivalence import gguf_stage

        kind, shape = options.gguf_type, options.shape
        path, written = _staged(run, gguf_stage, kind=kind, shape=shape, low_memory=options.low_memory)
        return console.print(f"wrote {path} ({written})", markup=False, soft_wrap=True)
    _staged(run, "export_stage", shape=options.shape, low_memory=options.low_memory)
    return console.print(f"wrote {run.model}", markup=False, soft_wrap=True)


def verify(options: Verify) -> None:
    """`secateur verify`."""
    if options.runtime != "transformers":
        from secateur.equivalence import runtime_stage, table

        own = {name: getattr(options, name) for name in ("runtime", "prompts", "new_tokens")}
        return console.print(table(_staged(_open(options.run), runtime_stage, **own)))
    for c in _staged(_open(options.run), "verify_stage"):
        console.print(f"{c.dtype}: logits differ by at most {c.max_difference:.2g} on {c.tokens:,} tokens: passed")
    return None


def refit(options: Refit) -> None:
    """`secateur refit`."""
    run = _open_with(options)
    for done in _staged(run, "refit_stage"):
        ridge = "no ridge lowered it" if done.ridge is None else f"ridge {done.ridge:g}"
        console.print(f"held-out loss {done.held_out_before:.4f} → {done.held_out_after:.4f} ({ridge})")


def recover(options: Recover) -> None:
    """`secateur recover`."""
    run = _open_with(options)
    updates = _staged(run, "recover_stage")
    console.print(f"wrote {run.model} ({', '.join(updates)})", markup=False, soft_wrap=True)


def evaluate(options: Eval) -> None:
    """`secateur eval`."""
    run = _open_with(options)
    _print(run, _staged(run, "eval_stage"))


def bench(options: Bench) -> None:
    """`secateur bench`."""
    from secateur.bench import bench_run, show

    show(console, bench_run(_open(options.run), options, lambda said: console.print(said, markup=False)))


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "prune": (Prune, prune),
    "inspect": (Inspect, inspect),
    "learn": (Learn, learn),
    "plan": (Plan, plan),
    "export": (Export, export),
    "verify": (Verify, verify),
    "refit": (Refit, refit),
    "recover": (Recover, recover),
    "eval": (Eval, evaluate),
    "bench": (Bench, bench),
}


# --- what they share -------------------------------------------------------------------------------------------------


def _open(folder: Path) -> "Run":
    from secateur.run import open_run

    return open_run(folder)


def _open_with(options: Any) -> "Run":
    """The run, its settings overridden by what the options of a stage say."""
    run = _open(options.run)
    own = {name: value for name, value in vars(options).items() if name != "run" and value not in (None, ())}
    return replace(run, config=replace(run.config, **own))


def _staged(run: "Run", stage: str | Callable[..., Any], **options: Any) -> Any:
    """Runs a stage (its function, or its name in stages.py), or all of them, with progress on the screen."""
    from secateur import stages
    from secateur.progress import Screen
    from secateur.session import Session

    console.print(f"run folder: {run.folder}", markup=False, soft_wrap=True)
    try:
        with Screen(console, run.config) as screen:
            function = getattr(stages, stage) if isinstance(stage, str) else stage
            return function(Session(run, screen), **options)
    except KeyboardInterrupt:
        again = f"secateur prune --resume {run.folder}" if stage == "remaining_stages" else "the same command"
        errors.print(f"interrupted; nothing is lost, go on with: {again}", markup=False)
        sys.exit(130)
    except stages.VerificationFailed as error:
        errors.print(f"secateur: {error}", markup=False)
        sys.exit(1)


def _print(run: "Run", results: dict[str, Any]) -> None:
    from secateur.card import print_results

    print_results(console, run, results)


def _defaults(arguments: Sequence[str]) -> Prune | None:
    """The settings that `--config` or `--resume` bring, as defaults for the other options of `prune`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--resume", type=Path)
    given, _ = parser.parse_known_args(arguments)
    path = given.config if given.config is not None else given.resume and given.resume / "config.yaml"
    return None if path is None else Prune(**vars(load_config(path)), config=given.config, resume=given.resume)


def _parse(name: str, arguments: Sequence[str]) -> Any:
    kind = COMMANDS[name][0]
    default = _defaults(arguments) if kind is Prune else None
    if default is None:
        return tyro.cli(kind, args=arguments, prog=f"secateur {name}")
    options = tyro.cli(kind, args=arguments, prog=f"secateur {name}", default=replace(default, budget=()))
    options.budget = options.budget or default.budget
    if any(getattr(options, f) != getattr(default, f) for f in LEARNING_FIELDS):
        options.learning = None
    scoped = ("shape", "recipe", "method")
    if any(getattr(options, f) != getattr(default, f) for f in scoped) and options.per == default.per:
        options.per = None  # what the file holds is the default of the other shape, recipe or method
    return options


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
    try:
        options = _parse(name, arguments[1:])
        _prepare()
        COMMANDS[name][1](options)
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
    return None


def _prepare() -> None:
    """Quietens libraries whose bars and notices would break ours, and sets up the CPU."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_flush_denormal(True)
