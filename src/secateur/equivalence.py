"""The exported checkpoint for other runtimes, and proof that they compute what transformers computes.

Serves `secateur export RUN --format gguf` and `secateur verify RUN --runtime llamacpp`. A runtime adds in another order
than transformers, so that the last digits differ, and where two tokens are worth the same, greedy text parts. How far
that goes is seen on the unpruned model, which is run in the same way beside the export.
"""

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
from rich.table import Table

from secateur.export import export
from secateur.exported import checked_export
from secateur.files import InputError, scratch_folder, write_json
from secateur.gguf_file import Written, write_gguf
from secateur.load import Loaded
from secateur.plan import Plan
from secateur.runtimes import Agreement, compare
from secateur.session import Session
from secateur.stages import VerificationFailed, export_stage
from secateur.updates import updates_of

PROMPT_TOKENS = 32
"""Tokens of each held-out row that runtimes go on from."""

NOISE_FACTOR = 8.0
"""Tolerance in units of the largest difference of a log-probability between the runtimes on the unpruned model: two
tokens move against each other, and a pruned model may amplify rounding a few times as much (as in verify.py)."""

NOISE = (1e-4, 1e-2)
"""What that difference is taken to be at least, for what 8 prompts may not show, and at most: a runtime that is further
off on the unpruned model, in float32, does not compute it."""


@dataclass(frozen=True)
class Equivalence:
    """How a runtime compares with transformers, on the export and on the unpruned model."""

    runtime: str
    reference: str
    passed: bool
    tolerance: float
    """Largest difference of a log-probability, and largest margin at a parting, that is put down to rounding."""
    new_tokens: int
    updates: list[str]
    """What was done to the export's weights after verification."""
    pruned: list[Agreement]
    dense: list[Agreement]


def gguf_stage(session: Session, kind: str, shape: str | None = None) -> tuple[Path, Written]:
    """Writes the export as one GGUF file, RUN/model-KIND.gguf; exports first if there is none, or not in that shape."""
    run = session.run
    if shape is not None or not (run.model.is_dir() or run.failed_model.is_dir()):
        export_stage(session, shape)
    out = run.folder / f"model-{kind}.gguf"
    with session.timed("gguf"):
        return out, write_gguf(checked_export(run), out, kind)


def runtime_stage(session: Session, runtime: str, prompts: int, new_tokens: int) -> Equivalence:
    """Compares greedy text of the export, and of the unpruned model: RUN/verify-RUNTIME.json.

    Raises VerificationFailed where they differ by more than rounding explains.
    """
    run = session.run
    for name, value in (("--prompts", prompts), ("--new-tokens", new_tokens)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    report = run.folder / f"verify-{runtime}.json"
    folder, module, reference = checked_export(run), _runtime(runtime), _runtime("hf")
    rows = session.blocks.held_out_NT[:prompts, :PROMPT_TOKENS].tolist()

    def agreements(model: Path) -> list[Agreement]:
        return compare(reference.greedy(model, rows, new_tokens), module.greedy(model, rows, new_tokens))

    with session.timed("runtime"), scratch_folder(run.folder, "dense") as temporary:
        pruned = agreements(folder)
        write_dense(session.loaded, temporary / "model", torch.float32)
        dense = agreements(temporary / "model")
        allowed = tolerance(dense)
        passed = all(within(a, allowed) for a in (*pruned, *dense))
        result = Equivalence(
            module.version(), reference.version(), passed, allowed, new_tokens, updates_of(folder), pruned, dense
        )
        write_json(report, asdict(result))
    if not passed:
        which, worst = next((w, a) for w, a in _named(result) if not within(a, allowed))
        parting = f", and they part after {worst.same} tokens at a margin of {worst.margin:.2g}" * (not worst.equal)
        raise VerificationFailed(
            f"{result.runtime} does not compute what {result.reference} computes of the {which} model: "
            f"log-probabilities differ by {worst.difference:.2g}"
            + parting
            + f" ({allowed:.2g} allowed); {report} has the figures"
        )
    return result


def tolerance(dense: Sequence[Agreement]) -> float:
    """What is put down to rounding, from the unpruned model's own differences."""
    largest = max(agreement.difference for agreement in dense)
    return NOISE_FACTOR * min(max(largest, NOISE[0]), NOISE[1])


def within(agreement: Agreement, allowed: float) -> bool:
    """Whether log-probabilities agree, and text parts at a near-tie, if at all. What is not a number does not agree."""
    return agreement.difference <= allowed and agreement.margin <= allowed


def table(result: Equivalence) -> Table:
    """What the screen shows."""
    title = f"{result.runtime} against {result.reference}, float32, greedy, {result.new_tokens} tokens a prompt"
    found = Table(title=title, title_justify="left")
    for column in ("", "prompts", "equal", "near-ties", "same tokens", "off by (nats)"):
        found.add_column(column, justify="right" if column else "left")
    for name, of in (("dense", result.dense), ("pruned", result.pruned)):
        parted = [a.margin for a in of if not a.equal]
        ties = f"{len(parted)} (margin {max(parted):.1g})" if parted else "0"
        equal, tokens = str(sum(a.equal for a in of)), str(sum(a.same for a in of))
        found.add_row(name, str(len(of)), equal, ties, tokens, f"{max(a.difference for a in of):.1g}")
    return found


def _named(result: Equivalence) -> list[tuple[str, Agreement]]:
    return [("unpruned", a) for a in result.dense] + [("pruned", a) for a in result.pruned]


def _runtime(name: str) -> ModuleType:
    """The module of a runtime. Raises InputError where what it needs is not installed."""
    try:
        return importlib.import_module(f"secateur.runtimes.{name}")
    except ModuleNotFoundError as error:
        reason = f"--runtime {name} needs {error.name}, which is not installed"
        raise InputError(f"{reason}; run: pip install 'secateur[{name}]'") from None


def write_dense(loaded: Loaded, folder: Path, dtype: torch.dtype) -> None:
    """The unpruned model as a checkpoint of its own."""
    groups = loaded.description.groups
    kept = {group.name: torch.arange(group.units) for group in groups}
    plan = Plan(kept, {name: torch.ones(len(index)) for name, index in kept.items()})
    export(loaded.model, None, loaded.description, plan, folder, dtype=dtype)
