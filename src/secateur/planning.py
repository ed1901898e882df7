"""Plans of a run for one shape, and what each shape would cost and save, before anything is written.

Serves `secateur plan RUN` and its `--compare`.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import get_args

from rich.table import Table

from secateur.budget import Figures, figures, make_budget
from secateur.card import human
from secateur.config import Shape, tie_of
from secateur.describe import Description
from secateur.files import InputError
from secateur.gates import load_gates
from secateur.plan import Plan, Rounding, make_plan
from secateur.session import Session
from secateur.slicing import added_biases


def plan_for(session: Session, shape: str) -> tuple[Plan, Rounding]:
    """The gates of a run, rounded to its budget for a shape. Raises InputError where that is not possible."""
    c, description = session.config, session.loaded.description
    description.check_shape(shape)
    gates = load_gates(session.run.gates, description.groups, session.architecture)
    if shape == "uniform" and gates.means is not None:
        raise InputError(f"--method {c.method} adds biases, which --shape uniform has no place for; use --shape ragged")
    scope = "expert" if shape == "uniform" else c.per
    assert scope is not None
    limits = make_budget(description.groups, description.shapes, c.sparsity, scope, tie_of(c.method, shape))
    return make_plan(gates, limits, shape, partial(session.held_out_loss, means=gates.means))


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


def compare_shapes(session: Session) -> tuple[list[ShapeCost], list[str]]:
    """What each shape would cost, the dense model first, and why a shape is not possible. Writes nothing."""
    loaded = session.loaded
    description, size = loaded.description, loaded.checkpoint_dtype.itemsize
    dense = figures(description, None, size)
    costs = [ShapeCost("dense", session.held_out_loss(None), dense, dense.parameters * size, 0)]
    refused = []
    for shape in get_args(Shape):
        if shape == "padded" and not any(g.experts for g in description.groups):
            continue
        try:
            plan, rounding = plan_for(session, shape)
        except InputError as error:
            refused.append(f"{shape}: {error}")
            continue
        found, stored = figures_of(description, plan, size), plan.sizes(description.groups)
        closed = sum(g.experts - stored[g.name].experts for g in description.groups)
        costs.append(ShapeCost(shape, rounding.held_out_planned, found, found.parameters * size, closed))
    return costs, refused


def shapes_table(costs: list[ShapeCost]) -> Table:
    """A row a shape; what it saves is a share of the dense model's."""
    table = Table(title="what each shape would cost and save", title_justify="left")
    for column in ("shape", "held-out loss", "parameters", "active", "FLOPs a token", "weights", "experts gone"):
        table.add_column(column, justify="left" if column == "shape" else "right")
    dense = costs[0]

    def cell(found: float, whole: float, unit: str = "") -> str:
        return human(found, unit) + ("" if found == whole else f" (−{1 - found / whole:.1%})")

    for c in costs:
        rise = "" if c is dense else f" (+{c.held_out - dense.held_out:.3f})"
        table.add_row(
            c.shape,
            f"{c.held_out:.3f}{rise}",
            cell(c.sizes.parameters, dense.sizes.parameters),
            cell(c.sizes.active_parameters, dense.sizes.active_parameters),
            cell(c.sizes.flops_per_token, dense.sizes.flops_per_token),
            cell(c.disk_bytes, dense.disk_bytes, "B"),
            str(c.closed_experts),
        )
    return table
