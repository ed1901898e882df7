"""What the sublayers of a model take in time: a table measured on one machine in one runtime, for `--budget latency=…`.

`secateur bench MODEL --table FILE` measures it (bench_table.py) and `--latency-table FILE` gives it to a run, which
keeps a copy. Of sublayers that are built alike it has the seconds of one at several widths, at each batch size, beyond
those of a closed one; between the widths time is taken to go straight. What the unpruned model takes beside its
sublayers is fixed. Whole picoseconds a unit make a cost of it that is exact (costs.Cost): the sum over sublayers is the
prediction.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from secateur.costs import Bound, Cost
from secateur.describe import Description
from secateur.files import InputError, read_json, write_json
from secateur.gates import architecture_fingerprint
from secateur.units import Group
from secateur.wanted import TIMES, Wanted

TABLE_FORMAT = 1

PICOSECONDS = 10**12
"""Of a second: costs are whole numbers of them."""

SCALE = 10**6
"""Picoseconds of what budgets count, microseconds."""

METRICS = {"decode": "latency", "between_tokens": "latency", "prefill": "prefill-latency",
           "first_token": "prefill-latency"}  # fmt: skip
"""What `secateur bench` measures → the budget that is on it."""


@dataclass(frozen=True)
class Sublayers:
    """Sublayers that are built alike."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    kind: str
    """Of their units (units.Group)."""
    groups: tuple[str, ...]
    units: int
    stored: tuple[int, ...]
    """Units at which they were timed, rising, 0 and all among them."""


@dataclass(frozen=True)
class Times:
    """Seconds at one batch size: of a step of decoding, or of a prompt."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    whole: float
    """Of the unpruned model."""
    sublayers: tuple[tuple[float, ...], ...]
    """Of one of the sublayers of each kind, at each number of stored units, beyond those of a closed one."""


@dataclass(frozen=True)
class LatencyTable:
    """Times of a model's sublayers, and where they were measured."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    format: int
    model: str
    architecture: str
    """Fingerprint of the shapes of its weights."""
    attention_unit: str | None
    shape: str
    """What the widths that were timed are (`--shape`)."""
    runtime: str
    dtype: str
    settings: dict[str, Any]
    """Of `secateur bench`."""
    machine: dict[str, Any]
    about: dict[str, Any]
    """What ran it: implementation, device, threads, versions."""
    sublayers: tuple[Sublayers, ...]
    times: dict[str, dict[int, Times]]
    """Kind of budget → batch size → times."""
    check: dict[str, dict[int, dict[str, float]]]
    """The same of a model with random widths that are not among those timed: seconds `predicted` and `measured`."""

    @property
    def said(self) -> str:
        """Where it was measured, in words."""
        threads = self.about.get("threads")
        where = f"{self.machine.get('cpu')}, {self.machine.get('cores')} cores" + (
            f", {threads} threads" * bool(threads)
        )
        device = self.about.get("device") or "cpu"
        return f"{self.runtime}, {self.dtype}, {where if device == 'cpu' else f'{device} of {where}'}"

    @property
    def tokens(self) -> str:
        """What was run, in words."""
        return f"{self.settings['prompt_tokens']} + {self.settings['new_tokens']} tokens"

    def conditions(self, wanted: Wanted) -> str:
        """What a budget on time holds for, in words."""
        return f"{self.batch_of(wanted)} at a time, {self.tokens}, {self.said}"

    def batch_of(self, wanted: Wanted) -> int:
        """The batch size that a budget is on."""
        return wanted.batch or next(iter(self.times[wanted.kind]))

    def bound(self, description: Description, wanted: Wanted) -> Bound:
        """A budget on the time that the model of a description takes. Raises InputError for one that the table has no
        times for."""
        times = self.times[wanted.kind].get(self.batch_of(wanted))
        if times is None:
            sizes = ", ".join(map(str, self.times[wanted.kind]))
            raise InputError(
                f"--budget {wanted}: the latency table has batch sizes {sizes}; `secateur bench MODEL --table FILE "
                f"--batch-sizes {wanted.batch}` measures another"
            )
        curves = {name: (s.stored, seconds) for s, seconds in zip(self.sublayers, times.sublayers, strict=True)
                  for name in s.groups}  # fmt: skip
        of = {g.name: self._parts(g) for g in description.groups}
        costs = tuple(Cost(sum(round(curves[name][1][-1] * PICOSECONDS) for name in of[g.name])) if g.is_sublayer
                      else priced(*curves[g.name]) for g in description.groups)  # fmt: skip
        whole = round(times.whole * PICOSECONDS)
        fixed = whole - sum(cost.at(g.units) for cost, g in zip(costs, description.groups, strict=True))
        most = wanted.most(Fraction(whole, SCALE))
        return Bound(wanted.name, wanted, costs, fixed, SCALE, whole, most * SCALE)

    def _parts(self, group: Group) -> list[str]:
        """Names of the groups of units that make up a sublayer that goes whole; none of a gate beside their own."""
        inside = [name for s in self.sublayers for name in s.groups if name.startswith(f"layers.{group.layer}.")]
        return [name for name in inside if not group.gate_only and name.endswith("channels") != group.attends]

    def predicted(self, description: Description, stored: Sequence[int], kind: str, batch: int) -> float:
        """Seconds that the model takes that stores so many units of each group."""
        bound = self.bound(description, Wanted(kind, "", None, 1, batch))
        return bound.cost(stored) / PICOSECONDS

    def check_model(self, description: Description, path: Path) -> None:
        """Raises InputError where the table is of another model, or lacks what is pruned of this one."""
        again = f"measure one with `secateur bench MODEL --table {path}`"
        if architecture_fingerprint((), description.shapes) != self.architecture:
            raise InputError(f"{path} is the latency table of another model ({self.model}); {again}")
        known = {name: (s.kind, s.units) for s in self.sublayers for name in s.groups}

        def lacks(g: Group) -> bool:
            return not g.gate_only and not self._parts(g) if g.is_sublayer else known.get(g.name) != (g.kind, g.units)

        lacking = next(filter(lacks, description.groups), None)
        if lacking is not None:
            raise InputError(
                f"{path} has no times of {lacking.name} in {lacking.units} {_unit_of(lacking)}; measure them with the "
                f"run's --units and --attention-unit: `secateur bench MODEL --table {path}`"
            )


