"""The study's result files, read back: an `Entry` is a row of a table, with the results of all its seeds."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cells import Cell, cells_of
from secateur.files import read_json

Result = dict[str, Any]
Read = Callable[[Result], float]
"""Takes a figure out of a result."""

NOISE_FACTOR = 2 * math.sqrt(2)
"""A margin counts from this many standard deviations over seeds on: two, of a difference of two noisy figures."""

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Number of pairs → the quantile of Student's t for a confidence of 95 % on both sides."""


def times_dense(text: str) -> Read:
    """Perplexity on a text as a multiple of the dense model's."""
    return lambda result: result["perplexity"][text]["times_dense"]


def held_out_rise(result: Result) -> float:
    """Loss on held-out text of the calibration's kind above the dense model's, nats a token."""
    return result["held_out"]["pruned"] - result["held_out"]["dense"]


def accuracy(task: str) -> Read:
    """Accuracy on a task."""
    return lambda result: result["tasks"][task]["accuracy"]


@dataclass(frozen=True)
class Entry:
    """A row: one method, sparsity and number of tokens."""

    cell: Cell
    """Of seed 0."""
    planned: tuple[int, ...]
    """Seeds that the study has for it."""
    by_seed: dict[int, Result]
    """The results there are."""

    def values(self, read: Read) -> list[float]:
        """A figure of every seed."""
        return [read(result) for _seed, result in sorted(self.by_seed.items())]

    def noise(self, read: Read) -> float | None:
        """The least relative margin that counts: from the spread of log figures over seeds. None for a single seed."""
        logs = [math.log(value) for value in self.values(read)]
        return NOISE_FACTOR * statistics.stdev(logs) if len(logs) > 1 else None

    def margin(self, other: "Entry", read: Read) -> "Margin | None":
        """Log ratios of a figure to another entry's, at the seeds that both have."""
        shared = sorted(self.by_seed.keys() & other.by_seed.keys())
        logs = [math.log(read(self.by_seed[seed]) / read(other.by_seed[seed])) for seed in shared]
        return Margin(tuple(logs)) if logs else None


@dataclass(frozen=True)
class Margin:
    """How much higher one row's figure is than another's, as log ratios within each seed: the same text in the same
    order, and the same documents held out."""

    logs: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.logs)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds. None for a single one."""
        return statistics.stdev(self.logs) if len(self.logs) > 1 else None

    def counts(self, noise: float | None) -> bool:
        """Whether it is more than noise: that of pairs where there are several seeds, else that of the other row."""
        if self.deviation is not None:
            return abs(self.mean) > STUDENT_T[len(self.logs)] * self.deviation / math.sqrt(len(self.logs))
        return noise is not None and abs(self.mean) > noise


@dataclass(frozen=True)
class Results:
    """What there is of a model."""

    model: str
    dense: Result | None
    entries: tuple[Entry, ...]

    @property
    def all(self) -> list[Result]:
        """Every result, the dense model's first."""
        own = [result for entry in self.entries for result in entry.by_seed.values()]
        return ([self.dense] if self.dense else []) + own

    def entry(self, label: str, sparsity: float, tokens: int) -> Entry | None:
        """An entry by what it is called in the tables."""
        wanted = (label, sparsity, tokens)
        return next((e for e in self.entries if (e.cell.label, e.cell.sparsity, e.cell.tokens) == wanted), None)


def read_results(folder: Path, model: str) -> Results:
    """Reads what there is of a model's cells; files of cells that the study no longer has are left out."""
    rows: dict[Cell, dict[int, Path]] = {}
    for cell in cells_of(model):
        rows.setdefault(replace(cell, seed=0, curve=False), {})[cell.seed] = folder / f"{cell.id}.json"
    entries = (
        Entry(cell, tuple(paths), {seed: _read(path) for seed, path in paths.items() if path.exists()})
        for cell, paths in rows.items()
    )
    dense = folder / model / "dense.json"
    return Results(model, _read(dense) if dense.exists() else None, tuple(entries))


def _read(path: Path) -> Result:
    return dict(read_json(path, "study.py"))
