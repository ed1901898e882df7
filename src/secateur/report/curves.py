"""How a run went: loss, learned sparsity against its target, multipliers, μ, and recovery. Equations: method.md §3."""

from collections.abc import Callable, Sequence

import numpy as np

from secateur.card import public_name
from secateur.guard import read_guards
from secateur.report.drawn import Drawn
from secateur.report.lines import Line, Panel
from secateur.report.reading import Array, Record

DUALS = {"lambda1": "λ₁, violation", "lambda2": "λ₂, its square", "lambda3": "λ₃, undecided gates"}

BANDED = "More steps than points: lines are means of stretches of steps, bands go from their least to their largest."


def learning_curves(records: Sequence[Record]) -> list[Drawn]:
    """Figures of learning: several lines each for one run, a line a run for several."""
    known = [record for record in records if record.steps]
    if not known:
        return []
    panels = _of_one(known[0]) if len(records) == 1 else _of_several(known)
    long = any(len(record.steps["step"]) > 400 for record in known)
    for panel in panels:
        panel.note = BANDED if long else ""
    return [panel.draw() for panel in panels if panel.lines]


def recovery_curves(records: Sequence[Record]) -> list[Drawn]:
    """Figures of recovery, where there was any."""
    known = [record for record in records if record.recovery]
    if not known:
        return []
    if len(records) == 1:
        steps = known[0].recovery
        lines = [
            _line(steps, *it) for it in (("loss", "loss", 0), ("cross-entropy", "ce", 1), ("distillation", "kl", 2))
        ]
    else:
        lines = [Line(r.label, r.recovery["step"], r.recovery["loss"], r.number, r.number) for r in known]
    return [Panel("recovery", "Recovery: loss", "step", "nats a token", lines).draw()]


def _line(steps: dict[str, Array], label: str, name: str, colour: int, style: str = "-") -> Line:
    return Line(label, steps["step"], steps[name], colour, None, style)


def _of_one(record: Record) -> list[Panel]:
    steps, at = record.steps, record.steps["step"]
    fixing = record.about.get("fixing")
    marks = [(float(fixing["step"]), "kept set fixed")] if isinstance(fixing, dict) and "step" in fixing else []
    loss = [_line(steps, *it) for it in (("loss", "loss", 0), ("cross-entropy", "ce", 1), ("distillation", "kl", 2))]
    for name, label, colour in (("held_out_trained", "held out, as trained", 3),
                                ("held_out_deployed", "held out, as deployed", 4)):  # fmt: skip
        if name in steps:
            there = np.isfinite(steps[name])
            loss.append(Line(label, at[there], steps[name][there], colour))
    removed = [
        Line("by retention score", at, 1 - steps["score"], 0),
        Line("gates closed", at, 1 - steps["kept"], 1),
    ]
    if "target" in steps:
        removed.append(Line("target", at, 1 - steps["target"], -1, None, "--"))
    several = steps["lambda1"].ndim == 2 and steps["lambda1"].shape[1] > 1
    words = ["There is one of each for every budget; lines are their means."] if several else []
    return [
        Panel("loss", "Loss", "step", "nats a token", loss, marks=marks),
        Panel("sparsity", "Learned sparsity against target", "step", "share removed", removed, marks=marks),
        *_bounds(record, marks),
        *(Panel(name, f"Multiplier {label}", "step", label.partition(",")[0], [_dual(steps, name, label, i)],
                marks=marks, words=words) for i, (name, label) in enumerate(DUALS.items())),
        Panel("mu", "Annealing: half width μ of the score", "step", "μ", [_line(steps, "μ", "mu", 0)], marks=marks),
    ]  # fmt: skip


def _bounds(record: Record, marks: Sequence[tuple[float, str]]) -> list[Panel]:
    """How budgets are spent, and what guards say, where there are any."""
    steps, at = record.steps, record.steps["step"]
    kinds = [name for name in steps if name.startswith("budgets ")]
    spent = [_line(steps, name.removeprefix("budgets "), name, i) for i, name in enumerate(kinds)]
    rises = [
        Line(public_name(guard.data), at, steps["guard_rises"][:, i], i)
        for i, guard in enumerate(read_guards(record.run.config.guard) if "guard_rises" in steps else ())
    ]
    return [
        *([Panel("budgets", "Budgets: what is asked for, over what is allowed", "step", "share of the bound", spent,
                 marks=marks)] if spent else []),
        *([Panel("guards", "Guards: loss of a batch above the unpruned model's", "step", "nats a token", rises,
                 marks=marks)] if rises else []),
    ]  # fmt: skip


def _dual(steps: dict[str, Array], name: str, label: str, colour: int, run: int | None = None) -> Line:
    values_TC = steps[name].reshape(len(steps["step"]), -1)
    band = (values_TC.min(1), values_TC.max(1)) if values_TC.shape[1] > 1 else (None, None)
    return Line(label, steps["step"], values_TC.mean(1), colour, run, "-", *band)


def _of_several(records: Sequence[Record]) -> list[Panel]:
    def lines(take: Callable[[dict[str, Array]], Array]) -> list[Line]:
        return [Line(r.label, r.steps["step"], take(r.steps), r.number, r.number) for r in records]

    targets = [Line(f"{r.label}, target", r.steps["step"], 1 - r.steps["target"], r.number, r.number, ":")
               for r in records if "target" in r.steps]  # fmt: skip
    duals = [
        Panel(name, f"Multiplier {label}", "step", label.partition(",")[0],
              [_dual(r.steps, name, r.label, r.number, r.number) for r in records])
        for name, label in DUALS.items()
    ]  # fmt: skip
    return [
        Panel("loss", "Loss", "step", "nats a token", lines(lambda steps: steps["loss"])),
        Panel("sparsity", "Learned sparsity (by retention score) against target", "step", "share removed",
              [*lines(lambda steps: 1 - steps["score"]), *targets]),
        *duals,
        Panel("mu", "Annealing: half width μ of the score", "step", "μ", lines(lambda steps: steps["mu"])),
    ]  # fmt: skip
