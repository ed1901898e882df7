"""Options of the commands that make models: their help texts are the docstrings of the fields, as in cli.py.

`prune` reads its own alone, or over a file of settings, or over those of a run that goes on.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from secateur.config import LEARNING_FIELDS, AnyShape, Config, Words, load_config


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
class Learn:
    """Learn the gates of a run again, from its settings and data: gates.safetensors, metrics.jsonl.

    Example, many sizes in one go: secateur learn RUN --sweep 0.1:0.6
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    sweep: str | None = None
    """Learn several sizes, one after the other, as for `prune`: RUN/sizes. The run's own gates stay."""


@dataclass
class Plan:
    """Round the learned gates to the budget: plan.json."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    sparsity: float | None = None
    """Plan another size, from the same gates: RUN/sizes/0.35, a run of its own."""
    budget: Words = ()
    """The same by `--budget`, as for `prune`."""
    shape: AnyShape = None
    """Widths of the export, as for `prune` (default: the run's); says what they cost beside ragged ones."""
    compare: bool = False
    """Say what each usual shape, and `--shape`, would cost in loss and save in bytes and FLOPs, and write nothing."""


@dataclass
class Export:
    """Write the pruned checkpoint, RUN/model. With --shape, plan anew for that shape first.

    Example, another size from the same gates: secateur export RUN --sparsity 0.35
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    sparsity: float | None = None
    """Plan and write another size: RUN/sizes/0.35/model. That folder is a run of its own for all other commands; what
    it keeps lies in what larger sizes keep, and RUN/model stays."""
    budget: Words = ()
    """The same by `--budget`, as for `prune`."""
    pick: str | None = None
    """Write one of the sizes that there are, as for `prune`: `loss<=1.05`."""
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
class Sizes:
    """Compare a run's own size and those in RUN/sizes: loss against parameters, FLOPs, time. RUN/sizes.json, sizes.png.

    Time is there where `secateur bench` was run on a size.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""


def parse(name: str, kind: type, arguments: Sequence[str]) -> Any:
    """The options of a command, a dataclass `kind`. Ends the program with code 2 where the words say none.

    Of `prune`, what `--config` or `--resume` bring are the defaults of the others.
    """
    default = _defaults(arguments) if kind is Prune else None
    if default is None:
        return tyro.cli(kind, args=arguments, prog=f"secateur {name}")
    options = tyro.cli(Prune, args=arguments, prog="secateur prune", default=replace(default, budget=()))
    options.budget = options.budget or default.budget
    if options.sweep != default.sweep:  # the file's size gives way
        options.sparsity = None if options.sparsity == default.sparsity else options.sparsity
    if any(getattr(options, f) != getattr(default, f) for f in LEARNING_FIELDS):
        options.learning = None
    scoped = ("shape", "recipe", "method")
    if any(getattr(options, f) != getattr(default, f) for f in scoped) and options.per == default.per:
        options.per = None  # what the file holds is the default of the other shape, recipe or method
    return options


def _defaults(arguments: Sequence[str]) -> Prune | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--resume", type=Path)
    given, _ = parser.parse_known_args(arguments)
    path = given.config if given.config is not None else given.resume and given.resume / "config.yaml"
    return None if path is None else Prune(**vars(load_config(path)), config=given.config, resume=given.resume)
