"""A run as its report sees it: all that its files say, and what they do not; needs no model.

A file that is missing or broken ends in a line of `problems`, not in an error: a run that stopped half-way is worth a
page, too. Serves `secateur report`.

Shape suffixes: N units of a group, T steps, C constraints.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.card import protocol, summary, warnings
from secateur.files import InputError
from secateur.gates import read_gates
from secateur.recipes import ONE_SHOT
from secateur.report import files
from secateur.run import Run, open_run
from secateur.updates import refitted, updates_of

Array = NDArray[Any]

GROUP = re.compile(r"layers\.(\d+)\.(\w+)")

KINDS = {
    "heads": "attention heads",
    "kv_groups": "KV groups",
    "channels": "MLP channels",
    "expert_channels": "experts' channels",
    "shared_channels": "shared experts' channels",
    "attention": "attention sublayers",
    "mlp": "MLP sublayers",
}
"""Kind of unit → how it reads."""


@dataclass(frozen=True)
class Units:
    """The units of one sublayer: which are kept, and with which gate value."""

    layer: int
    kind: str
    value_N: Array
    """Gate value as deployed, 0 where removed."""
    experts: int = 0
    """Experts among which they are divided evenly; 0: there are none, or the files do not say."""

    @property
    def kept(self) -> Array:
        """Which are kept. A unit whose gate value is 0 does nothing, kept or not."""
        return self.value_N > 0

    @property
    def share(self) -> float:
        """Share that is kept."""
        return float(self.kept.mean())


@dataclass(frozen=True)
class Stage:
    """A stage of a run, and whether it is done."""

    name: str
    file: str
    what: str
    done: bool
    command: str
    seconds: float | None


@dataclass
class Record:
    """Everything that is known of a run."""

    run: Run
    label: str
    number: int
    """Its place among the runs of a report, from 0."""
    stages: list[Stage] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What is missing or broken, and what to do, a line each."""
    about: dict[str, Any] = field(default_factory=dict)
    """What the gates file says of itself."""
    groups: list[Units] = field(default_factory=list)
    planned: bool = False
    """Whether `groups` are those of the plan; else gates as learned."""
    steps: dict[str, Array] = field(default_factory=dict)
    """Name of a figure → its values along the steps, shape (T,), or (T, C) for multipliers."""
    recovery: dict[str, Array] = field(default_factory=dict)
    rounding: dict[str, float] | None = None
    evaluation: dict[str, Any] | None = None
    verification: dict[str, Any] | None = None
    equivalences: list[dict[str, Any]] = field(default_factory=list)
    refits: list[dict[str, Any]] = field(default_factory=list)
    benches: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    model_config: dict[str, Any] = field(default_factory=dict)
    """config.json of the export."""

    @property
    def ratio(self) -> tuple[float, float]:
        """Perplexity of the pruned model as a multiple of the dense one's, and its standard error over the windows of
        text; NaN where it is not known."""
        if self.evaluation is None:
            return math.nan, math.nan
        ratio = self.evaluation["pruned"]["perplexity"] / self.evaluation["dense"]["perplexity"]
        error = self.evaluation.get("loss_change_stderr")
        return ratio, math.nan if error is None else ratio * error  # of exp(change), to first order

    @property
    def learns(self) -> bool:
        """Whether its method learns gates, rather than scoring units once."""
        return self.run.config.method not in ONE_SHOT

    def kinds(self) -> list[str]:
        """The kinds of its units, in a fixed order."""
        return [kind for kind in KINDS if any(units.kind == kind for units in self.groups)]

    def of(self, kind: str) -> list[Units]:
        """Its units of a kind, by layer."""
        return sorted((units for units in self.groups if units.kind == kind), key=lambda units: units.layer)


def read_runs(folders: Sequence[Path]) -> list[Record]:
    """The runs in these folders, each once. Raises InputError for a folder that is no run."""
    runs = [
        open_run(folder, trust_remote_code=None) for folder in {folder.resolve(): folder for folder in folders}.values()
    ]
    names = [run.folder.resolve().name for run in runs]
    labels = [
        name if names.count(name) == 1 else f"{run.folder.resolve().parent.name}/{name}"
        for run, name in zip(runs, names, strict=True)
    ]
    return [read_run(run, label, number) for number, (run, label) in enumerate(zip(runs, labels, strict=True))]


def read_run(run: Run, label: str, number: int = 0) -> Record:
    """Reads all files of a run."""
    record = Record(run, label, number)
    folder = run.folder

    def take(path: Path, form: Any, command: str) -> Any:
        if not path.exists():
            return None
        try:
            return files.checked(path, form, f"secateur {command} {folder}")
        except InputError as error:
            record.problems.append(str(error))
            return None

    record.seconds = take(run.timings, dict[str, float], "prune --resume") or {}
    record.evaluation = take(run.eval, files.Evaluation, "eval")
    record.verification = take(run.verify, files.Verification, "verify")
    record.refits = take(run.refit, list[files.Refit], "refit") or []
    for path in sorted(folder.glob("verify-*.json")):
        runtime = path.stem.removeprefix("verify-")
        record.equivalences.append(take(path, files.Equivalence, f"verify --runtime {runtime}"))
    for path in sorted(folder.glob("bench-*.json")):
        record.benches.append(take(path, files.Bench, f"bench --runtime {path.stem.removeprefix('bench-')}"))
    record.equivalences = [found for found in record.equivalences if found]
    record.benches = [found for found in record.benches if found]
    record.model_config = take(run.model / "config.json", dict[str, Any], "export") or {}
    if record.evaluation is not None:
        try:
            summary(record.evaluation), warnings(record.evaluation), protocol(record.evaluation)
        except (KeyError, ZeroDivisionError) as error:
            record.evaluation = None
            record.problems.append(f"{run.eval} lacks what its figures need ({error!r}); run `secateur eval {folder}`")
    record.steps = _columns(record, run.metrics, files.Step)
    record.recovery = _columns(record, run.recover_metrics, files.RecoveryStep)
    plan = take(run.plan, files.Plan, "plan")
    record.rounding = None if plan is None else plan["rounding"]
    _read_units(record, plan)
    record.stages = _stages(record)
    _say_what_is_missing(record)
    return record