def _unit_of(group: Group) -> str:
    return "KV groups" if group.kind == "kv_groups" else group.kind.replace("_", " ")


def priced(stored: Sequence[int], seconds: Sequence[float]) -> Cost:
    """The cost of a sublayer in whole picoseconds: 0 of no unit, straight between the widths that were timed. What
    opens it is what is left at no unit on the line through the first two."""
    points = [(count, round(time * PICOSECONDS)) for count, time in zip(stored, seconds, strict=True)][1:]
    slopes = [round(Fraction(after - before, more - less)) for (less, before), (more, after) in pairwise(points)]
    width, first = points[0]
    if not slopes or first < slopes[0] * width:
        slopes.insert(0, first // width)
        points.insert(0, (0, 0))
    opening = max(0, points[0][1] - slopes[0] * points[0][0]) if points[0][0] else 0
    changes = [after - before for before, after in pairwise(slopes)]
    bends = [(count, change) for (count, _), change in zip(points[1:-1], changes, strict=True) if change]
    return Cost(slopes[0], opening, tuple(bends))


# --- the file --------------------------------------------------------------------------------------------------------


def write_table(path: Path, table: LatencyTable) -> None:
    """Writes a table as JSON."""
    write_json(path, asdict(table))


def read_table(path: Path) -> LatencyTable:
    """Reads a table. Raises InputError for what is none, or holds figures that no measurement gives."""
    again = f"secateur bench MODEL --table {path}"
    values = read_json(path, again)
    if not isinstance(values, dict) or values.get("format") != TABLE_FORMAT:
        raise InputError(f"{path} is not a latency table of format {TABLE_FORMAT}; `{again}` measures one")
    try:
        table: LatencyTable = TypeAdapter(LatencyTable).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path} is not a valid latency table: {where}: {first['msg']}; `{again}` measures one"
        ) from None
    if (wrong := next(_faults(table), None)) is not None:
        raise InputError(f"{path} is not a valid latency table: {wrong}; `{again}` measures one")
    return table


