"""What `secateur bench` says: a table of measured and ideal speed-ups, a line on what eats the difference, a plot."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from secateur.card import human
from secateur.latency import lines as predictions
from secateur.measure import UNITS
from secateur.plots import draw_to

NEGLIGIBLE = 0.005
"""Shares of the dense time below it are not named."""


def show(console: Console, results: Mapping[str, Any]) -> None:
    """Prints all there is to say."""
    console.print(table(results))
    for line in lines(results):
        console.print(line, markup=False, soft_wrap=True)


def table(results: Mapping[str, Any]) -> Table:
    """A row a metric and batch size."""
    settings = results["settings"]
    title = (
        f"{results['runtime']}, {results['dtype']}: {settings['prompt_tokens']} + {settings['new_tokens']} tokens, "
        f"medians of {settings['rounds']} (least–most)"
    )
    found = Table(title=title, title_justify="left")
    for column in ("", "at a time", "dense", "pruned", "speed-up", "ideal"):
        found.add_column(column, justify="right" if column else "left")
    for row in results["timings"]:
        speedup, ideal = row["speedup"], row["ideal"]
        found.add_row(
            f"{UNITS[row['metric']].title} ({'ms' if row['unit'] == 's' else row['unit']})",
            str(row["batch_size"]),
            *(_number(row[name]["median"], row["unit"]) for name in ("dense", "pruned")),
            f"{speedup['median']:.2f} × ({speedup['low']:.2f}–{speedup['high']:.2f})",
            f"{ideal['speedup']:.2f} × ({'FLOPs' if ideal['by'] == 'flops' else ideal['by']})",
        )
    return found


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """What eats the difference, odd widths, memory, versions."""
    for row in results["timings"]:
        if "eaten" in row:
            yield _eaten(row)
    yield from predictions(results.get("predicted", {"differs": [], "rows": []}))
    odd = results["pruned"]["odd_widths"]
    dense = results["dense"]["odd_widths"]
    for block in sorted(odd, key=int, reverse=True):
        if len(odd[block]) > len(dense[block]):
            first = ", ".join(f"{name} {width:,}" for name, width in list(odd[block].items())[:3])
            more = " …" if len(odd[block]) > 3 else ""
            count = f"{len(odd[block])} of {results['pruned']['widths']} widths"
            yield f"{count} are no multiple of {block} ({len(dense[block])} of the dense model's): {first}{more}"
    models = {name: results[name] for name in ("dense", "pruned")}
    peak, weights = ([human(m[k], "B") for m in models.values()] for k in ("peak_bytes", "weight_bytes"))
    yield f"peak memory: {peak[0]} → {peak[1]}; weights {weights[0]} → {weights[1]}"
    tokens = [m["kv_tokens"] for m in models.values()]
    if None not in tokens:
        given, space = models["dense"]["kv_tokens_by"] == "engine", models["dense"]["kv_space_bytes"]
        of = f"a cache of {human(space, 'B')}" if given else "the memory beside the weights"
        yield f"tokens whose keys and values fit in {of}: {human(tokens[0])} → {human(tokens[1])}"
    versions = ", ".join(f"{name} {version}" for name, version in results["pruned"]["versions"].items())
    ran = " → ".join(dict.fromkeys(m["implementation"] for m in models.values()))
    yield f"{versions}; {ran}; {results['machine']['cpu']}, {results['machine']['cores']} cores"


def _number(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e3:,.1f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _eaten(row: Mapping[str, Any]) -> str:
    """`decode, 1 at a time: takes 62.0% of the dense time, and would take 50.0% if …: output head +8.0%, …`"""
    eats, what = row["eaten"], "FLOPs" if row["ideal"]["by"] == "flops" else "bytes"
    named = sorted(eats["by"].items(), key=lambda item: -abs(item[1]))
    named = [item for item in named if abs(item[1]) >= NEGLIGIBLE]
    between = ", ".join(f"{part} {share:+.1%}" for part, share in named) or "nothing"
    return (
        f"{UNITS[row['metric']].title}, {row['batch_size']} at a time: takes {eats['time']:.1%} of the dense time, and "
        f"would take {eats['kept']:.1%} if all of it shrank as the {what} of the layers' maps; the "
        f"{eats['time'] - eats['kept']:+.1%} between: {between}"
    )


# --- plot ------------------------------------------------------------------------------------------------------------


def draw(results: Mapping[str, Any], path: Path) -> str:
    """Draws measured beside ideal speed-ups, a pair of bars a metric and batch size; says what it did."""
    return draw_to(path, lambda new_figure: _bars(results, new_figure))


def _bars(results: Mapping[str, Any], new_figure: Callable[..., Any]) -> Any:
    rows = results["timings"]
    figure = new_figure(figsize=(max(5.0, 1.1 * len(rows) + 1.5), 4.0))
    axes = figure.subplots()
    places = range(len(rows))
    measured = [row["speedup"] for row in rows]
    spread = [[m["median"] - m["low"] for m in measured], [m["high"] - m["median"] for m in measured]]
    ideal = [row["ideal"]["speedup"] for row in rows]
    medians = [m["median"] for m in measured]
    bars = axes.bar([p - 0.2 for p in places], medians, 0.38, yerr=spread, capsize=3, color="#1b6ca8", label="measured")
    axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
    paper = axes.bar([p + 0.2 for p in places], ideal, 0.38, color="#c9d6df", label="ideal (FLOPs or bytes)")
    axes.bar_label(paper, fmt="%.2f", padding=4, fontsize=9)
    axes.axhline(1.0, color="black", linewidth=0.8)
    names = [f"{UNITS[row['metric']].title}\n× {row['batch_size']}" for row in rows]
    axes.set_xticks(list(places), [name.replace("time ", "time\n") for name in names], fontsize=9)
    axes.set_ylim(0, 1.2 * max(m["high"] for m in [*measured, *({"high": value} for value in ideal)]))
    axes.set_ylabel("times as fast as the dense model")
    size = f"{human(results['dense']['parameters'])} → {human(results['pruned']['parameters'])} parameters"
    axes.set_title(f"{results['runtime']}, {results['dtype']}, {size}", fontsize=10)
    axes.legend(loc="upper right", fontsize=9, ncols=2, frameon=False)
    return figure