def _columns(record: Record, path: Path, form: Any) -> dict[str, Array]:
    """The lines of a training run by figure; what a line lacks is NaN."""
    if not path.exists():
        return {}
    rows, wrong = files.lines(path, form)
    record.problems += wrong
    rows = [_flat(row) for row in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    columns: dict[str, Array] = {}
    for name in names:
        values = [row.get(name, np.nan) for row in rows]
        if isinstance(values[0], list):
            width = max(len(value) for value in values)
            columns[name] = np.array([value + [np.nan] * (width - len(value)) for value in values], dtype=float)
        else:
            columns[name] = np.array(values, dtype=float)
    return columns


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line with what it has of each budget beside the rest: `budgets kv`."""
    flat = {name: value for name, value in row.items() if not isinstance(value, dict)}
    return flat | {f"budgets {kind}": share for kind, share in row.get("budgets", {}).items()}


def _read_units(record: Record, plan: dict[str, Any] | None) -> None:
    path, again = record.run.gates, f"secateur learn {record.run.folder}"
    if not path.exists():
        return
    try:
        found, record.about = read_gates(path)
    except InputError as error:
        record.problems.append(str(error))
        return
    tensors = {name: tensor.numpy() for name, tensor in found.items()}
    experts = record.about.get("experts", {})
    misfit = None
    for name, z_N in tensors.items():
        if not (place := GROUP.fullmatch(name)):
            continue  # values and means have names of their own
        value_N = tensors.get(f"value.{name}", z_N)
        value_N = np.where(z_N > 0, value_N if value_N.shape == z_N.shape else z_N, 0.0)
        if plan is not None:
            kept = np.array(plan["kept"].get(name, [-1]), dtype=int)
            scales = np.array(plan["scales"].get(name, []), dtype=float)
            if kept.shape != scales.shape or np.any((kept < 0) | (kept >= len(z_N))):
                misfit = misfit or name
            else:
                value_N = np.zeros(len(z_N))
                value_N[kept] = scales
        count = experts.get(name, 0)
        record.groups.append(Units(int(place[1]), place[2], value_N, count if count and len(z_N) % count == 0 else 0))
    record.planned = plan is not None and misfit is None
    if misfit:
        again = f"secateur plan {record.run.folder}"
        record.problems.append(f"{record.run.plan} does not fit the gates (at {misfit}); run `{again}` again")
    if any(units.kind == "expert_channels" and not units.experts for units in record.groups):
        record.problems.append(
            f"{path} does not say how many experts a layer has, so none can be told apart here; `{again}` writes it"
        )


def _stages(record: Record) -> list[Stage]:
    run, c = record.run, record.run.config
    updates, refit_done = list[str](), False
    try:
        updates, refit_done = updates_of(run.model), refitted(run.model, run.refit)
    except InputError as error:
        record.problems += [str(error)] * (str(error) not in record.problems)
    verified = record.verification is not None and record.verification["passed"]
    found = [
        ("learn", "gates.safetensors", "the gates", run.gates.exists()),
        ("plan", "plan.json", "what is kept", run.plan.exists()),
        ("export", "model/", "the pruned checkpoint", run.model.is_dir()),
        ("verify", "verify.json", "gated against exported logits", verified),
    ]
    if c.refit:
        found.append(("refit", "model/", "output projections solved anew", refit_done))
    if c.recover:
        found.append(("recover", "model/", "what is left, trained", f"recover-{c.recover}" in updates))
    found.append(("eval", "eval.json", "perplexity, sizes, tasks", record.evaluation is not None))
    return [
        Stage(name, file, what, done, f"secateur {name} {run.folder}", record.seconds.get(name))
        for name, file, what, done in found
    ]


def _say_what_is_missing(record: Record) -> None:
    run, first = record.run, []
    missing = [stage for stage in record.stages if not stage.done]
    if run.failed_model.is_dir() or (record.verification is not None and not record.verification["passed"]):
        first.append(
            f"the export failed verification: it does not compute what the gated model computes (see {run.verify}); "
            f"it was set aside as {run.failed_model.name}"
        )
    if missing and record.evaluation is not None:
        gone = ", ".join(f"{stage.file} ({stage.name})" for stage in missing)
        first.append(f"the run was finished, but of its files {gone} is missing or broken in {run.folder}")
    elif missing:
        names = ", ".join(stage.name for stage in missing)
        done = ""
        if not run.gates.exists() and record.steps:
            done = f" {len(record.steps['step']):,} of {run.config.steps:,} learning steps were done."
        first.append(
            f"this run stopped before its end.{done} Missing: {names}. `secateur prune --resume {run.folder}` goes on"
        )
    if record.learns and run.gates.exists() and not record.steps:
        first.append(f"{run.metrics} is missing or empty, so there are no learning curves")
    record.problems = first + record.problems
