"""Curves to watch while a run works, in TensorBoard or Weights & Biases: `--log tensorboard`, `--log wandb`.

The names are the keys of metrics.jsonl, of recover.jsonl and of eval.json, which remain what a run is known by. A run
that goes on continues its curves: steps that an earlier process logged and this one does again appear once.
"""

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from secateur.config import Log
from secateur.files import InputError, read_json, write_json
from secateur.listeners import Progress
from secateur.optimise import Step
from secateur.recover import RecoveryStep
from secateur.run import Run

EXTRA = {"tensorboard": "log", "wandb": "wandb"}
"""Package → the extra of Secateur that brings it."""


def check_installed(logs: Sequence[Log]) -> None:
    """Raises InputError for a log whose package is missing."""
    for name in logs:
        if find_spec(name) is None:
            reason = f"--log {name} needs {name}, which is not installed"
            raise InputError(f"{reason}; run: pip install 'secateur[{EXTRA[name]}]'")


@contextmanager
def logs_of(run: Run) -> Iterator[list[Progress]]:
    """What is to hear of the run's steps for its `--log`; curves are opened by the first one, and closed at the end."""
    logs: list[TensorBoard | WandB] = []
    logs += [TensorBoard(run.folder / "tensorboard")] if "tensorboard" in run.config.log else []
    logs += [WandB(run)] if "wandb" in run.config.log else []
    try:
        yield [*logs]
    finally:
        for log in logs:
            log.close()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested values, names joined by dots; a list of one is that one: {"lambda1": [0.2]} → lambda1."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            value = {str(i): each for i, each in enumerate(value)} if len(value) > 1 else next(iter(value), None)
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


def final(results: Mapping[str, Any]) -> dict[str, float]:
    """Figures of both models from what eval.json holds: dense.perplexity, tasks.arc_easy.pruned.acc."""
    return flat({key: results[key] for key in ("dense", "pruned", "tasks") if key in results})


class TensorBoard(Progress):
    """Event files in RUN/tensorboard: `learn`, `recover` and `eval` are what TensorBoard calls runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writers: dict[str, Any] = {}

    def step(self, step: Step) -> None:
        self._write("learn", step.step, flat(asdict(step)))

    def recovered(self, step: RecoveryStep) -> None:
        self._write("recover", step.step, flat(asdict(step)))

    def evaluated(self, results: Mapping[str, Any]) -> None:
        self._write("eval", 0, final(results))

    def _write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        if name not in self.writers:
            check_installed(["tensorboard"])
            from torch.utils.tensorboard import SummaryWriter

            # What earlier processes logged from this step on, readers pass over.
            self.writers[name] = SummaryWriter(str(self.folder / name), purge_step=step)
        for key, value in values.items():
            if key != "step":
                self.writers[name].add_scalar(key, value, step)

    def close(self) -> None:
        """Writes what waits."""
        for writer in self.writers.values():
            writer.close()


class WandB(Progress):
    """A run of Weights & Biases, in RUN/wandb; the settings are its configuration, the final figures its summary.

    RUN/wandb/secateur.json holds its id, by which it is gone on with, secateur.jsonl what was logged.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.id_file, self.logged_file = (run.folder / "wandb" / f"secateur.{ending}" for ending in ("json", "jsonl"))
        lines = self.logged_file.read_bytes().splitlines(keepends=True) if self.logged_file.exists() else []
        whole = (json.loads(line) for line in lines if line.endswith(b"\n"))
        self.logged: dict[str, dict[str, float]] = {step: values for row in whole for step, values in row.items()}
        self.wandb: Any = None
        self.named: set[str] = set()

    def step(self, step: Step) -> None:
        self._log(f"{step.step}", flat(asdict(step)))

    def recovered(self, step: RecoveryStep) -> None:
        self._log(f"recover/{step.step}", {f"recover/{key}": value for key, value in flat(asdict(step)).items()})

    def evaluated(self, results: Mapping[str, Any]) -> None:
        self._open()
        self.wandb.summary.update(final(results))

    def _log(self, step: str, values: dict[str, float]) -> None:
        if step in self.logged:
            if self.logged[step] == values:
                return
            self.close()  # learned anew, to other curves than those: another run
            self.logged.clear()
            for stale in (self.id_file, self.logged_file):
                stale.unlink(missing_ok=True)
        self._open()
        own_step = next(key for key in values if key.rpartition("/")[2] == "step")
        for key in values.keys() - self.named - {own_step}:
            self.wandb.define_metric(key, step_metric=own_step)
        self.named |= values.keys()
        self.logged[step] = values
        with self.logged_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({step: values}) + "\n")
        self.wandb.log(values)

    def _open(self) -> None:
        if self.wandb is not None:
            return
        check_installed(["wandb"])
        import wandb

        if not self.id_file.exists():
            write_json(self.id_file, {"id": secrets.token_hex(4)})
        try:
            self.wandb = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "secateur"),
                name=self.run.folder.name,
                id=read_json(self.id_file, "secateur prune")["id"],
                resume="allow",
                dir=str(self.run.folder),
                config=yaml.safe_load((self.run.folder / "config.yaml").read_text(encoding="utf-8")),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.Error, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                f"--log wandb: {reason}; run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later"
            ) from None

    def close(self) -> None:
        """Sends what waits."""
        if self.wandb is not None:
            self.wandb.finish()
        self.wandb, self.named = None, set()
