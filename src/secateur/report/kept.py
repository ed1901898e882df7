"""What was kept: maps of layers × heads, × channels, × experts; widths by layer; the values of gates.

Shape suffixes: L layers (that have such units), K columns of a map.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.report.drawn import Cell, Drawn, Table, figure
from secateur.report.lines import HEIGHT, PLACE, WIDTH, Line, Panel
from secateur.report.reading import KINDS, Array, Record, Units
from secateur.report.svg import INK, box, drawing, markup, series

COLUMNS = 64
"""Columns of a map of channels, each as many channels as come to it."""

SHADE = (0.13, 0.53, 0.80)
"""The colour of maps; how much of it lies on the page is the share kept."""

SHADES = ListedColormap([(*SHADE, round(0.04 + 0.96 * i / 255, 4)) for i in range(256)])

BINS = 40

TITLES = {
    "heads": "Layers × heads",
    "kv_groups": "Layers × KV groups",
    "channels": "Layers × channels",
    "shared_channels": "Layers × channels of shared experts",
    "expert_channels": "Layers × experts",
    "attention": "Attention of each layer",
    "mlp": "MLP of each layer",
}

SINGLE = {"heads": "head", "kv_groups": "KV group", "attention": "sublayer", "mlp": "sublayer"}
"""Kinds that are shown one by one, by their gate values → what a column is."""


def maps(record: Record) -> list[Drawn]:
    """A map a kind of unit."""
    return [_map(record, kind) for kind in record.kinds()]


@dataclass(frozen=True)
class Shown:
    """What a map shows: a value a layer and column."""

    title: str
    values_LK: Array
    """NaN where a layer has no such column."""
    column: str
    """What a column is."""
    unit: str
    legend: tuple[str, str]
    top: float = 1.0
    """The value that is shown as the fullest shade."""

    @property
    def gates(self) -> bool:
        """Whether the values are those of gates, not shares."""
        return self.unit == "gate value"


def _shown(kind: str, units: Sequence[Units]) -> Shown:
    if kind in SINGLE:
        values_LK = _rows([u.value_N for u in units])
        top = max(1.0, float(np.nanmax(values_LK)))
        column = SINGLE[kind]
        return Shown(TITLES[kind], values_LK, column, "gate value", ("removed", f"gate value {figure(top)}"), top)
    if kind == "expert_channels" and all(u.experts for u in units):
        shares = [u.kept.reshape(u.experts, -1).mean(1) for u in units]
        return Shown(TITLES[kind], _rows(shares), "expert", "% kept", ("0 % of its channels kept", "100 %"))
    columns = min(COLUMNS, min(len(u.value_N) for u in units))
    shares = [np.array([part.mean() for part in np.array_split(u.kept, columns)]) for u in units]
    title = "Layers × channels of all experts" if kind == "expert_channels" else TITLES[kind]
    return Shown(title, np.array(shares), "channels", "% kept", ("0 % kept", "100 %"))


def _rows(values: Sequence[Array]) -> Array:
    """Rows of different lengths as one array, filled up with NaN."""
    filled = np.full((len(values), max(map(len, values))), np.nan)
    for row, own in zip(filled, values, strict=True):
        row[: len(own)] = own
    return filled


def _map(record: Record, kind: str) -> Drawn:
    units = record.of(kind)
    shown, layers = _shown(kind, units), [u.layer for u in units]
    kept, of = sum(int(u.kept.sum()) for u in units), sum(len(u.value_N) for u in units)
    least, most = min(units, key=lambda u: u.share), max(units, key=lambda u: u.share)
    words = (
        f"Of {of:,} {KINDS[kind]}, {kept:,} are kept ({kept / of:.1%}). Layer {least.layer} keeps the smallest share, "
        f"{least.share:.1%}, layer {most.layer} the largest, {most.share:.1%}."
    )
    if shown.column == "expert":
        gone = int((shown.values_LK == 0).sum())
        words += f" {gone:,} experts keep no channel." if gone != 1 else " One expert keeps no channel."
    canvas, place = _image(shown, units)
    name = f"map-{record.number}-{kind.replace('_', '-')}"
    factor, digits = (1, 3) if shown.gates else (100, 1)
    values = [[None if np.isnan(v) else round(factor * float(v), digits) for v in row] for row in shown.values_LK]
    data = {
        "kind": "map", "box": place, "layers": layers, "column": shown.column, "values": values, "unit": shown.unit,
        "units": [len(u.value_N) for u in units],
    }  # fmt: skip
    svg, table = markup(canvas, name, shown.title, words), _map_table(name, shown, layers)
    return Drawn(name, shown.title, words, svg, table, data, legend=shown.legend)


def _image(shown: Shown, units: Sequence[Units]) -> tuple[Figure, list[float]]:
    rows, columns = shown.values_LK.shape
    height = min(7.0, max(HEIGHT, 0.9 + 0.085 * rows))
    with drawing():
        canvas = Figure(figsize=(WIDTH, height))
        axes = canvas.add_axes((PLACE[0], 0.46 / height, PLACE[2], 1 - 0.56 / height))
        axes.grid(False)
        width = max(len(u.value_N) for u in units) if shown.column == "channels" else columns
        extent = (-0.5, width - 0.5, rows - 0.5, -0.5)
        image = np.ma.masked_invalid(shown.values_LK / shown.top)
        axes.imshow(image, cmap=SHADES, vmin=0, vmax=1, aspect="auto", extent=extent, interpolation="none")
        axes.set_xlabel("channel" if shown.column == "channels" else shown.column)
        axes.set_ylabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        places = [round(i) for i in np.linspace(0, rows - 1, min(rows, 9))]
        axes.set_yticks(places, [str(units[i].layer) for i in places])
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)
        return canvas, box(axes)


def _map_table(name: str, shown: Shown, layers: Sequence[int]) -> Table:
    what = "gate values, 0 is removed" if shown.gates else "% kept"
    parts = " (in equal parts)" if shown.column == "channels" else ""
    columns = ["layer", *(str(k) for k in range(shown.values_LK.shape[1]))]
    table = Table(f"{name}-table", f"{what}, by layer and {shown.column}{parts}", columns)
    for layer, row in zip(layers, shown.values_LK, strict=True):
        texts = [f"{v:.2f}" if shown.gates else f"{100 * v:.0f}" for v in row]
        cells = [Cell("") if np.isnan(v) else Cell(text, float(v)) for text, v in zip(texts, row, strict=True)]
        table.add(Cell(str(layer), layer), *cells)
    return table


def widths(records: Sequence[Record]) -> list[Drawn]:
    """Shares kept by layer: a line a kind, or a figure a kind and a line a run."""
    known = [record for record in records if record.groups]
    if not known:
        return []
    if len(records) == 1:
        lines = [_share_line(known[0], kind, KINDS[kind], i) for i, kind in enumerate(known[0].kinds())]
        return [_share_panel("widths", "Share kept by layer", lines)]
    return [
        _share_panel(f"widths-{kind.replace('_', '-')}", f"Share of {KINDS[kind]} kept, by layer",
                     [_share_line(r, kind, r.label, r.number, r.number) for r in known if kind in r.kinds()])
        for kind in KINDS if any(kind in record.kinds() for record in known)
    ]  # fmt: skip


def _share_line(record: Record, kind: str, label: str, colour: int, run: int | None = None) -> Line:
    units = record.of(kind)
    return Line(label, np.array([u.layer for u in units], float), np.array([u.share for u in units]), colour, run)


def _share_panel(name: str, title: str, lines: list[Line]) -> Drawn:
    return Panel(name, title, "layer", "share kept", lines, y_range=(-0.02, 1.04)).draw()


def widths_table(records: Sequence[Record]) -> Table | None:
    """Units of every layer, dense and pruned."""
    known = [record for record in records if record.groups]
    if not known:
        return None
    many = len(records) > 1
    columns = [*(["run"] if many else []), "layer", "units", "dense", "kept", "share kept", "experts left",
               "median gate value"]  # fmt: skip
    kinds = [kind for kind in KINDS if any(kind in record.kinds() for record in known)]
    table = Table("widths-by-layer", "Widths by layer", columns, filters=True,
                  choices=[(kind, KINDS[kind]) for kind in kinds])  # fmt: skip
    for record in known:
        for kind in record.kinds():
            for u in record.of(kind):
                experts = Cell("")
                if u.experts:
                    left = int(u.kept.reshape(u.experts, -1).any(1).sum())
                    experts = Cell(f"{left:,} of {u.experts:,}", left)
                median = float(np.median(u.value_N[u.kept])) if u.kept.any() else float("nan")
                table.add(*([record.label] if many else []), Cell(str(u.layer), u.layer), KINDS[kind], len(u.value_N),
                          int(u.kept.sum()), Cell(f"{u.share:.1%}", u.share), experts, median,
                          kind=kind, run=record.number)  # fmt: skip
    if not any(u.experts for record in known for u in record.groups):
        place = columns.index("experts left")
        table.columns = [c for c in columns if c != "experts left"]
        table.rows = [row[:place] + row[place + 1 :] for row in table.rows]
    return table


def histogram(record: Record) -> Drawn | None:
    """The values of the gates, as figure 7 of the paper has them: removed ones at 0, the others around 1."""
    kinds = record.kinds()
    if not kinds:
        return None
    values = {kind: np.concatenate([u.value_N for u in record.of(kind)]) for kind in kinds}
    every = np.concatenate(list(values.values()))
    top = max(1.2, float(np.quantile(every, 0.9995)) * 1.02)
    edges = np.linspace(0, top, BINS + 1)
    words, name = [], f"gates-{record.number}"
    table = Table(f"{name}-table", "Gates by value, % of each kind", ["from", "to", *(KINDS[kind] for kind in kinds)])
    with drawing():
        canvas = Figure(figsize=(WIDTH, HEIGHT))
        axes = canvas.add_axes(PLACE)
        shares = []
        for i, (kind, value_N) in enumerate(values.items()):
            open_N = value_N[value_N > 0]
            closed = 1 - len(open_N) / len(value_N)
            counts = np.histogram(np.minimum(open_N, top), edges)[0] / len(value_N)
            shares.append((closed, counts))
            slot = edges[1] * 0.8 / len(kinds)
            axes.bar(
                -edges[1] * 1.4 + i * slot, closed, slot * 0.9, align="edge", color=series(i), alpha=0.45, zorder=2
            )
            axes.stairs(counts, edges, color=series(i), label=KINDS[kind], fill=False, linewidth=1.6)
            axes.stairs(counts, edges, color=series(i), fill=True, alpha=0.18)
            ends = f"; half of the others lie between {figure(float(np.quantile(open_N, 0.25)))} and " \
                   f"{figure(float(np.quantile(open_N, 0.75)))}" if len(open_N) else ""  # fmt: skip
            words.append(f"Of the gates of {len(value_N):,} {KINDS[kind]}, {closed:.1%} are removed{ends}.")
        axes.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yscale("symlog", linthresh=0.01)
        ticks = (0, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0)
        axes.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(0, 1.2)
        axes.set_xlabel("gate value (bars left of 0: removed)")
        axes.set_ylabel("share of the gates, log scale")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.15, 1.0), ncols=2, borderaxespad=0.2, columnspacing=1.2)
    zero = [Cell(figure(100 * closed), closed) for closed, _ in shares]
    table.add(Cell("removed", -1.0), Cell("", -1.0), *zero)
    for i in range(BINS):
        table.add(
            float(edges[i]), float(edges[i + 1]), *(Cell(figure(100 * float(c[i])), float(c[i])) for _, c in shares)
        )
    title, said = "Values of the gates", " ".join(words)
    return Drawn(name, title, said, markup(canvas, name, title, said), table)
