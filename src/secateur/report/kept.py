"""What was kept: maps of layers × heads, × channels, × experts; widths by layer; the values of gates.

Shape suffixes: L layers (that have such units), K columns of a map.
"""

from collections.abc import Sequence

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
}


def maps(record: Record) -> list[Drawn]:
    """A map a kind of unit."""
    return [_map(record, kind) for kind in record.kinds()]


def _map(record: Record, kind: str) -> Drawn:
    units = record.of(kind)
    layers = [u.layer for u in units]
    if kind in ("heads", "kv_groups"):
        width = max(len(u.value_N) for u in units)
        shown_LK = np.full((len(units), width), np.nan)
        for row, u in zip(shown_LK, units, strict=True):
            row[: len(u.value_N)] = u.value_N
        top = max(1.0, float(np.nanmax(shown_LK)))
        column, legend, across = "head" if kind == "heads" else "KV group", ("removed", f"gate value {figure(top)}"), width
    elif kind == "expert_channels" and all(u.experts for u in units):
        across = max(u.experts for u in units)
        shown_LK = np.full((len(units), across), np.nan)
        for row, u in zip(shown_LK, units, strict=True):
            row[: u.experts] = u.kept_N.reshape(u.experts, -1).mean(1)
        column, legend, top = "expert", ("0 % of its channels kept", "100 %"), 1.0
    else:
        across = min(COLUMNS, min(len(u.value_N) for u in units))
        shown_LK = np.array([[part.mean() for part in np.array_split(u.kept_N, across)] for u in units])
        column, legend, top = "channels", ("0 % kept", "100 %"), 1.0
    name = f"map-{record.number}-{kind.replace('_', '-')}"
    kept = sum(int(u.kept_N.sum()) for u in units)
    of = sum(len(u.value_N) for u in units)
    least, most = min(units, key=lambda u: u.share), max(units, key=lambda u: u.share)
    words = (
        f"Of {of:,} {KINDS[kind]}, {kept:,} are kept ({kept / of:.1%}). Layer {least.layer} keeps the smallest share, "
        f"{least.share:.1%}, layer {most.layer} the largest, {most.share:.1%}."
    )
    if kind == "expert_channels" and column == "expert":
        gone = int((shown_LK == 0).sum())
        words += f" {gone:,} experts keep no channel." if gone != 1 else " One expert keeps no channel."
    canvas, place = _image(shown_LK / top, layers, "channel" if column == "channels" else column, units, column)
    head = column in ("head", "KV group")
    values = [[None if np.isnan(v) else round(float(v), 3) if head else round(100 * float(v), 1) for v in row]
              for row in shown_LK]  # fmt: skip
    data = {"kind": "map", "box": place, "layers": layers, "column": column, "values": values,
            "unit": "gate value" if head else "% kept", "units": [len(u.value_N) for u in units]}  # fmt: skip
    return Drawn(name, TITLES[kind] if column != "channels" or kind != "expert_channels" else "Layers × channels of all experts",
                 words, markup(canvas, name, TITLES[kind], words), _map_table(name, column, layers, shown_LK), data,
                 legend=legend)  # fmt: skip


def _image(shown_LK: Array, layers: Sequence[int], title: str, units: Sequence[Units], column: str) -> tuple[Figure, list[float]]:
    height = min(7.0, max(HEIGHT, 0.9 + 0.085 * len(layers)))
    with drawing():
        canvas = Figure(figsize=(WIDTH, height))
        axes = canvas.add_axes((PLACE[0], 0.46 / height, PLACE[2], 1 - 0.56 / height))
        axes.grid(False)
        width = max(len(u.value_N) for u in units) if column == "channels" else shown_LK.shape[1]
        extent = (-0.5, width - 0.5, len(layers) - 0.5, -0.5)
        axes.imshow(np.ma.masked_invalid(shown_LK), cmap=SHADES, vmin=0, vmax=1, aspect="auto", extent=extent,
                    interpolation="none")  # fmt: skip
        axes.set_xlabel(title)
        axes.set_ylabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        rows = [round(i) for i in np.linspace(0, len(layers) - 1, min(len(layers), 9))]
        axes.set_yticks(rows, [str(layers[i]) for i in rows])
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)
        return canvas, box(axes)


def _map_table(name: str, column: str, layers: Sequence[int], shown_LK: Array) -> Table:
    head = column in ("head", "KV group")
    what = "gate values, 0 is removed" if head else "% kept"
    columns = ["layer", *(str(k) for k in range(shown_LK.shape[1]))]
    table = Table(f"{name}-table", f"{what}, by layer and {column}" + (" (in equal parts)" if column == "channels" else ""),
                  columns)  # fmt: skip
    for layer, row in zip(layers, shown_LK, strict=True):
        texts = [Cell("") if np.isnan(v) else Cell(f"{v:.2f}" if head else f"{100 * v:.0f}", float(v)) for v in row]
        table.add(Cell(str(layer), layer), *texts)
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
                    left = int(u.kept_N.reshape(u.experts, -1).any(1).sum())
                    experts = Cell(f"{left:,} of {u.experts:,}", left)
                median = float(np.median(u.value_N[u.kept_N])) if u.kept_N.any() else float("nan")
                table.add(*([record.label] if many else []), Cell(str(u.layer), u.layer), KINDS[kind], len(u.value_N),
                          int(u.kept_N.sum()), Cell(f"{u.share:.1%}", u.share), experts, median,
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
            axes.bar(-edges[1] * 1.4 + i * slot, closed, slot * 0.9, align="edge", color=series(i), alpha=0.45, zorder=2)
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
        table.add(float(edges[i]), float(edges[i + 1]), *(Cell(figure(100 * float(c[i])), float(c[i])) for _, c in shares))
    title, said = "Values of the gates", " ".join(words)
    return Drawn(name, title, said, markup(canvas, name, title, said), table)
