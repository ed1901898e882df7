"""Options of the commands: their help texts are the docstrings of the fields.

`prune` reads its own alone, or over a file of settings, or over those of a run that goes on.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from secateur.config import LEARNING_FIELDS, AnyShape, Config, Words
from secateur.config_file import load_config, trusted


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
class Estimate(Config):
    """Estimate what `prune` would take with these settings: memory by part, tokens a second, hours. Downloads nothing
    but the configuration. Without `--sparsity` half of the units go. Exit code 2 where it would not fit.

    Example: secateur estimate Qwen/Qwen3-8B --hardware A100-80GB --batch-size 16
    """

    hardware: str = "present"
    """`present`: this machine, measured; or A100-40GB, A100-80GB, H100, H200, B200, L4, L40S, RTX-3090, RTX-4090,
    MI300X, by their data sheets."""
    devices: int = 1
    """Learn on so many of them, with as many ranks (`torchrun --nproc-per-node N -m secateur prune …`); memory is said
    for each."""

    def __post_init__(self) -> None:
        """Leaves it to `estimate`, as `Prune` does."""


@dataclass
class OnRun:
    """What the commands on a run share."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the model: to be said again on a run whose settings ask for it."""


@dataclass
class Learn(OnRun):
    """Learn the gates of a run again, from its settings and data: gates.safetensors, metrics.jsonl.

    Example, many sizes in one go: secateur learn RUN --sweep 0.1:0.6
    """

    sweep: str | None = None
    """Learn several sizes, one after the other, as for `prune`: RUN/sizes. The run's own gates stay."""


@dataclass
class Plan(OnRun):
    """Round the learned gates to the budget: plan.json."""

    sparsity: float | None = None
    """Plan another size, from the same gates: RUN/sizes/0.35, a run of its own."""
    budget: Words = ()
    """The same by `--budget`, as for `prune`."""
    shape: AnyShape = None
    """Widths of the export, as for `prune` (default: the run's); says what they cost beside ragged ones."""
    low_memory: bool = False
    """Do not load the model, as ever where not even what is outside of its layers fits in memory: the losses are not
    measured, and units that open again by rounding to the budget are whole."""
    compare: bool = False
    """Say what each usual shape, and `--shape`, would cost in loss and save in bytes and FLOPs, and write nothing."""


@dataclass
class Export(OnRun):
    """Write the pruned checkpoint, RUN/model. With --shape, plan anew for that shape first.

    Example, another size from the same gates: secateur export RUN --sparsity 0.35
    """

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
    """Leave the dense weights on disk and cut one after the other, as ever where they do not fit in memory. Memory: a
    few times the largest weight. Dense models are always exported so; of mixtures, whose experts are stored otherwise
    than they are used, it takes a second copy in the run folder meanwhile."""
    format: Literal["hf", "gguf"] = "hf"
    """`hf`: the checkpoint itself; `gguf`: what is there, else made, in one file, RUN/model-TYPE.gguf."""
    gguf_type: Literal["f32", "f16", "q8_0"] = "f16"
    """Type of the matrices in a GGUF file; norms stay f32."""


@dataclass
class Sizes(OnRun):
    """Compare a run's own size and those in RUN/sizes: loss against parameters, FLOPs, time. RUN/sizes.json, sizes.png.

    Time is there where `secateur bench` was run on a size.
    """


@dataclass
class Verify(OnRun):
    """Compare the logits of the gated and the exported model on held-out text: verify.json."""

    runtime: Literal["transformers", "llamacpp", "vllm"] = "transformers"
    """Others: compare greedy text of the export there and in transformers instead: verify-RUNTIME.json."""
    prompts: int = 8
    """Held-out rows whose first 32 tokens another runtime goes on from."""
    new_tokens: int = 32
    """Tokens that it writes."""


@dataclass
class Refit(OnRun):
    """Solve the output projections of the export anew for the dense model's outputs: RUN/model, refit.json."""

    refit_rounds: int | None = None
    """Rounds, with gate values learned again in between (default: the run's)."""
    refit_tokens: int | None = None
    """Calibration tokens that a round is solved on (default: the run's, else an eighth of them)."""


@dataclass
class Recover(OnRun):
    """Train the weights of the export with the dense model as teacher: RUN/model, recover.jsonl.

    Example: secateur recover RUN --recover lora --recover-steps 200
    """

    recover: Literal["lora", "full"] | None = None
    """Low-rank updates, merged, or all weights of the layers (default: the run's)."""
    recover_steps: int | None = None
    """Steps, on the run's calibration tokens (default: the run's, else as many as gates were learned in)."""
    recover_lr: float | None = None
    """Peak step size (default: the run's, else 3e-3 for `lora`, 3e-4 for `full`)."""
    recover_rank: int | None = None
    """Rank of the updates that `lora` learns (default: the run's)."""


@dataclass
class Eval(OnRun):
    """Measure perplexity, sizes and zero-shot tasks, dense against pruned: eval.json.

    Example: secateur eval RUN --tasks arc_easy piqa my_items.jsonl --task-limit 500
    """

    eval_data: str | None = None
    """Text for the perplexities (default: the run's)."""
    eval_join: Literal["raw", "lines"] | None = None
    """`raw`: text files as they are; `lines`: the papers' WikiText-2 protocol (default: the run's)."""
    eval_windows: int | None = None
    """Windows of `--eval-data`, 0 for all of it (default: the run's)."""
    eval_length: int | None = None
    """Tokens a window of `--eval-data` (default: the run's)."""
    tasks: tuple[str, ...] = ()
    """Zero-shot tasks: names of lm-eval's tasks, or files of items (.jsonl; .gz, .zst) (default: the run's)."""
    task_limit: int | None = None
    """Items a task, a random sample by the run's seed (default: the run's, else all)."""


@dataclass
class Push:
    """Upload a finished run to the Hugging Face Hub: checkpoint, card with figures, gates, plan, settings.

    Example: secateur push RUN --repo me/smol-pruned --private
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    repo: str
    """Repository, OWNER/NAME; it is made if it is not there."""
    private: bool = False
    """Make it a private one."""
    revision: str | None = None
    """Branch to push to, made if it is not there (default: main)."""
    with_report: bool = False
    """Send report.html, too."""
    dry_run: bool = False
    """List the files and their sizes, and send nothing."""


@dataclass
class Report:
    """Write a page to look at, of one run or of several side by side: RUN/report.html.

    Example: secateur report runs/a runs/b --out both.html
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, finished or not."""
    out: Path | None = None
    """File to write (default: RUN/report.html; of several runs ./report.html)."""


def parse(name: str, kind: type, arguments: Sequence[str]) -> Any:
    """The options of a command, a dataclass `kind`. Ends the program with code 2 where the words say none.

    Of `prune`, what `--config` or `--resume` bring are the defaults of the others.
    """
    default = _defaults(arguments) if kind is Prune else None
    if default is None:
        return tyro.cli(kind, args=arguments, prog=f"secateur {name}")
    asked = replace(default, budget=(), trust_remote_code=False)
    options: Prune = tyro.cli(Prune, args=arguments, prog="secateur prune", default=asked)
    if options.resume is None and options.config is not None:
        trusted(default, options.config, options.trust_remote_code)
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
