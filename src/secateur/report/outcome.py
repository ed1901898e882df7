"""What came of it: quality against size and speed over the runs, evaluation with its errors, measured speed-ups."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.card import human, public_name
from secateur.measure import UNITS
from secateur.report.drawn import Cell, Drawn, Table
from secateur.report.lines import HEIGHT, PLAIN, WIDTH
from secateur.report.reading import Record
from secateur.report.svg import FAINT, INK, RUN, box, drawing, markup, series
from secateur.report.tables import times

Point = tuple[Record, float, float]
"""A run, what it costs as a share of the dense model, and its perplexity as a multiple of the dense one's."""


def pareto(records: Sequence[Record]) -> list[Drawn]:
    """Perplexity against parameters, and against measured decoding speed, where texts and windows are the same."""
    figures = []
    for place, (about, known) in enumerate(_comparable(records).items()):
        sizes = [(r, r.evaluation["pruned"]["parameters"] / r.evaluation["dense"]["parameters"]) for r in known
                 if r.evaluation]  # fmt: skip
        figures.append(_pareto(f"pareto-size-{place}", "Quality against size", "parameters, share of the dense model",
                               [(r, x, r.ratio[0]) for r, x in sizes], about, best_is_low=True))  # fmt: skip
        for runtime in sorted({bench["runtime"] for r in known for bench in r.benches}):
            speeds = [(r, x, r.ratio[0]) for r in known if (x := _decode(r, runtime)) is not None]
            if speeds:
                figures.append(_pareto(f"pareto-{runtime}-{place}", f"Quality against speed, {runtime}",
                                       "decoding speed, × dense", speeds, about, best_is_low=False))  # fmt: skip
    return figures


