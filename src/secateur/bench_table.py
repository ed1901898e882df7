"""`secateur bench MODEL --table FILE`: what a sublayer of each kind takes at several widths, for `--budget latency=…`.

Measured where it counts, inside whole models in the runtime that will serve them: all sublayers that are built alike
get one width, the rest stays whole, and what that saves beside the unpruned model, timed in turns (measure.py), is
divided by their number. So caches, kernels and dispatch are those of a served model, drift cancels out, and a runtime
need not know what a sublayer is. Half of the sublayers are closed to find what one costs that is there at all. In the
end a model of random widths is timed, too, to say how good the table is.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from transformers import PreTrainedModel

from secateur.bench import Stand, bench_run, machine, show, stand_for
from secateur.describe import Description
from secateur.export import export
from secateur.files import InputError
from secateur.gates import architecture_fingerprint
from secateur.ideal import cost_of
from secateur.latency import (
    METRICS,
    PICOSECONDS,
    TABLE_FORMAT,
    LatencyTable,
    Sublayers,
    Times,
    priced,
    seconds_of,
    write_table,
)
from secateur.load import describe_pretrained, read_model
from secateur.measure import Bench, Settings, measure
from secateur.plan import Plan
from secateur.policy import permitted, permitted_pairs, policy_of
from secateur.run import open_one
from secateur.selection import AttentionUnit, Kind
from secateur.units import Group
from secateur.workers.parent import Worker

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Widths that are timed, beside the unpruned one and none."""

NARROWEST = 1 / 4
"""Least width, as a share, of the random model that checks the table."""

At = tuple[str, int]
"""Kind of budget and batch size."""


@dataclass(frozen=True)
class Asked:
    """Which sublayers of which model are timed."""

    model: str
    shape: str = "ragged"
    units: tuple[Kind, ...] = ()
    attention_unit: AttentionUnit | None = None
    trust_remote_code: bool = False


@dataclass
class Alike:
    """Sublayers that are built alike, and what was found of them."""

    groups: tuple[Group, ...]
    saved: dict[int, dict[At, float]] = field(default_factory=dict)
    """Units stored → seconds less a sublayer than unpruned."""

    @property
    def first(self) -> Group:
        """One of them."""
        return self.groups[0]


def measure_table(
    asked: Asked, path: Path, settings: Settings, hear: Callable[[str], None] = lambda _: None
) -> LatencyTable:
    """Measures a table and writes it to `path`."""
    settings.check()
    policy = policy_of(asked.shape)
    policy = replace(policy, form="ragged") if policy.uniform else policy
    whole, config = describe_pretrained(asked.model, asked.trust_remote_code, asked.attention_unit)
    description = whole.only(asked.units)
    description.check_attention(asked.attention_unit)
    description.check_shape(str(policy))
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"--table {path}: give a file in a folder that is there, such as latency.json")
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    alike = [Alike(groups) for groups in _alike(description)]
    with TemporaryDirectory(prefix="bench-", dir=path.absolute().parent) as folder:
        stand = stand_for(settings, config, cost_of(whole), Path(folder), hear)
        trust = asked.trust_remote_code
        model = read_model(asked.model, config, own, trust).eval().requires_grad_(False)
        with stand.worker("dense", stand.prepared("dense", asked.model, trust), trust) as dense:
            timed = Timed(stand, model, description, dense, dense.loaded())
            for one, widths in _variants(alike, str(policy)):
                _time(one, widths, timed, description, str(policy))
            random_widths = _random_widths(description, str(policy))
            plan = narrowed(description, random_widths, str(policy))
            hear("checking the table on a model of random widths")
            ratios = timed.against_dense(plan)
    table = _table(asked, description, str(policy), alike, timed, stand)
    stored = plan.stored(description.groups)
    for (kind, batch), ratio in ratios.items():
        predicted = table.predicted(description, stored, kind, batch)
        measured = ratio * table.times[kind][batch].whole
        table.check.setdefault(kind, {})[batch] = {"predicted": predicted, "measured": measured}
    write_table(path, table)
    return table


# --- models to time --------------------------------------------------------------------------------------------------