def _faults(table: LatencyTable) -> Iterator[str]:
    for name in ("prompt_tokens", "new_tokens"):
        if not isinstance(table.settings.get(name), int):
            yield f"settings have no {name}"
    for s in table.sublayers:
        if (
            len(s.stored) < 2
            or s.stored[0] != 0
            or s.stored[-1] != s.units
            or any(a >= b for a, b in pairwise(s.stored))
        ):
            yield f"stored units of {s.kind} do not rise from 0 to {s.units}"
    if set(table.times) != set(TIMES) or not all(table.times.values()):
        yield f"times are not those of {' and '.join(TIMES)}"
    for kind, by_batch in table.times.items():
        for batch, times in by_batch.items():
            where = f"{kind} at batch size {batch}"
            if [len(curve) for curve in times.sublayers] != [len(s.stored) for s in table.sublayers]:
                yield f"{where} has not a time for each width"
            elif not all(map(isfinite, [times.whole, *(t for curve in times.sublayers for t in curve)])):
                yield f"{where} has times that are not finite"
            elif any(curve[0] != 0 or any(a > b for a, b in pairwise(curve)) for curve in times.sublayers):
                yield f"{where} has times that do not rise from 0"
            elif times.whole <= 0:
                yield f"{where} has an unpruned model that takes no time"


# --- predicted against measured --------------------------------------------------------------------------------------


def against_measured(
    table: LatencyTable, description: Description, stored: Sequence[int], results: Mapping[str, Any]
) -> dict[str, Any]:
    """What the table predicts beside what `secateur bench` has measured, for its results: a row a metric and batch size
    of both, or why they cannot be compared."""
    if differs := list(_differences(table, results)):
        return {"table": table.said, "differs": differs, "rows": []}
    rows = []
    for timing in results["timings"]:
        kind, batch = METRICS.get(timing["metric"]), timing["batch_size"]
        if kind is None or batch not in table.times[kind]:
            continue
        measured = {name: seconds_of(timing, name, results["settings"]) for name in ("dense", "pruned")}
        predicted = {"dense": table.times[kind][batch].whole,
                     "pruned": table.predicted(description, stored, kind, batch)}  # fmt: skip
        rows.append({"budget": kind, "metric": timing["metric"], "batch_size": batch, "predicted": predicted,
                     "measured": measured, "error": predicted["pruned"] / measured["pruned"] - 1})  # fmt: skip
    sizes = ", ".join(map(str, table.times["latency"]))
    differs = [] if rows else [f"batch sizes {sizes} in the table, others here"]
    return {"table": table.said, "differs": differs, "rows": rows}


def seconds_of(timing: Mapping[str, Any], name: str, settings: Mapping[str, Any]) -> float:
    """Seconds of a step of decoding, or of a prompt, from the median of what `secateur bench` measured."""
    median = float(timing[name]["median"])
    if timing["unit"] == "s":
        return median
    tokens = timing["batch_size"] * (settings["prompt_tokens"] if timing["metric"] == "prefill" else 1)
    return float(tokens / median)


def _differences(table: LatencyTable, results: Mapping[str, Any]) -> Iterator[str]:
    """In what a table and a measurement differ, in words."""
    own = {**table.settings, **table.machine, "runtime": table.runtime, "dtype": table.dtype, **table.about}
    found = {**results["settings"], **results["machine"], "runtime": results["runtime"], "dtype": results["dtype"],
             **results["dense"]}  # fmt: skip
    for name in ("runtime", "dtype", "cpu", "cores", "device", "threads", "prompt_tokens", "new_tokens", "eager"):
        if own.get(name) != found.get(name):
            yield f"{name} {own.get(name)} in the table, {found.get(name)} here"


def lines(predicted: Mapping[str, Any]) -> Iterator[str]:
    """What `secateur bench RUN` says of the prediction."""
    if predicted["differs"]:
        yield f"not compared with the run's latency table: {'; '.join(predicted['differs'])}"
    for row in predicted["rows"]:
        told, took = ({name: f"{1e3 * s:,.2f} ms" for name, s in row[at].items()} for at in ("predicted", "measured"))
        what = "decode step" if row["budget"] == "latency" else "prompt"
        yield (
            f"{row['budget']}, {row['batch_size']} at a time: a {what} was predicted to take {told['pruned']} and took "
            f"{took['pruned']} ({row['error']:+.1%}; unpruned {told['dense']} in the table, {took['dense']} now)"
        )
