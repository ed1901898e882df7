"""Runs the study of quality: every cell that has no result yet, one after the other, with the dense model loaded once.

    python benchmarks/quality/study.py MODEL --data FOLDER [--only GLOB] [--results DIR] [--time-limit MINUTES] [--list]

MODEL is a GGUF file or a model folder; results are kept by its short name, the folder that the file lies in. A cell is
pruned by the stages of `secateur prune` in a run folder of its own, judged (judge.py) and written to one JSON file;
then its exported model is deleted. What is interrupted goes on where it stopped; a cell that has its file does not run
again. `python benchmarks/quality/report.py` makes the tables and plots.
"""

import argparse
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, which transformers does

import torch
from rich.console import Console
from transformers.utils import logging

from cells import Cell, cells_of
from judge import Judge, curve_of, linked_calibration, with_ones
from machine import machine, versions
from secateur.bos import leading_bos
from secateur.budget import Figures
from secateur.card import public_name
from secateur.config import Config
from secateur.exported import load_export, plan_of
from secateur.files import InputError, read_json, write_json
from secateur.load import Loaded, load
from secateur.progress import Screen
from secateur.recipes import ONE_SHOT
from secateur.run import Run, new_run, open_run
from secateur.session import Session
from secateur.stages import VerificationFailed, remaining_stages

HERE = Path(__file__).parent
SIZES = (*(field.name for field in fields(Figures)), "disk_bytes")
console = Console(highlight=False, soft_wrap=True)


@dataclass
class Study:
    """A model under study, with what all of its cells share."""

    model: str
    """GGUF file, model folder or hub id."""
    data: Path
    """Folder with `text/` and `tasks/` (judge.py names the files)."""
    results: Path
    """One JSON file a cell, in a folder for each model."""
    work: Path
    """Run folders; may be deleted at any time, at the cost of what is unfinished."""

    @property
    def name(self) -> str:
        """Short name of the model: the last folder of its path."""
        path = Path(self.model).expanduser()
        return path.resolve().parent.name if path.suffix == ".gguf" else path.name

    @cached_property
    def loaded(self) -> Loaded:
        """The dense model, shared by all cells: none may change it."""
        return load(self.model, "auto", "auto", trust_remote_code=False)

    @cached_property
    def bos(self) -> int | None:
        """What windows and blocks begin with."""
        return leading_bos(self.loaded.model, self.loaded.tokenizer)

    @cached_property
    def judge(self) -> Judge:
        """The texts and tasks that every model of the study is judged on."""
        return Judge(self.loaded.tokenizer, self.bos, self.data)

    @cached_property
    def dense(self) -> dict[str, Any]:
        """What the dense model does, measured once: dense.json."""
        path = self.results / self.name / "dense.json"
        if not path.exists():
            console.print(f"{self.name}: judging the dense model")
            figures = self.judge.figures(self.loaded.model)
            write_json(path, {"model": public_name(self.model), **figures, **_circumstances()})
        return dict(read_json(path, "study.py"))

    def result_file(self, cell: Cell) -> Path:
        """Where a cell's result is kept."""
        return self.results / f"{cell.id}.json"

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells without a result, in their order."""
        return [cell for cell in cells if not self.result_file(cell).exists()]

    @cached_property
    def calibration(self) -> Path:
        """A folder of links to the calibration files, which `--data` reads as one text."""
        return linked_calibration(self.data, self.work / "calibration")

    def run_of(self, cell: Cell) -> Run:
        """The cell's run: one that was begun with the same settings, else a new one."""
        folder = self.work / cell.id
        config = Config(self.model, **cell.settings, data=str(self.calibration), out=folder)
        if (folder / "config.yaml").exists():
            run = open_run(folder)
            if replace(run.config, data=config.data) == replace(config.resolved(), out=None):
                return run
            shutil.rmtree(folder)  # begun by a version with other defaults
        return new_run(config)

    def session(self, run: Run, screen: Screen) -> Session:
        """A session that shares the dense model with all others."""
        session = Session(run, screen)
        session.loaded = replace(self.loaded, description=self.loaded.description.only(run.config.units))
        session.bos = self.bos
        return session