def _alike(description: Description) -> list[tuple[Group, ...]]:
    found: dict[tuple[object, ...], list[Group]] = {}
    for g in description.groups:
        shapes = tuple(description.shapes[s.param] for s in g.slices)
        found.setdefault((g.kind, g.units, g.parts, bool(g.keys), shapes), []).append(g)
    # Nested query heads before their KV heads, whose times are what is left beyond them.
    return [tuple(groups) for groups in sorted(found.values(), key=lambda groups: not groups[0].writes)]


def widths_of(group: Group, shape: str) -> list[int]:
    """The widths at which sublayers are timed, those permitted that are nearest to `SHARES`, rising. Where any width is
    permitted they are odd ones: hardly any layer of a ragged model has a round width, and kernels may mind."""
    permits = [w for w in permitted(group, policy_of(shape)) if w < group.width]
    if len(permits) == group.width - 1 > 2 * len(SHARES):
        permits = permits[::2]
    return sorted({min(permits, key=lambda w: abs(w - share * group.width)) for share in SHARES} if permits else ())


def _variants(alike: Sequence[Alike], shape: str) -> Iterator[tuple[Alike, dict[str, int]]]:
    """Sublayers that are timed, and the width of each group that is not whole then."""
    for one in alike:
        for width in widths_of(one.first, shape):
            yield one, {g.name: width for g in one.groups}
        if one.first.writes:
            closed = one.groups[1::2] or one.groups
            yield one, {name: 0 for g in closed for name in (g.name, g.keys) if name}


def narrowed(description: Description, widths: Mapping[str, int], shape: str) -> Plan:
    """The plan in which groups (or each of their parts) have some widths and the others are whole."""
    kept = {}
    for g in description.groups:
        keep_N = torch.ones(g.units, dtype=torch.bool)
        keep_PW = g.by_part(keep_N)
        keep_PW[:, widths.get(g.name, g.width) :] = False
        keep_PW[widths.get(g.keys, g.parts) :] = False
        kept[g.name] = keep_N.nonzero().flatten()
    return Plan(kept, {name: torch.ones(len(index)) for name, index in kept.items()}, shape)


def _random_widths(description: Description, shape: str) -> dict[str, int]:
    drawn, policy = random.Random(0), policy_of(shape)
    widths: dict[str, int] = {}
    for g in description.groups:
        if g.keys:
            widths[g.keys], widths[g.name] = drawn.choice(sorted(permitted_pairs(g, policy)))
        elif g.writes:
            permits = permitted(g, policy)
            widths[g.name] = drawn.choice([w for w in permits if w >= NARROWEST * g.width] or permits)
    return widths


# --- timing ----------------------------------------------------------------------------------------------------------


@dataclass
class Timed:
    """An unpruned model that runs, and whatever was timed against it."""

    stand: Stand
    model: PreTrainedModel
    description: Description
    dense: Worker
    about: Mapping[str, object]
    whole: dict[At, list[float]] = field(default_factory=dict)
    """Seconds of the unpruned model, all medians."""

    def against_dense(self, plan: Plan) -> dict[At, float]:
        """What the model of a plan takes as a share of what the unpruned one takes."""
        stand, settings = self.stand, self.stand.settings
        folder = stand.scratch / "narrow"
        export(self.model, None, self.description, plan, folder)
        quiet = replace(stand, hear=lambda _: None)
        with quiet.worker("narrow", quiet.prepared("narrow", str(folder), True), True) as worker:
            worker.loaded()
            measured = measure({"dense": self.dense, "pruned": worker}, settings, lambda _: None)
        found = {}
        for timing in measured.timings:
            if (kind := METRICS.get(timing.metric)) is not None:
                at = kind, timing.batch_size
                self.whole.setdefault(at, []).append(seconds_of(timing.to_json(), "dense", stand.said))
                found[at] = 1.0 / timing.speedup.median
        return found


def _time(one: Alike, widths: Mapping[str, int], timed: Timed, description: Description, shape: str) -> None:
    """Notes what the narrowed groups save, each."""
    plan = narrowed(description, widths, shape)
    stored = dict(zip((g.name for g in description.groups), plan.stored(description.groups), strict=True))
    group = next(g for g in one.groups if g.name in widths)
    width = widths[group.name]
    timed.stand.hear(f"timing {group.kind.replace('_', ' ')}: {width} of {group.width}")
    count = sum(g.name in widths for g in one.groups)
    one.saved[stored[group.name]] = {at: (1.0 - ratio) / count for at, ratio in timed.against_dense(plan).items()}


