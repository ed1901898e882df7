"""The sizes of a run beside each other, and the one to take: `secateur sizes RUN`, `--pick` of `prune` and `export`.

What a size costs is its loss on the run's held-out text, what it saves is counted exactly; time is there where
`secateur bench` was run on it. A size is on the front where none has as low a loss with as few parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from secateur.budget import figures
from secateur.card import human
from secateur.files import InputError, write_json
from secateur.gates import load_gates
from secateur.plan import Plan, load_plan
from secateur.planning import cost_of
from secateur.plots import draw_to
from secateur.report.files import Bench, checked
from secateur.run import Run
from secateur.session import Session
from secateur.sizes import session_on, sizes_of
from secateur.stages import plan_stage
from secateur.wanted import Condition, read_pick

DECODING = ("decode", "between_tokens")
"""Metrics of `secateur bench` that say what a token takes, offline and of a server."""


@dataclass(frozen=True)
class SizeCost:
    """What a size costs and saves."""

    name: str
    folder: str
    shares: dict[str, float]
    """Of what the unpruned model has, by the words of `--pick`."""
    loss: float
    """On held-out text, nats a token."""
    parameters: int
    flops_per_token: int
    steps: int | None
    """Learning steps that its gates have seen; of a sweep, with those of the sizes before."""
    runtime: str | None
    """What `time` was measured in."""
    front: bool
    inside: bool
    """Whether it lies in the next larger size."""


def compare_sizes(session: Session) -> dict[str, Any]:
    """Plans the sizes that have no plan yet and compares all: RUN/sizes.json, RUN/sizes.png. Returns what the first
    holds."""
    run, loaded = session.run, session.loaded
    itemsize = loaded.checkpoint_dtype.itemsize
    dense, dense_loss = figures(loaded.description, None, itemsize), session.held_out_loss(None)
    own = [run] if run.config.sweep is None and run.gates.exists() else []
    rows: list[tuple[SizeCost, Plan]] = []
    for size in (*own, *sizes_of(run)):
        inside = session if size.folder == run.folder else session_on(session, size)
        if not size.plan.exists():
            plan_stage(inside)
        plan, rounding = load_plan(size.plan, loaded.description.groups, session.architecture)
        cost = cost_of(inside, plan, rounding)
        pairs = {"units": "block_parameters", "params": "active_parameters", "total-params": "parameters",
                 "flops": "flops_per_token", "kv": "kv_bytes_per_token", "bytes": "parameters"}  # fmt: skip
        shares = {"loss": cost.held_out / dense_loss, "perplexity": exp(cost.held_out - dense_loss)}
        shares |= {kind: getattr(cost.sizes, f) / getattr(dense, f) for kind, f in pairs.items() if getattr(dense, f)}
        runtime, time = _time(size)
        shares |= {} if time is None else {"time": time}
        name = "own" if size.folder == run.folder else size.folder.name
        steps = load_gates(size.gates, loaded.description.groups, session.architecture).about.get("steps")
        found = SizeCost(name, str(size.folder), shares, cost.held_out, cost.sizes.parameters,
                         cost.sizes.flops_per_token, steps, runtime, True, True)  # fmt: skip
        rows.append((found, plan))
    if not rows:
        raise InputError(f"{run.folder} has no gates yet, so no sizes; `secateur learn {run.folder}` finds some")
    results = {
        "dense": {"loss": dense_loss, "parameters": dense.parameters, "flops_per_token": dense.flops_per_token},
        "sizes": [vars(size) for size in _placed(rows)],
    }
    write_json(run.folder / "sizes.json", results)
    return results


def _placed(rows: Sequence[tuple[SizeCost, Plan]]) -> list[SizeCost]:
    """From the largest model to the smallest, with what is so of each beside the others."""
    rows = sorted(rows, key=lambda row: -row[0].parameters)
    found = []
    for number, (size, plan) in enumerate(rows):
        larger = rows[number - 1][1] if number else plan
        lies_in = all(bool(torch.isin(index, larger.kept[name]).all()) for name, index in plan.kept.items())
        beaten = any(
            other.loss <= size.loss and other.parameters <= size.parameters
            and (other.loss, other.parameters) != (size.loss, size.parameters) for other, _ in rows
        )  # fmt: skip
        found.append(replace(size, front=not beaten, inside=lies_in))
    return found


def _time(size: Run) -> tuple[str | None, float | None]:
    """The runtime in which a size was timed, and the share of the unpruned model's time that a token takes, fewest
    sequences at a time."""
    for path in sorted(size.folder.glob("bench-*.json")):
        results = checked(path, Bench, f"secateur bench {size.folder}")
        timed = [row for row in results["timings"] if row["metric"] in DECODING]
        if timed:
            return results["runtime"], 1.0 / min(timed, key=lambda row: row["batch_size"])["speedup"]["median"]
    return None, None


# --- choosing --------------------------------------------------------------------------------------------------------


def picked(results: Mapping[str, Any], said: str) -> dict[str, Any]:
    """The size that `--pick` chooses: with a bound on the loss the smallest within all bounds, else the one with the
    lowest loss. Raises InputError where none is within them."""
    conditions = read_pick(said)
    within = [s for s in results["sizes"] if all(_holds(s["shares"], condition) for condition in conditions)]
    if not within:
        raise InputError(f"--pick {said}: no size has that; {'; '.join(_nearest(results, c) for c in conditions)}")
    if any(condition.kind in ("loss", "perplexity") for condition in conditions):
        return dict(min(within, key=lambda size: size["parameters"]))
    return dict(min(within, key=lambda size: size["loss"]))


def _holds(shares: Mapping[str, float], condition: Condition) -> bool:
    return shares.get(condition.kind, float("inf")) <= condition.most


def _nearest(results: Mapping[str, Any], condition: Condition) -> str:
    found = [s for s in results["sizes"] if condition.kind in s["shares"]]
    if not found:
        return f"{condition.kind} is not known of any" + (": run `secateur bench`" if condition.kind == "time" else "")
    least = min(found, key=lambda size: size["shares"][condition.kind])
    return f"the least {condition.kind} is {least['shares'][condition.kind]:.3f}, of size {least['name']}"


# --- what is shown ---------------------------------------------------------------------------------------------------


def show(console: Console, results: Mapping[str, Any], path: Path) -> None:
    """Prints the table, and what the plot is called."""
    console.print(table(results))
    outside = [size["name"] for size in results["sizes"] if not size["inside"]]
    if outside:
        console.print(f"not within the next larger size: {', '.join(outside)}", markup=False)
    console.print(draw(results, path), markup=False, soft_wrap=True)


def table(results: Mapping[str, Any]) -> Table:
    """A row a size, within 80 columns; what the unpruned model itself has is in brackets."""
    timed = next((size["runtime"] for size in results["sizes"] if size["runtime"]), None)
    title = "sizes, from the largest to the smallest, as shares of the unpruned model"
    found = Table(title=f"{title}; time in {timed}" if timed else title, title_justify="left")
    columns = ["size", "× loss", "× ppl", "params", "FLOPs", "KV", "steps", "front"]
    columns[6:6] = ["time"] if timed else []
    for column in columns:
        found.add_column(column, justify="left" if column == "size" else "right", overflow="fold")
    dense = results["dense"]
    found.add_row("unpruned", f"({dense['loss']:.4f})", "", f"({human(dense['parameters'])})")
    for size in results["sizes"]:
        shares = size["shares"]
        percent = {kind: f"{share:.1%}" for kind, share in shares.items()}
        cells = [
            size["name"], f"{shares['loss']:.3f}", f"{shares['perplexity']:.3f}", percent["total-params"],
            percent["flops"], percent.get("kv", ""), *([percent.get("time", "")] if timed else []),
            "" if size["steps"] is None else str(size["steps"]), "yes" if size["front"] else "no",
        ]  # fmt: skip
        found.add_row(*cells)
    return found


def draw(results: Mapping[str, Any], path: Path) -> str:
    """Draws perplexity over size, FLOPs and, where it is known, time; says what it did."""
    return draw_to(path, lambda new_figure: _panels(results["sizes"], new_figure))


def _panels(sizes: Sequence[Mapping[str, Any]], new_figure: Callable[..., Any]) -> Any:
    kinds = {"total-params": "parameters", "flops": "FLOPs a token", "time": "time a token"}
    shown = [kind for kind in kinds if any(kind in size["shares"] for size in sizes)]
    figure = new_figure(figsize=(4.2 * len(shown), 3.6))
    for panel, kind in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown, strict=True):
        points = sorted(((s["shares"][kind], s["shares"]["perplexity"], s) for s in sizes if kind in s["shares"]),
                        key=lambda point: point[0])  # fmt: skip
        front = [(x, y) for x, y, size in points if size["front"]]
        panel.plot(*zip(*front, strict=True), "-", color="#1b6ca8", linewidth=1.2)
        for x, y, size in points:
            panel.plot(x, y, "o", color="#1b6ca8", markerfacecolor="#1b6ca8" if size["front"] else "white")
            panel.annotate(size["name"], (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
        panel.set_xlabel(f"{kinds[kind]}, of the unpruned model's")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.axes[0].set_ylabel("perplexity on held-out text, × unpruned")
    return figure
