"""A run with what its stages share, loaded when first needed: the dense model and the token blocks."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from secateur.attach import compensation
from secateur.bos import leading_bos
from secateur.checkpoints import Checkpoints
from secateur.config import Config
from secateur.data import SELF, Blocks, load_blocks
from secateur.evaluate import mean_loss
from secateur.files import InputError, read_json, write_json
from secateur.gates import architecture_fingerprint
from secateur.load import Loaded, autocast, load
from secateur.optimise import Step
from secateur.recover import RecoveryStep
from secateur.run import Run
from secateur.selftext import self_written
from secateur.text import local_files
from secateur.updates import updates_of

if TYPE_CHECKING:
    from secateur.tasks import Tasks


class Progress:
    """Hears of what the stages do, and says nothing; the command line's `Screen` draws it."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def step(self, step: Step) -> None:
        """A learning step is done."""

    def recovered(self, step: RecoveryStep) -> None:
        """A step of recovery is done."""

    def measured(self, rows: int) -> None:
        """The sensitivity of the gates has been measured on so many rows."""

    def written(self, tokens: int) -> None:
        """The model wrote so many more tokens of text for itself."""

    def scored(self, rows: int, of: int) -> None:
        """So many more rows of the zero-shot tasks went through a model, of so many for both models."""

    def warned(self, warning: str) -> None:
        """Something that is possible, and maybe not meant."""


@dataclass
class Session:
    """A run with what its stages share, loaded when first needed."""

    run: Run
    progress: Progress = field(default_factory=Progress)
    offload: Path | None = None
    """Where weights are kept on disk instead of in memory."""

    def autocast(self) -> torch.autocast:
        """The context that passes of learning run in (`--precision`)."""
        return autocast(next(self.loaded.model.parameters()).device, self.config.precision)

    @property
    def config(self) -> Config:
        """The resolved settings."""
        return self.run.config

    @cached_property
    def loaded(self) -> Loaded:
        """The dense model."""
        c = self.config
        for data in {c.data, c.eval_data} - {SELF, None}:
            local_files(str(data))  # a wrong path shows before a large model is loaded
        with self.timed("load"):
            return load(
                c.model, c.device, c.dtype, c.trust_remote_code, self.offload, c.units, c.attention_unit, c.keep
            )

    @cached_property
    def bos(self) -> int | None:
        """What every block and every window begins with: BOS where the model wants it, else nothing."""
        return leading_bos(self.loaded.model, self.loaded.tokenizer, self.config.bos)

    @cached_property
    def blocks(self) -> Blocks:
        """Calibration and held-out tokens."""
        c, loaded = self.config, self.loaded
        with self.timed("data"):
            written = self_written(
                loaded.model,
                loaded.tokenizer,
                seed=c.seed,
                bos=self.bos,
                parts=self.run.folder / "self",
                length=c.seq_len,
                on_progress=self.progress.written,
            )
            return load_blocks(
                c.data,
                loaded.tokenizer,
                vocab_size=loaded.model.get_input_embeddings().num_embeddings,
                seq_len=c.seq_len,
                calibration_blocks=c.steps * c.batch_size,
                held_out_blocks=-(-c.held_out_tokens // c.seq_len),
                seed=c.seed,
                cache=self.run.data,
                epochs=c.epochs,
                text_column=c.text_column,
                bos=self.bos,
                written=written if c.data == SELF else None,
            )

    @cached_property
    def tasks(self) -> "Tasks | None":
        """The zero-shot tasks, checked; None where none are asked for."""
        c = self.config
        if not c.tasks:
            return None
        self.progress.stage("tasks")
        try:
            from secateur.tasks import load_tasks
        except ModuleNotFoundError as error:
            reason = f"--tasks needs lm-eval, and {error.name} is not installed"
            raise InputError(f"{reason}; run: pip install 'secateur[eval]'") from None
        tasks = load_tasks(c.tasks, c.task_limit, c.seed)
        tasks.check(self.loaded.model, self.loaded.tokenizer, self.bos)
        return tasks

    @cached_property
    def architecture(self) -> str:
        """Fingerprint that ties gates and plan to the model's shapes."""
        return architecture_fingerprint(self.loaded.description.groups, self.loaded.description.shapes)

    def checkpoints(self, folder: Path) -> Checkpoints:
        """States of a training of this run."""
        return Checkpoints(folder, self.config.checkpoint_every, self.progress.warned)

    def recovered_before(self) -> bool:
        """Whether the states of recovery, gone then, are those of what the export has been updated with already."""
        run, updates = self.run, updates_of(self.run.model)
        steps, after = self.config.recover_steps or self.config.steps, tuple(updates[:-1])
        return bool(updates) and self.checkpoints(run.recovery).left_over(steps, f"after={after})")

    def held_out_loss(
        self, gates: Mapping[str, torch.Tensor] | None, means: Mapping[str, torch.Tensor] | None = None
    ) -> float:
        """Loss on held-out text, nats a token, with gates (`means` standing for what they remove) or dense."""
        model, groups = self.loaded.model, self.loaded.description.groups
        biases = None if gates is None else compensation(model, groups, gates, means)
        return mean_loss(model, self.blocks.held_out_NT, groups, gates, biases)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Announces a stage and records the seconds it took in timings.json."""
        self.progress.stage(stage)
        start = time.perf_counter()
        yield
        timings = read_json(self.run.timings, "secateur prune") if self.run.timings.exists() else {}
        write_json(self.run.timings, {**timings, stage: round(time.perf_counter() - start, 2)})
