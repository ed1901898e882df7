"""The folder of a run: one file a stage, so that each stage can be rerun alone and an interrupted run goes on.

describe → learn (gates.safetensors) → plan (plan.json) → export (model/) → verify (verify.json)
  → refit, recover (model/ with other weights; where asked for) → eval (eval.json) → report (report.html)
"""

import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from secateur import __version__
from secateur.config import Config, name_in_memory
from secateur.config_file import load_config, save_config, trusted
from secateur.files import InputError, cannot_write, meant, sweep
from secateur.latency import read_table, write_table
from secateur.untrusted import check_links

GIVEN_TEXTS = {"data": "texts-given-in-python", "eval_data": "evaluation-texts-given-in-python"}
"""Setting → name of the file, before its suffix, that holds the texts which Python code gave for it."""
NOT_YET_BEGUN = {"config.yaml", "timings.json", "latency.json"} | {
    name + suffix for name in GIVEN_TEXTS.values() for suffix in (".txt", ".jsonl")
}
"""What a run leaves that failed before it read its data: the corrected command may use the folder again."""


@dataclass(frozen=True)
class Run:
    """Where a run keeps its files."""

    folder: Path
    config: Config

    @property
    def data(self) -> Path:
        """Token blocks, packed once."""
        return self.folder / "data.safetensors"

    def guard(self, number: int) -> Path:
        """Token blocks of a `--guard`, by its place among them."""
        return self.folder / f"guard-{number}.safetensors"

    @property
    def metrics(self) -> Path:
        """A line a learning step."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """States of an unfinished learning run; gone when it is done."""
        return self.folder / "checkpoints"

    @property
    def teacher(self) -> Path:
        """Distributions of the unpruned model (`--teacher cache`), which the sizes of a run share."""
        whole = self.folder.parents[1] if self.folder.parent.name == "sizes" else self.folder
        return whole / "teacher"

    @property
    def gates(self) -> Path:
        """The learned gates."""
        return self.folder / "gates.safetensors"

    @property
    def latency(self) -> Path:
        """The run's own copy of its latency table."""
        return self.folder / "latency.json"

    @property
    def plan(self) -> Path:
        """What is kept."""
        return self.folder / "plan.json"

    @property
    def model(self) -> Path:
        """The exported checkpoint."""
        return self.folder / "model"

    @property
    def failed_model(self) -> Path:
        """Where an export goes that did not pass verification."""
        return self.folder / "model-failed-verification"

    @property
    def refit(self) -> Path:
        """What each round of refit did."""
        return self.folder / "refit.json"

    @property
    def recovery(self) -> Path:
        """States of an unfinished recovery; gone when it is done."""
        return self.folder / "recovery"

    @property
    def recover_metrics(self) -> Path:
        """A line a step of recovery."""
        return self.folder / "recover.jsonl"

    @property
    def verify(self) -> Path:
        """Gated against exported logits."""
        return self.folder / "verify.json"

    @property
    def eval(self) -> Path:
        """Dense against pruned figures."""
        return self.folder / "eval.json"

    @property
    def report(self) -> Path:
        """All of it, to look at."""
        return self.folder / "report.html"

    def converted(self) -> list[Path]:
        """What was made of the export for other runtimes."""
        return [*self.folder.glob("model-*.gguf"), *self.folder.glob("verify-*.json")]

    @property
    def sizes(self) -> Path:
        """The same model in other sizes, each in the folder of a run of its own."""
        return self.folder / "sizes"

    @property
    def sweep(self) -> Path:
        """What a sweep over sizes is, and whether it is done."""
        return self.folder / "sweep.json"

    @property
    def timings(self) -> Path:
        """Seconds that each stage took."""
        return self.folder / "timings.json"


def new_run(config: Config) -> Run:
    """Creates the folder with its config.yaml. Raises InputError if it holds another run."""
    config = config.resolved()
    if config.gates is not None and not config.gates.is_file():
        raise InputError(f"--gates {config.gates} is no file; give the gates.safetensors of a run")
    folder = config.out or free_folder(config)
    if folder.exists() and (not folder.is_dir() or {meant(path.name) for path in folder.iterdir()} - NOT_YET_BEGUN):
        what = "holds another run" if (folder / "config.yaml").is_file() else "is not empty"
        hint = f", or continue that run with `secateur prune --resume {folder}`" if what == "holds another run" else ""
        raise InputError(f"{folder} {what}; choose another --out{hint}")
    run = Run(folder, config)
    table = None if config.latency_table is None else read_table(config.latency_table)
    sweep(folder)
    save_config(config, folder / "config.yaml")
    run.latency.unlink(missing_ok=True)  # of a run that failed before it began
    if table is not None:
        write_table(run.latency, table)
    return run


def open_run(folder: Path, trust_remote_code: bool | None = False) -> Run:
    """An existing run, without what was half-written when it was killed. Raises InputError if the folder is none, has
    links that lead out of it (a command would write there), or asks for code of the model that is not trusted here
    (config_file.trusted)."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the --out folder of `secateur prune`")
    try:
        check_links(folder, deep=True)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from None
    path = folder / "config.yaml"
    run = Run(folder, trusted(load_config(path).resolved(), path, trust_remote_code))
    sweep(folder)
    return run


def open_one(folder: Path, trust_remote_code: bool | None = False) -> Run:
    """An existing run of one size. Raises InputError for the folder of a sweep."""
    run = open_run(folder, trust_remote_code)
    if run.config.sweep is not None:
        found = ", ".join(sorted(path.parent.name for path in run.sizes.glob("*/gates.safetensors"))) or "not there yet"
        raise InputError(f"{folder} is a sweep over sizes ({found}), each a run of its own: say {run.sizes}/SIZE")
    return run


@contextmanager
def recorded(path: Path, every: int, hear: Callable[[Any], None]) -> Iterator[Callable[[Any], None]]:
    """What takes in the steps of a training run, as dataclasses with a `step`: a line a step to `path`, then to `hear`.

    Lines of earlier steps, from before an interruption, stay, and no others. They are on the disk before there is a
    checkpoint, `every` so many steps, that counts on them.
    """
    try:
        metrics = path.open("ab", buffering=0)
    except OSError as error:
        raise cannot_write(path, error) from None
    fresh = True

    def on_step(step: Any) -> None:
        nonlocal fresh
        line = json.dumps({k: v for k, v in asdict(step).items() if v is not None}) + "\n"
        try:
            if fresh:  # not before: what another interruption leaves must still have its lines
                lines = path.read_bytes().splitlines(keepends=True)
                metrics.truncate(sum(map(len, lines[: step.step - 1])))
                fresh = False
            rest = line.encode()
            while rest:
                rest = rest[metrics.write(rest) :]
            if step.step % every == 0:
                os.fsync(metrics.fileno())
        except OSError as error:
            raise cannot_write(path, error) from None
        hear(step)

    with metrics:
        yield on_step


def versions() -> dict[str, str]:
    """Versions of what the figures of a run come from."""
    return {
        "secateur": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def free_folder(config: Config) -> Path:
    """A new folder under runs/, named after the model and what is asked for."""
    asked = [] if config.sparsity is None else [f"s{config.sparsity:g}"]
    asked += [] if config.sweep is None else [f"sweep-{config.sweep.replace(':', '-')}"]
    name = "-".join([Path(name_in_memory(config.model)).stem or "model", *asked, *config.budget])
    candidates = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(c for c in candidates if not c.exists())