def _comparable(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs whose perplexities were measured in the same way on the same model."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record.evaluation is not None:
            dense = record.evaluation["dense"]
            about = (
                f"{public_name(record.run.config.model)} on {record.evaluation['text']}, {dense['windows']:,} windows "
                f"of {dense['length']:,} tokens; dense perplexity {dense['perplexity']:.2f}"
            )
            found.setdefault(about, []).append(record)
    return found


def _decode(record: Record, runtime: str) -> float | None:
    """The speed-up of decoding at the smallest batch."""
    for bench in record.benches:
        rows = [t for t in bench["timings"] if t["metric"] in ("decode", "between_tokens")]
        if bench["runtime"] == runtime and rows:
            return float(min(rows, key=lambda t: t["batch_size"])["speedup"]["median"])
    return None


def _pareto(name: str, title: str, x_title: str, points: list[Point], about: str, best_is_low: bool) -> Drawn:
    front = _front(points, best_is_low)
    with drawing():
        canvas = Figure(figsize=(WIDTH, HEIGHT))
        axes = canvas.add_axes(PLAIN)
        axes.plot([1], [1], "D", markerfacecolor="none", color=INK, markersize=6)
        axes.annotate("dense", (1, 1), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
        if len(front) > 1:
            axes.plot([p[1] for p in front], [p[2] for p in front], color=INK, linewidth=0.9, linestyle="--")
        for record, x, y in points:
            gid = f"{RUN}{record.number}"
            error = record.ratio[1]
            if np.isfinite(error):
                axes.vlines(x, max(y - error, 0.1), y + error, color=series(record.number), linewidth=1.2, gid=gid)
            axes.plot([x], [y], "o", color=series(record.number), markersize=6, gid=gid)
            axes.annotate(
                str(record.number + 1), (x, y), xytext=(6, 3), textcoords="offset points", fontsize=8, gid=gid
            )
        axes.set_yscale("log")
        worst = max([2.0, *(y for _, _, y in points if np.isfinite(y))])
        ticks = [t for t in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 20, 50, 100, 1000, 10_000) if t <= worst * 1.3]
        axes.set_yticks(ticks, [f"{t:g} ×" for t in ticks])
        axes.minorticks_off()
        axes.set_ylim(0.93, worst * 1.25)
        axes.margins(x=0.12)
        axes.set_xlabel(x_title)
        axes.set_ylabel("perplexity, × dense")
        data = {"kind": "points", "box": box(axes), "x": list(axes.get_xlim()), "y": list(axes.get_ylim()), "log": True,
                "points": [{"name": f"{r.number + 1} {r.label}", "run": r.number, "x": x, "y": y,
                            "text": f"{x:.3g} {x_title.partition(',')[0]}, perplexity {times(r)} dense"}
                           for r, x, y in points if np.isfinite(y)]}  # fmt: skip
    table = Table(f"{name}-table", f"{title}, figures", ["run", x_title, "perplexity, × dense", "on the front"])
    for record, x, y in points:
        best = any(record is other for other, _, _ in front)
        table.add(f"{record.number + 1} {record.label}", x, y, best, run=record.number)
    best_said = ", ".join(r.label for r, _, _ in front)
    words = f"{about}. {len(points)} {'run' if len(points) == 1 else 'runs'}" + (
        f"; no other is better in both than: {best_said}." if len(points) > 1
        else f": {points[0][1]:.3g} of {x_title.partition(',')[0]}, perplexity {points[0][2]:.3g} times the dense one."
    )  # fmt: skip
    return Drawn(name, title, words, markup(canvas, name, title, words), table, data)


def _front(points: list[Point], best_is_low: bool) -> list[Point]:
    """The points that no other is better than in both, by their cost."""
    found: list[Point] = []
    for point in sorted((p for p in points if np.isfinite(p[2])), key=lambda p: (p[1] if best_is_low else -p[1], p[2])):
        if not found or point[2] < found[-1][2]:
            found.append(point)
    return found


def task_figure(record: Record) -> Drawn | None:
    """Accuracies of zero-shot tasks with standard errors, and their paired differences."""
    tasks: Mapping[str, Any] = (record.evaluation or {}).get("tasks") or {}
    if not tasks:
        return None
    shown = {name: _metric(task) for name, task in tasks.items()}
    names = list(tasks)
    height = min(9.0, max(1.6, 0.9 + 0.34 * len(names)))
    name, title = f"tasks-{record.number}", "Zero-shot tasks"
    words = []
    with drawing():
        canvas = Figure(figsize=(WIDTH, height))
        axes = canvas.add_axes((0.3, 0.46 / height, 0.66, 1 - 0.78 / height))
        for model, colour, shift in (("dense", 1, -0.13), ("pruned", 0, 0.13)):
            values = [tasks[n][model][shown[n]] for n in names]
            errors = [tasks[n][model].get(f"{shown[n]}_stderr") or 0.0 for n in names]
            places = [i + shift for i in range(len(names))]
            axes.errorbar(values, places, xerr=errors, fmt="o", markersize=4.5, capsize=2.5, elinewidth=1.2,
                          color=series(colour), label=f"{model} ± standard error")  # fmt: skip
        axes.set_yticks(range(len(names)), [n if len(n) < 22 else n[:20] + "…" for n in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("accuracy")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.4, 1.0), ncols=2, borderaxespad=0.2)
    table = Table(f"{name}-table", "Zero-shot tasks, ± standard error, the change paired item by item",
                  ["task", "metric", "items", "dense", "pruned", "change"])  # fmt: skip
    for task_name, task in tasks.items():
        for metric in (key for key in task["dense"] if not key.endswith("_stderr")):
            figures = [_with_error(task[c], metric, c == "difference") for c in ("dense", "pruned", "difference")]
            table.add(task_name, metric, Cell(f"{task['items']:,} of {task['of']:,}", task["items"]), *figures)
        words.append(f"{task_name}: {', '.join(c.text for c in figures[:2])} (change {figures[2].text}).")
    said = "Accuracy, dense then pruned. " + " ".join(words)
    return Drawn(name, title, said, markup(canvas, name, title, said), table)


def _metric(task: Mapping[str, Any]) -> str:
    return next(key for key in task["dense"] if not key.endswith("_stderr"))


def _with_error(figures: Mapping[str, Any], metric: str, signed: bool) -> Cell:
    value, error = figures[metric], figures.get(f"{metric}_stderr")
    text = f"{value:+.3f}".replace("-", "−") if signed else f"{value:.3f}"
    return Cell(text if error is None else f"{text} ± {error:.3f}", value)


def bench_figure(bench: Mapping[str, Any], name: str) -> Drawn:
    """Measured speed-ups with their range, beside what FLOPs and bytes promise."""
    settings, title = bench["settings"], f"Speed in {bench['runtime']}"
    columns = ["", "at a time", "dense", "pruned", "speed-up", "least", "largest", "ideal"]
    table = Table(f"{name}-table", f"{title}, medians of {settings['rounds']} rounds", columns)
    rows = bench["timings"]
    height = min(9.0, max(1.7, 0.95 + 0.36 * len(rows)))
    with drawing():
        canvas = Figure(figsize=(WIDTH, height))
        axes = canvas.add_axes((0.3, 0.46 / height, 0.66, 1 - 0.78 / height))
        places = np.arange(len(rows))
        measured = np.array([[row["speedup"][k] for k in ("median", "low", "high")] for row in rows]).reshape(-1, 3)
        spread = np.abs(measured[:, 1:].T - measured[:, 0])
        label = "measured (least to largest)"
        axes.barh(places - 0.17, measured[:, 0], 0.32, xerr=spread, color=series(0), label=label,
                  error_kw={"ecolor": INK, "elinewidth": 1.0, "capsize": 2.5})  # fmt: skip
        axes.barh(places + 0.17, [row["ideal"]["speedup"] for row in rows], 0.32, color=FAINT, edgecolor=INK,
                  linewidth=0.6, label="ideal (FLOPs or bytes)")  # fmt: skip
        axes.axvline(1.0, color=INK, linewidth=0.9)
        axes.set_yticks(places, [f"{_title(row['metric'])} × {row['batch_size']}" for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.set_xlabel("times as fast as the dense model")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.44, 1.0), ncols=2, borderaxespad=0.2)
    words = []
    for row in rows:
        fast, factor = row["speedup"], 1e3 if row["unit"] == "s" else 1
        unit = "ms" if row["unit"] == "s" else row["unit"]
        values = [Cell(f"{row[m]['median'] * factor:,.4g} {unit}", row[m]["median"]) for m in ("dense", "pruned")]
        times = [Cell(f"{v:.2f} ×", v) for v in (fast["median"], fast["low"], fast["high"], row["ideal"]["speedup"])]
        table.add(_title(row["metric"]), row["batch_size"], *values, *times)
        words.append(f"{_title(row['metric'])}, {row['batch_size']} at a time: {fast['median']:.2f} times as fast.")
    peaks = " → ".join(human(bench[m]["peak_bytes"], "B") for m in ("dense", "pruned"))
    said = (
        f"{bench['dtype']}, {settings['prompt_tokens']} + {settings['new_tokens']} tokens, on "
        f"{bench['machine'].get('cpu')}, {bench['machine'].get('cores')} cores. {' '.join(words)} Peak memory {peaks}."
    )
    return Drawn(name, title, said, markup(canvas, name, title, said), table)


def _title(metric: str) -> str:
    return UNITS[metric].title if metric in UNITS else metric
