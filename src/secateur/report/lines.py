"""A figure of lines, in whatever they are: with its words, its table and what the page says where it is pointed at."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.report.drawn import Cell, Drawn, Table, cell, figure, sampled
from secateur.report.reading import Array
from secateur.report.svg import INK, RUN, box, drawing, markup, series

WIDTH, HEIGHT = 4.8, 2.9
"""Inches of a panel, of which several stand side by side, or one on a phone."""

PLACE, PLAIN = (0.145, 0.155, 0.83, 0.72), (0.145, 0.155, 0.83, 0.80)
"""Its axes, with room for a legend above, and without."""

POINTS = 400
"""Points of a line; where there are more, it is the mean of a stretch, with a band from its least to its largest."""

NAMED = 6
"""Lines that a figure names in words and in a legend."""

ROWS = 21
"""Rows of a table beside a figure, at most."""


@dataclass(frozen=True)
class Line:
    """One line."""

    label: str
    x: Array
    y: Array
    colour: int
    run: int | None = None
    """The run that it belongs to, where there are several."""
    style: str = "-"
    low: Array | None = None
    high: Array | None = None
    """A band around it."""


@dataclass
class Panel:
    """A figure of lines."""

    name: str
    title: str
    x_title: str
    y_title: str
    lines: Sequence[Line]
    integers: bool = True
    """Whether x takes whole numbers only."""
    y_range: tuple[float, float] | None = None
    marks: Sequence[tuple[float, str]] = ()
    """Places on the x axis that have a name."""
    note: str = ""
    words: list[str] = field(default_factory=list)
    """What else there is to say of it."""

    def draw(self) -> Drawn:
        """The figure."""
        with drawing():
            canvas = Figure(figsize=(WIDTH, HEIGHT))
            named = 1 < len(self.lines) <= NAMED
            axes = canvas.add_axes(PLACE if named else PLAIN)
            for line in self.lines:
                x, y, low, high = thinned(line)
                gid = None if line.run is None else f"{RUN}{line.run}"
                label = line.label if len(self.lines) <= NAMED else None
                colour = INK if line.colour < 0 else series(line.colour)
                marker = "o" if len(x) <= 1 else None
                if low is not None and high is not None and np.any(high > low):
                    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, gid=gid)
                axes.plot(x, y, line.style, color=colour, label=label, marker=marker, markersize=3, gid=gid)
            for place, label in self.marks:
                axes.axvline(place, color=INK, linewidth=0.8, linestyle=":")
                axes.annotate(label, (place, 1), xycoords=("data", "axes fraction"), xytext=(3, -8),
                              textcoords="offset points", fontsize=8)  # fmt: skip
            if self.y_range is not None:
                axes.set_ylim(*self.y_range)
            if self.integers:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
            axes.margins(x=0.02, y=0.12 if self.marks else 0.05)
            axes.set_xlabel(self.x_title)
            axes.set_ylabel(self.y_title)
            if named:
                axes.legend(loc="lower left", bbox_to_anchor=(-0.15, 1.0), ncols=3, borderaxespad=0.2,
                            columnspacing=1.2)  # fmt: skip
            data = self._data(axes)
        words = self.described()
        return Drawn(self.name, self.title, words, markup(canvas, self.name, self.title, words), self.table(), data,
                     self.note)  # fmt: skip

    def _data(self, axes: Any) -> dict[str, Any]:
        found = []
        for line in self.lines:
            x, y, _low, _high = thinned(line)
            points = {"x": [_short(v) for v in x], "y": [_short(v) for v in y]}
            found.append({"name": line.label, "run": line.run, **points})
        return {"kind": "lines", "box": box(axes), "x": list(axes.get_xlim()), "at": self.x_title, "lines": found}

    def described(self) -> str:
        """The figure in words."""
        said = [f"{self.y_title} by {self.x_title}."]
        for line in self.lines[:NAMED]:
            known = line.y[np.isfinite(line.y)]
            if not len(known):
                said.append(f"{line.label}: nothing that is a number.")
            elif len(known) == 1 or np.all(known == known[0]):
                said.append(f"{line.label}: {figure(float(known[0]))}.")
            else:
                ends = f"from {figure(float(known[0]))} to {figure(float(known[-1]))}"
                span = f"between {figure(float(known.min()))} and {figure(float(known.max()))}"
                said.append(f"{line.label}: {ends}, {span}.")
        if len(self.lines) > NAMED:
            said.append(f"{len(self.lines) - NAMED} more lines are in the table.")
        return " ".join(said + self.words + [f"{label}: {self.x_title} {place:g}." for place, label in self.marks])

    def table(self) -> Table:
        """Values along the lines where they share their x, else a row a line."""
        first = self.lines[0]
        if all(line.run is None and np.array_equal(line.x, first.x) for line in self.lines):
            columns = [self.x_title, *(line.label for line in self.lines)]
            table = Table(f"{self.name}-table", f"{self.title}, figures", columns)
            for i in sampled(len(first.x), ROWS):
                at = Cell(f"{first.x[i]:g}", float(first.x[i]))
                table.add(at, *(cell(float(line.y[i])) for line in self.lines))
            return table
        columns = ["", f"first {self.x_title}", f"last {self.x_title}", "first", "last", "least", "largest"]
        table = Table(f"{self.name}-table", f"{self.title}, figures", columns)
        for line in self.lines:
            y = line.y[np.isfinite(line.y)]
            ends = [line.x[0], line.x[-1]] if len(line.x) else [np.nan, np.nan]
            values = [y[0], y[-1], y.min(), y.max()] if len(y) else [np.nan] * 4
            tags = {} if line.run is None else {"run": line.run}
            table.add(line.label, *(cell(float(v)) for v in (*ends, *values)), **tags)
        return table


def thinned(line: Line) -> tuple[Array, Array, Array | None, Array | None]:
    """x, y, and the lower and upper end of the band, at most POINTS of each."""
    if len(line.x) <= POINTS:
        return line.x, line.y, line.low, line.high
    stretches = np.array_split(np.arange(len(line.x)), POINTS)
    low, high = line.y if line.low is None else line.low, line.y if line.high is None else line.high
    with np.errstate(invalid="ignore"):
        rows = [(line.x[s].mean(), line.y[s].mean(), low[s].min(), high[s].max()) for s in stretches]
    x, y, low, high = np.array(rows).T
    return x, y, low, high


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None