def run_cell(study: Study, cell: Cell) -> dict[str, Any]:
    """Prunes, judges, and returns what the result file holds. Raises what the stages raise."""
    dense, run = study.dense, study.run_of(cell)
    _borrow_gates(study, cell, run)
    before = _checksum(study.loaded)
    with Screen(console, run.config) as screen:
        session = study.session(run, screen)
        pruned = remaining_stages(session)
        start = time.perf_counter()
        model = load_export(session, plan_of(session)[0], next(study.loaded.model.parameters()).dtype)
        figures = study.judge.figures(model, dense)
        figures["ones"] = with_ones(session, study.judge) if cell.learns_as == cell else None
    assert _checksum(study.loaded) == before, f"{cell.id} changed the dense model, which the next cell needs"
    return {
        "cell": {"id": cell.id, "label": cell.label, "tokens": cell.tokens, **asdict(cell)},
        **figures,
        "held_out": {"dense": pruned["dense"]["loss"], "pruned": pruned["pruned"]["loss"]},
        "sizes": {name: pruned["pruned"][name] for name in SIZES},
        "rounding": pruned["rounding"],
        "fixing": pruned["fixing"],
        "updates": pruned["updates"],
        "refit": pruned.get("refit"),
        "seconds": {**pruned["seconds"], "judge": round(time.perf_counter() - start, 2)},
        "curve": curve_of(run.metrics) if cell.curve else None,
        **_circumstances(),
    }


def _borrow_gates(study: Study, cell: Cell, run: Run) -> None:
    """Spares a cell the learning when another one has learned the same gates: its variant starts after them."""
    source = study.work / cell.learns_as.id
    if cell.learns_as == cell or run.gates.exists() or not (source / run.gates.name).exists():
        return
    for path in (run.data, run.timings, run.gates):  # the gates last: they say that learning is done
        shutil.copyfile(source / path.name, path)


def _checksum(loaded: Loaded) -> float:
    return sum(p.sum(dtype=torch.float64).item() for p in loaded.model.parameters())


def _circumstances() -> dict[str, Any]:
    return {"machine": machine(), "versions": versions(), "date": date.today().isoformat()}


def run_cells(study: Study, cells: Sequence[Cell], time_limit: float | None = None) -> list[Cell]:
    """Runs the cells that have no result, within `time_limit` seconds. Returns those that failed; others go on."""
    start, failed = time.monotonic(), []
    waiting = study.missing(cells)
    for number, cell in enumerate(waiting, start=1):
        expected = expected_seconds(study, cell)
        if time_limit is not None and time.monotonic() - start + expected > time_limit:
            console.print(f"stopping before {cell.id}, which is expected to take {expected / 60:.0f} min")
            break
        console.print(f"[bold]{cell.id}[/bold]  ({number} of {len(waiting)}, about {expected / 60:.0f} min)")
        try:
            write_json(study.result_file(cell), run_cell(study, cell))
        except (InputError, VerificationFailed) as error:
            console.print(f"failed: {cell.id}: {error}", markup=False)
            failed.append(cell)
        else:
            shutil.rmtree(study.work / cell.id / "model")  # gates and metrics stay, they are small
    return failed


def expected_seconds(study: Study, cell: Cell) -> float:
    """How long a cell should take, from those that are done: learning goes with the steps, the rest does not.

    One-shot methods and learned ones are timed apart. 0 while nothing is known.
    """

    def kind(method: str) -> bool:
        return method in ONE_SHOT

    done = [read_json(path, "study.py") for path in sorted((study.results / study.name).glob("*-seed*.json"))]
    alike = [result for result in done if kind(result["cell"]["method"]) == kind(cell.method)] or done
    if not alike:
        return 0.0
    step = statistics.median(r["seconds"]["learn"] / r["cell"]["steps"] for r in alike)
    rest = statistics.median(sum(r["seconds"].values()) - r["seconds"]["learn"] for r in alike)
    return step * cell.steps + rest


def show(study: Study, cells: Iterable[Cell]) -> None:
    """`--list`: every cell, whether it is done, and how long it should take."""
    for cell in cells:
        expected = expected_seconds(study, cell)
        missing = f"{expected / 60:4.0f} min" if expected else "to do"
        console.print(f"{'done' if study.result_file(cell).exists() else missing:>8}  {cell.id}", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all is well, 1 a cell failed, 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file or model folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with text/ and tasks/")
    parser.add_argument("--only", default="*", metavar="GLOB", help="only cells with such an id, e.g. '*-s0.2-*'")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "runs" / "study", help="run folders")
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="begin no cell that would end later")
    parser.add_argument("--list", action="store_true", help="list the cells and run none")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_flush_denormal(True)
    study = Study(options.model, options.data, options.results, options.work)
    cells = [
        cell for cell in cells_of(study.name) if fnmatch(cell.id, options.only) or fnmatch(cell.name, options.only)
    ]
    if options.list:
        show(study, cells)
        return 0
    try:
        limit = None if options.time_limit is None else options.time_limit * 60
        failed = run_cells(study, cells, limit)
    except InputError as error:
        console.print(f"study: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on")
        return 130
    left = study.missing(cells)
    console.print(f"{len(cells) - len(left)} of {len(cells)} cells have a result, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
