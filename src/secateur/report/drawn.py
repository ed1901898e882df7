"""What figures and tables are to the page: a figure has words and a table beside it, a table sorts and filters."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

PLAIN = re.compile(r"-?\d+(\.\d+)?")


@dataclass(frozen=True)
class Cell:
    """One cell, and what it sorts by where that is not its text."""

    text: str
    value: float | None = None

    @property
    def plain(self) -> bool:
        """Whether its text is the number that it sorts by, near enough."""
        return self.value is not None and bool(PLAIN.fullmatch(self.text))


@dataclass
class Table:
    """Rows under columns; the first cell of a row names it."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)
    tags: list[dict[str, str]] = field(default_factory=list)
    """Of each row, what filters go by: `kind`, `run`, `same`."""
    filters: bool = False
    """Whether it has a field to filter by words."""
    choices: Sequence[tuple[str, str]] = ()
    """Values of the tag `kind` that can be chosen, with how they read."""

    def add(self, *cells: Any, **tags: Any) -> None:
        """Adds a row of cells, texts or numbers."""
        assert len(cells) == len(self.columns), f"{self.name}: {len(cells)} cells, {len(self.columns)} columns"
        self.rows.append([c if isinstance(c, Cell) else cell(c) for c in cells])
        self.tags.append({name: str(value) for name, value in tags.items()})


@dataclass(frozen=True)
class Drawn:
    """A figure on the page."""

    name: str
    title: str
    words: str
    """What it shows, for who cannot see it."""
    svg: Markup
    table: Table | None = None
    data: dict[str, Any] | None = None
    """What the page tells of a place that is pointed at."""
    note: str = ""
    legend: tuple[str, str] | None = None
    """What the ends of a map's shades mean."""


def cell(value: Any) -> Cell:
    """A cell for a text or a number."""
    if isinstance(value, bool):
        return Cell("yes" if value else "no", float(value))
    if isinstance(value, int):
        return Cell(f"{value:,}", value)
    if isinstance(value, float):
        return Cell(figure(value), value)
    return Cell(str(value))


def figure(value: float) -> str:
    """A number as tables have it: four digits that count."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def sampled(count: int, most: int) -> Iterable[int]:
    """At most `most` places of `count`, evenly spread, the first and the last among them."""
    if count <= most:
        return range(count)
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
