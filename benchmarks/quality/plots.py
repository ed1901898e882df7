"""The study's results as two plots a model: quality by tokens, and held-out loss along the runs (claims 1 and 2)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from cells import AFTERWARDS, BASELINES, LEARNED
from results import Entry, Results, times_dense
from tables import percent, tokens_title

_CHANGED = ("deterministic+once", "sensitivity+lora", "sensitivity+lora+twice")
SHOWN = (*LEARNED, *BASELINES, *(f"deterministic+{variant}" for variant in (*AFTERWARDS, "refit+lora")), *_CHANGED)
"""Labels that the first plot draws; the tables have them all."""
COLOURS = {label: plt.get_cmap("tab20")(i) for i, label in enumerate(SHOWN)}
MARKERS = {label: "o" if label in LEARNED else "x" if label in BASELINES else "^" for label in SHOWN}
TEXT = "wikitext2-test"


def draw(results: Results, folder: Path) -> list[Path]:
    """Draws what there is; the files. Nothing is drawn of a model without results."""
    drawn = []
    for name, figure in (("quality", _quality(results)), ("along-the-run", _along_the_run(results))):
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{results.model}-{name}.png"
            figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            drawn.append(path)
    return drawn


def _quality(results: Results) -> Figure | None:
    """Perplexity over tokens, a panel a sparsity; a bar where there are several seeds."""
    entries = [e for e in results.entries if e.by_seed and e.cell.label in SHOWN]
    sparsities = sorted({e.cell.sparsity for e in entries})
    if not entries:
        return None
    figure, axes = plt.subplots(1, len(sparsities), figsize=(4.2 * len(sparsities), 4), squeeze=False)
    for panel, sparsity in zip(axes[0], sparsities, strict=True):
        here = [e for e in entries if e.cell.sparsity == sparsity]
        for label in SHOWN:
            _line(panel, label, [e for e in here if e.cell.label == label])
        _tokens_axis(panel, sorted({e.cell.tokens for e in here}))
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_title(f"{results.model}, {percent(sparsity)} removed")
    axes[0][0].set_ylabel("WikiText-2 perplexity, × dense")
    handles = {
        label: handle for panel in axes[0] for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(0.92, 0.5), frameon=False, fontsize=8
    )
    return figure


def _line(panel: Axes, label: str, entries: list[Entry]) -> None:
    if not entries:
        return
    entries = sorted(entries, key=lambda e: e.cell.tokens)
    values = [e.values(times_dense(TEXT)) for e in entries]
    means = [sum(v) / len(v) for v in values]
    errors = [
        [m - min(v) for m, v in zip(means, values, strict=True)],
        [max(v) - m for m, v in zip(means, values, strict=True)],
    ]
    tokens = [e.cell.tokens + e.cell.recovery_tokens for e in entries]
    panel.errorbar(
        tokens, means, errors, label=label, color=COLOURS[label], marker=MARKERS[label], capsize=3, markersize=5
    )


def _along_the_run(results: Results) -> Figure | None:
    """Held-out loss above the dense model's, deployed (solid) and as trained (dashed), a panel a number of tokens."""
    runs = [e for e in results.entries if 0 in e.by_seed and e.by_seed[0].get("curve")]
    lengths = sorted({e.cell.tokens for e in runs})
    if not runs:
        return None
    figure, axes = plt.subplots(1, len(lengths), figsize=(5 * len(lengths), 4), squeeze=False)
    for panel, tokens in zip(axes[0], lengths, strict=True):
        for entry in (e for e in runs if e.cell.tokens == tokens):
            _curve(panel, entry)
        panel.set_title(f"{results.model}, {percent(runs[0].cell.sparsity)} removed, {tokens_title(tokens)} tokens")
        panel.set_xlabel("step")
        panel.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("held-out loss − dense, nats a token\nsolid: as deployed, dashed: as trained")
    return figure


def _curve(panel: Axes, entry: Entry) -> None:
    result, label = entry.by_seed[0], entry.cell.label
    dense, steps = result["held_out"]["dense"], [point["step"] for point in result["curve"]]
    for key, style, name in (("held_out_deployed", "-", label), ("held_out_trained", "--", None)):
        losses = [point[key] - dense for point in result["curve"]]
        panel.plot(steps, losses, style, color=COLOURS[label], label=name)


def _tokens_axis(panel: Axes, tokens: list[int]) -> None:
    panel.set_xscale("log")
    panel.set_xticks(tokens, [tokens_title(t) for t in tokens])
    panel.set_xticks([], minor=True)
    panel.set_xlim(tokens[0] / 1.5, tokens[-1] * 1.5)
    panel.set_xlabel("calibration tokens")
