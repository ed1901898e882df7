"""Plans of a run for one shape, and what each shape would cost and save, before anything is written.

Serves `secateur plan RUN` and its `--compare`.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, prod
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from secateur.budget import Figures, figures
from secateur.card import human
from secateur.describe import Description
from secateur.files import InputError
from secateur.gates import load_gates
from secateur.methods import asked_of, budget_of
from secateur.order import kept_for
from secateur.plan import Plan, Rounding, make_plan
from secateur.policy import policy_of
from secateur.session import Session
from secateur.slicing import added_biases
from secateur.wanted import TIMES

SHAPES = ("ragged", "uniform", "padded", "aligned:32", "aligned:64", "aligned:128", "tp:2")
"""What `--compare` compares."""

HeldOutLoss = Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor] | None], float]
"""Loss with gates, and with the means that stand for what they remove."""


def plan_for(session: Session, shape: str, held_out_loss: HeldOutLoss | None = None) -> tuple[Plan, Rounding]:
    """The gates of a run, rounded to its budget for a shape. Raises InputError where that is not possible."""
    policy, measure = policy_of(shape), held_out_loss or session.held_out_loss
    c, description = session.config, session.description
    limits = budget_of(session, shape, "expert" if policy.uniform else c.per)
    gates = load_gates(session.run.gates, description.groups, session.architecture)
    if policy.uniform and gates.means is not None:
        raise InputError(
            f"--method {c.method} adds biases, which --shape {policy} has no place for; use --shape ragged"
        )
    if session.unloadable is None:  # else export looks at the weights
        session.check_weights(gates, session.run.gates)
    kept_N = kept_for(gates, limits, c.sparsity, c.budget)
    loss_of = None if session.unloadable else lambda gate: measure(gate, gates.means)
    plan, rounding = make_plan(gates, limits, str(policy), loss_of, kept_N)
    return plan, replace(rounding, budgets=tuple(held(session, plan)))


def held(session: Session, plan: Plan) -> Iterator[dict[str, Any]]:
    """Of each budget what it allows, and what the unpruned model and that of a plan have."""
    stored = plan.stored(session.description.groups)
    for b in asked_of(session):
        found = b.cost(stored)
        assert found <= b.allowed, f"the plan has {found} of {b.name}, which {b.allowed} bounds"
        dense, planned = (round(cost / b.scale) for cost in (b.dense, found))
        by = {"predicted_for": session.latency.conditions(b.wanted)} if b.wanted.kind in TIMES else {}
        yield {
            "budget": str(b.wanted), "counts": b.wanted.counts, "bound": b.most, "dense": dense, "pruned": planned, **by
        }  # fmt: skip


def said(rounding: Rounding) -> str:
    """What rounding did, in a line, and a line for each budget."""
    losses = "the held-out loss was not measured, as the model was not loaded"
    if rounding.held_out_planned is not None:
        losses = f"held-out loss {rounding.held_out_learned:.4f} → {rounding.held_out_planned:.4f}"
    first = (
        f"{rounding.kept:.2%} of the unit parameters kept ({rounding.allowed:.2%} allowed, {rounding.open_gates:.2%} "
        f"as learned); {losses}"
    )
    lines = (
        f"budget {b['budget']}: {b['pruned']:,} of at most {b['bound']:,} {b['counts']} ({b['dense']:,} unpruned)"
        + (f", predicted for {b['predicted_for']}" if "predicted_for" in b else "")
        for b in rounding.budgets
    )
    return "\n".join([first, *lines])


def remembered(session: Session) -> HeldOutLoss:
    """The held-out loss of a session, measured once for the same gates: many plans begin with those as learned."""
    found: dict[bytes, float] = {}

    def held_out_loss(gates: Mapping[str, torch.Tensor], means: Mapping[str, torch.Tensor] | None) -> float:
        values = torch.cat([gate.float().cpu() for gate in gates.values()]).contiguous()
        key = hashlib.sha256(values.numpy().tobytes()).digest()
        if key not in found:
            found[key] = session.held_out_loss(gates, means)
        return found[key]

    return held_out_loss


def figures_of(description: Description, plan: Plan, bytes_per_value: int) -> Figures:
    """Exact sizes of the model that a plan leaves."""
    added = sum(map(prod, added_biases(description, plan).values()))
    return figures(description, plan.sizes(description.groups), bytes_per_value, added)


@dataclass(frozen=True)
class ShapeCost:
    """What one way to ship the gates costs and saves."""

    shape: str
    held_out: float
    """Loss on held-out text, nats a token."""
    sizes: Figures
    disk_bytes: int
    closed_experts: int
    """Experts that are not stored."""
    kept: float = 1.0
    """Share of the parameters of units that is kept."""


def cost_of(session: Session, plan: Plan, rounding: Rounding) -> ShapeCost:
    """What a plan costs and saves; its loss is measured now where it was not before."""
    loaded = session.loaded
    groups, size = loaded.description.groups, loaded.checkpoint_dtype.itemsize
    found, stored = figures_of(loaded.description, plan, size), plan.sizes(groups)
    closed = sum(g.experts - stored[g.name].parts for g in groups if g.experts)
    held_out = rounding.held_out_planned
    if held_out is None:
        held_out = session.held_out_loss(plan.gates(groups), plan.means)
    return ShapeCost(plan.shape, held_out, found, found.parameters * size, closed, rounding.kept)


def compare_shapes(session: Session, shape: str | None = None) -> tuple[list[ShapeCost], list[str]]:
    """What each of `SHAPES`, and `shape`, would cost, the dense model first, and why one is not possible. Writes
    nothing."""
    asked = [] if shape is None else [str(policy_of(shape))]
    if session.unloadable:
        raise InputError(f"--compare measures losses, but {session.unloadable}; plan one shape at a time")
    loaded = session.loaded
    description, size = loaded.description, loaded.checkpoint_dtype.itemsize
    dense = figures(description, None, size)
    costs = [ShapeCost("dense", session.held_out_loss(None), dense, dense.parameters * size, 0)]
    refused = []
    held_out_loss = remembered(session)
    for each in dict.fromkeys([*SHAPES, *asked]):
        if each == "padded" and not any(g.experts for g in description.groups):
            continue
        try:
            costs.append(cost_of(session, *plan_for(session, each, held_out_loss)))
        except InputError as error:
            refused.append(f"{each}: {error}")
    return costs, refused


def against_ragged(
    session: Session, plan: Plan, rounding: Rounding, held_out_loss: HeldOutLoss | None = None
) -> str | None:
    """What a shape costs and saves beside ragged widths from the same gates and budget, in a line; None where it is
    ragged, or that has no plan, or no losses were measured."""
    if plan.shape == "ragged" or session.unloadable:
        return None
    try:
        ragged = cost_of(session, *plan_for(session, "ragged", held_out_loss))
    except InputError:
        return None
    own = cost_of(session, plan, rounding)
    rise = own.held_out - ragged.held_out
    pairs = [
        (f"{own.kept:.2%}", f"{ragged.kept:.2%}", "of the unit parameters kept"),
        (human(own.sizes.parameters), human(ragged.sizes.parameters), "parameters"),
        (human(own.sizes.flops_per_token), human(ragged.sizes.flops_per_token), "FLOPs a token"),
    ]
    told = ", ".join(f"{mine} for {other} {what}" for mine, other, what in pairs)
    return f"{plan.shape} beside ragged: held-out loss {rise:+.4f} (perplexity × {exp(rise):.4f}); {told}"


def show(console: Console, costs: Sequence[ShapeCost], refused: Sequence[str]) -> None:
    """What `--compare` prints."""
    console.print(shapes_table(costs))
    for line in refused:
        console.print(f"not possible: {line}", markup=False)


def shapes_table(costs: Sequence[ShapeCost]) -> Table:
    """A row a shape; what it saves is a share of the dense model's. What only mixtures have is left out elsewhere."""
    dense = costs[0]
    mixed = any(c.closed_experts or c.sizes.active_parameters != c.sizes.parameters for c in costs)

    def cell(found: float, whole: float, unit: str = "") -> str:
        return human(found, unit) + ("" if found == whole else f" (−{1 - found / whole:.1%})")

    def row(c: ShapeCost) -> dict[str, str]:
        rise = c.held_out - dense.held_out
        return {
            "shape": c.shape,
            "held-out loss": f"{c.held_out:.3f}" + ("" if c is dense else f" ({rise:+.3f})"),
            "perplexity": f"{exp(c.held_out):.4g}" + ("" if c is dense else f" (× {exp(rise):.3f})"),
            "units kept": f"{c.kept:.2%}",
            "parameters": cell(c.sizes.parameters, dense.sizes.parameters),
            **({"active": cell(c.sizes.active_parameters, dense.sizes.active_parameters)} if mixed else {}),
            "FLOPs a token": cell(c.sizes.flops_per_token, dense.sizes.flops_per_token),
            "weights": human(c.disk_bytes, "B"),
            **({"experts gone": str(c.closed_experts)} if mixed else {}),
        }

    table = Table(title="what each shape would cost and save", title_justify="left")
    for column in row(dense):
        left = column == "shape"
        table.add_column(column, justify="left" if left else "right", no_wrap=left)
    for c in costs:
        table.add_row(*row(c).values())
    return table
