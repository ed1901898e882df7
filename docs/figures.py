"""The figures of docs/method.md, drawn while the site is built, by the code that they are about.

What gates stand for is computed here by objective.py. How a run goes is read from figures.json, an extract of the run
of the tutorial on the real model; written anew by `python docs/figures.py RUN`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from secateur.objective import forward_gate, retention_score
from secateur.recipes import auto_recipe
from secateur.report.svg import FAINT, INK, drawing, markup, series

EXTRACT = Path(__file__).with_name("figures.json")
KEYS = ("step", "kept", "score", "target", "lambda1", "lambda2", "lambda3")
LAMBDAS = {"lambda1": "λ₁", "lambda2": "λ₂", "lambda3": "λ₃"}
BINS = 40
WIDE, HALF = (7.6, 3.0), 2


def extract(folder: Path) -> dict[str, Any]:
    """What the figures show of a finished run: its lines of metrics, and how its gates are spread."""
    from secateur.gates import architecture_fingerprint, by_group, load_gates
    from secateur.load import describe_pretrained
    from secateur.run import open_one

    run = open_one(folder)
    description, _ = describe_pretrained(run.config.model)
    gates = load_gates(run.gates, description.groups, architecture_fingerprint(description.groups, description.shapes))
    values = by_group(gates.deployed(), gates.groups)
    kinds = dict.fromkeys(g.kind for g in gates.groups)
    spread: dict[str, Any] = {}
    highest = float(gates.deployed().max())
    edges = np.linspace(0, highest, BINS + 1)
    for kind in kinds:
        all_N = torch.cat([values[g.name] for g in gates.groups if g.kind == kind])
        counts, _ = np.histogram(all_N[all_N > 0].numpy(), edges)
        spread[kind] = {"closed": int((all_N <= 0).sum()), "open": counts.tolist()}
    metrics = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    recipe = run.config.resolved().learning
    assert recipe is not None
    c = run.config
    return {
        "model": Path(c.model).stem,
        "settings": {"sparsity": c.sparsity, "steps": c.steps, "seq_len": c.seq_len, "batch_size": c.batch_size},
        "settles_at": c.steps - int(recipe.settle * c.steps),
        "metrics": {key: [line[key] for line in metrics] for key in KEYS},
        "edges": [round(float(edge), 4) for edge in edges],
        "gates": spread,
    }


def rounded(value: Any) -> Any:
    """The same with four digits that count: enough to draw."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return {key: rounded(part) for key, part in value.items()} if isinstance(value, dict) else value


def gate_functions() -> str:
    """The forward gate, and the retention score along the annealing."""
    recipe = auto_recipe(100)
    z_N = torch.linspace(-0.1, 0.5, 301)
    with drawing():
        figure = Figure(WIDE, layout="constrained")
        left, right = figure.subplots(1, HALF)
        left.plot(z_N, forward_gate(z_N), color=series(0))
        left.set(xlabel="parameter z", ylabel="gate m = ReLU(z)")
        middle = (recipe.mu_start + recipe.mu_end) / 2
        for number, mu in enumerate((recipe.mu_start, middle, recipe.mu_end)):
            right.plot(z_N, retention_score(z_N, mu), color=series(number), label=f"μ = {mu:g}")
        right.set(xlabel="parameter z", ylabel="retention score s")
        right.legend(loc="lower right")
    return markup(
        figure, "gate-functions", "Gate and retention score as functions of z",
        f"Left: the gate is 0 for z up to 0 and z above. Right: the score rises from 0 at z = 0 to 1 at z = 2μ; "
        f"for μ = {recipe.mu_start:g} it is 1 from z = {2 * recipe.mu_start:g} on, for μ = {recipe.mu_end:g} from "
        f"z = {2 * recipe.mu_end:g} on, so that it comes close to the step at z = 0.",
    )  # fmt: skip


def along_a_run() -> str:
    """The share that is kept, and the multipliers, step by step."""
    found = json.loads(EXTRACT.read_text(encoding="utf-8"))
    m, fixed = found["metrics"], found["settles_at"]
    with drawing():
        figure = Figure(WIDE, layout="constrained")
        left, right = figure.subplots(1, HALF)
        left.plot(m["step"], m["score"], color=series(0), label="score s̄")
        left.plot(m["step"], m["kept"], color=series(1), label="open gates")
        left.plot(m["step"], m["target"], color=INK, linestyle=":", label="budget ρ")
        left.set(xlabel="step", ylabel="share of the units' parameters")
        for number, (name, label) in enumerate(LAMBDAS.items()):
            start = m[name][0][0]
            less = f" − {start:g}" if start else ""
            right.plot(m["step"], [c[0] - start for c in m[name]], color=series(number), label=label + less)
        right.set(xlabel="step", ylabel="multiplier")
        for axes in (left, right):
            settled(axes, fixed)
            axes.legend()
    first, last = m["score"][0], m["kept"][-1]
    lambdas = ", ".join(f"{label} {m[name][-1][0]:.3g}" for name, label in LAMBDAS.items())
    return markup(
        figure, "along-a-run", "Budget and multipliers along a run",
        f"Left: the score begins at {first:.3f} and the share of open gates ends at {last:.3f}, the budget being "
        f"{m['target'][-1]:.3f}. Right: the multipliers, {lambdas} at the end. The kept set is fixed before step "
        f"{fixed + 1}, from where on the multipliers stand still.",
    )  # fmt: skip


def settled(axes: Axes, step: int) -> None:
    """Marks the step from which on the kept set is fixed."""
    axes.axvline(step + 0.5, color=FAINT, linewidth=1.4)
    axes.annotate("fixed", (step + 0.5, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0),
                  textcoords="offset points", fontsize=8, color=INK)  # fmt: skip


def spread_of_gates() -> str:
    """How the gate values of the units that stay are spread, by kind."""
    found = json.loads(EXTRACT.read_text(encoding="utf-8"))
    edges = np.array(found["edges"])
    parts = []
    with drawing():
        figure = Figure(WIDE, layout="constrained")
        for number, (axes, (kind, of_kind)) in enumerate(
            zip(np.atleast_1d(figure.subplots(1, len(found["gates"]))), found["gates"].items(), strict=True)
        ):
            count = of_kind["closed"] + sum(of_kind["open"])
            axes.stairs(of_kind["open"], edges, fill=True, color=series(number))
            name = kind.replace("_", " ").replace("kv", "KV")
            axes.set(xlabel="gate", ylabel=name, title=f"{of_kind['closed']:,} of {count:,} {name} are closed")
            within = sum(n for n, e in zip(of_kind["open"], edges, strict=False) if 0.5 <= e < 1.5)
            parts.append(f"{of_kind['closed']:,} of {count:,} {name} are closed, {within:,} have gates of 0.5 to 1.5")
    return markup(
        figure, "spread-of-gates", "Spread of the learned gates",
        "; ".join(parts) + f"; the largest gate is {edges[-1]:.2f}.",
    )  # fmt: skip


FIGURES: dict[str, Callable[[], str]] = {
    "gate_functions": gate_functions,
    "along_a_run": along_a_run,
    "spread_of_gates": spread_of_gates,
}
"""Name on a page → the figure as SVG."""

if __name__ == "__main__":
    EXTRACT.write_text(json.dumps(rounded(extract(Path(sys.argv[1])))) + "\n", encoding="utf-8")