# --- the table -------------------------------------------------------------------------------------------------------


def rising(values: Sequence[float]) -> list[float]:
    """The values that never fall and are nearest to the given ones, by least squares (pool adjacent violators)."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [statistics.fmean(pool) for pool in pools for _ in pool]


def curve(points: Mapping[int, float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Seconds of a sublayer by its stored units, from what it takes more or less than at other widths: 0 of no unit.

    What was not timed without any unit is taken to vanish on the line through the first two.
    """
    stored = sorted(points)
    seconds = rising([points[count] for count in stored])
    base = seconds[0]
    if stored[0]:
        base -= stored[0] * (seconds[1] - seconds[0]) / (stored[1] - stored[0]) if len(stored) > 1 else 0.0
        stored, seconds = [0, *stored], [base, *seconds]
    return tuple(stored), tuple(second - base for second in seconds)


def _curves(alike: Sequence[Alike], at: At, whole: float) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Of each kind of sublayers its curve, where the unpruned model takes `whole` seconds."""
    points = [{**{n: -saved[at] * whole for n, saved in one.saved.items()}, one.first.units: 0.0} for one in alike]
    for number, one in enumerate(alike):
        if one.first.keys:
            keys = next(n for n, other in enumerate(alike) if one.first.keys in {g.name for g in other.groups})
            _take_apart(points[number], points[keys], one.first)
    return [curve(found) for found in points]


def _take_apart(heads: dict[int, float], keys: dict[int, float], first: Group) -> None:
    """Nested KV heads went with their query heads, and these were closed together with them: of the seconds of each
    leaves what is its own."""
    alone = priced(*curve({stored: seconds for stored, seconds in heads.items() if stored}))
    for count in keys:
        keys[count] += (alone.at(first.units) - alone.at(count * first.width)) / PICOSECONDS
    heads[0] += curve(keys)[1][-1]


def _table(
    asked: Asked, description: Description, shape: str, alike: Sequence[Alike], timed: Timed, stand: Stand
) -> LatencyTable:
    whole = {at: statistics.median(values) for at, values in timed.whole.items()}
    curves = {at: _curves(alike, at, seconds) for at, seconds in whole.items()}
    times: dict[str, dict[int, Times]] = {}
    for kind, batch in whole:
        seconds = tuple(found for _, found in curves[kind, batch])
        times.setdefault(kind, {})[batch] = Times(whole[kind, batch], seconds)
    widths = [stored for stored, _ in next(iter(curves.values()))]
    sublayers = tuple(
        Sublayers(one.first.kind, tuple(g.name for g in one.groups), one.first.units, stored)
        for one, stored in zip(alike, widths, strict=True)
    )
    return LatencyTable(
        TABLE_FORMAT, asked.model, architecture_fingerprint((), description.shapes), asked.attention_unit, shape,
        stand.settings.runtime, stand.options["dtype"], stand.said, machine(), dict(timed.about), sublayers, times, {},
    )  # fmt: skip


def command(options: Bench, hear: Callable[[str], None], console: Console) -> None:
    """`secateur bench`, of a run or for a table."""
    options.check()
    if options.table is None:
        return show(console, bench_run(open_one(options.run, options.trust_remote_code), options, hear))
    path, model = options.table, str(options.run)
    asked = Asked(model, options.shape or "ragged", options.units, options.attention_unit, options.trust_remote_code)
    for line in said(measure_table(asked, path, options, hear)):
        hear(line)
    return hear(f"wrote {path}")


def said(table: LatencyTable) -> Iterator[str]:
    """What `secateur bench --table` prints at the end."""
    for kind, by_batch in table.times.items():
        for batch, times in by_batch.items():
            parts = (
                f"{s.kind.replace('_', ' ')} {len(s.groups)} × {seconds[-1] * 1e3:.3f}"
                for s, seconds in zip(table.sublayers, times.sublayers, strict=True)
            )
            found = table.check[kind][batch]
            error = found["predicted"] / found["measured"] - 1
            yield (
                f"{kind}, {batch} at a time: {times.whole * 1e3:,.2f} ms, of it {', '.join(parts)}; a model of random "
                f"widths {found['measured'] * 1e3:,.2f} ms, predicted {found['predicted'] * 1e3:,.2f} ({error:+.1%})"
            )
    yield f"{table.tokens}, {table.said}"
