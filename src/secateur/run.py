"""The folder of a run: one file a stage, so that each stage can be rerun alone and an interrupted run goes on.

describe → learn (gates.safetensors) → plan (plan.json) → export (model/) → verify (verify.json) → eval (eval.json)
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

from secateur.config import Config, load_config, save_config
from secateur.files import InputError

NOT_YET_BEGUN = {"config.yaml", "timings.json"}
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

    @property
    def metrics(self) -> Path:
        """A line a learning step."""
        return self.folder / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        """State of an unfinished learning run; gone when it is done."""
        return self.folder / "checkpoint.safetensors"

    @property
    def gates(self) -> Path:
        """The learned gates."""
        return self.folder / "gates.safetensors"

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
    def verify(self) -> Path:
        """Gated against exported logits."""
        return self.folder / "verify.json"

    @property
    def eval(self) -> Path:
        """Dense against pruned figures."""
        return self.folder / "eval.json"

    @property
    def timings(self) -> Path:
        """Seconds that each stage took."""
        return self.folder / "timings.json"


def new_run(config: Config) -> Run:
    """Creates the folder with its config.yaml. Raises InputError if it holds another run."""
    config = config.resolved()
    folder = config.out or _free_folder(config)
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - NOT_YET_BEGUN):
        what = "holds another run" if (folder / "config.yaml").is_file() else "is not empty"
        hint = f", or continue that run with `secateur prune --resume {folder}`" if what == "holds another run" else ""
        raise InputError(f"{folder} {what}; choose another --out{hint}")
    save_config(config, folder / "config.yaml")
    return Run(folder, config)


def open_run(folder: Path) -> Run:
    """An existing run. Raises InputError if the folder is none."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the --out folder of `secateur prune`")
    return Run(folder, load_config(folder / "config.yaml").resolved())


def _free_folder(config: Config) -> Path:
    name = f"{Path(config.model).stem or 'model'}-s{config.sparsity:g}"
    candidates = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(c for c in candidates if not c.exists())
