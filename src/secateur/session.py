"""A run with what its stages share, loaded when first needed: the dense model and the token blocks."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from secateur.attach import compensation
from secateur.bos import leading_bos
from secateur.checkpoints import Checkpoints
from secateur.config import Config
from secateur.data import SELF, Blocks, load_blocks
from secateur.evaluate import mean_loss, windows
from secateur.files import InputError, read_json, write_json
from secateur.gates import Gates, architecture_fingerprint, load_gates
from secateur.guard import Guard, read_guards
from secateur.latency import LatencyTable, read_table
from secateur.load import Loaded, autocast, load, pick_device, weights_fingerprint
from secateur.optimise import Step
from secateur.ranks import here
from secateur.recover import RecoveryStep
from secateur.run import Run
from secateur.selftext import self_written
from secateur.text import evaluation_text, local_files
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

    def size(self, name: str) -> None:
        """Another size of a sweep begins."""

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
    _warned_of: set[Path] = field(default_factory=set)

    def autocast(self) -> torch.autocast:
        """The context that passes of learning run in (`--precision`)."""
        own = next(self.loaded.model.parameters()).device
        spread = self.config.shard and here().count > 1
        return autocast(pick_device(self.config.device) if spread else own, self.config.precision)

    @property
    def config(self) -> Config:
        """The resolved settings."""
        return self.run.config

    @cached_property
    def loaded(self) -> Loaded:
        """The dense model."""
        c = self.config
        guards = {guard.data for guard in read_guards(c.guard)}
        for data in {c.data, c.eval_data, *guards} - {SELF, None}:
            local_files(str(data))  # a wrong path shows before a large model is loaded
        with self.timed("load"):
            return load(
                c.model, c.device, c.dtype, c.trust_remote_code, self.offload, c.units, c.attention_unit, c.keep,
                c.shard,
            )  # fmt: skip

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
            return self._blocks(c.data, self.run.data, c.epochs, written if c.data == SELF else None)

    @cached_property
    def guards(self) -> Mapping[Guard, Blocks]:
        """Of each `--guard` its tokens; a short one is repeated."""
        c = self.config
        return {
            guard: self._blocks(guard.data, self.run.guard(number), c.steps * c.batch_size)
            for number, guard in enumerate(read_guards(c.guard))
        }

    def _blocks(self, data: str, cache: Path, epochs: int, written: Iterable[Sequence[int]] | None = None) -> Blocks:
        c, loaded = self.config, self.loaded
        return load_blocks(
            data,
            loaded.tokenizer,
            vocab_size=loaded.model.get_input_embeddings().num_embeddings,
            seq_len=c.seq_len,
            calibration_blocks=c.steps * c.batch_size,
            held_out_blocks=-(-c.held_out_tokens // c.seq_len),
            seed=c.seed,
            cache=cache,
            epochs=epochs,
            text_column=c.text_column,
            bos=self.bos,
            written=written,
        )

    @cached_property
    def evaluation_windows(self) -> tuple[torch.Tensor, str, str]:
        """Windows to measure perplexity on, the name of their text, and how its documents are joined."""
        c = self.config
        if c.eval_data is None:
            rows_NT = self.blocks.held_out_NT
            return rows_NT, f"held-out part of {c.data}", "packed"
        characters = c.eval_windows * c.eval_length * 12 or None
        text = evaluation_text(c.eval_data, c.text_column, characters, c.eval_join)
        tokens_T = self.loaded.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        return windows(tokens_T, c.eval_windows, c.eval_length, c.eval_data, self.bos), c.eval_data, c.eval_join

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

    @cached_property
    def pruned_shapes(self) -> str:
        """The same of what is pruned alone: siblings with other embeddings share it."""
        groups, shapes = self.loaded.description.groups, self.loaded.description.shapes
        inside = {s.param for g in groups for s in g.slices}
        return architecture_fingerprint(groups, {name: shapes[name] for name in inside})

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the dense model's weights."""
        return weights_fingerprint(self.loaded.model)

    @property
    def learned_steps(self) -> int:
        """Learning steps behind the gates of a run: of a size of a sweep, those of the sizes before, too."""
        gates = load_gates(self.run.gates, self.loaded.description.groups, self.architecture)
        return int(gates.about["steps"] if "sweep" in gates.about else self.config.steps)

    @cached_property
    def given(self) -> Gates | None:
        """The gates that `--gates` names, checked."""
        if self.config.gates is None:
            return None
        groups = self.loaded.description.groups
        gates = load_gates(self.config.gates, groups, self.architecture, self.pruned_shapes)
        self.check_weights(gates, self.config.gates)
        if gates.means is not None and self.config.steps:
            reason = f"{self.config.gates} has biases for what it removes (flap), which cannot be tuned"
            raise InputError(f"{reason}; say --steps 0")
        return gates

    def check_weights(self, gates: Gates, path: Path) -> None:
        """Warns, once, of gates that were found on other weights of the same shapes."""
        found = gates.about.get("weights")
        if found in (None, self.weights) or path in self._warned_of:
            return
        self._warned_of.add(path)
        self.progress.warned(
            f"{path} holds gates found on other weights than {self.config.model} has (hash {found} of "
            f"{gates.about.get('model')}, here {self.weights}): `prune MODEL --gates FILE --steps N` tunes them to it"
        )

    @cached_property
    def latency(self) -> LatencyTable:
        """The run's latency table. Raises InputError where it is of another model."""
        table = read_table(self.run.latency)
        table.check_model(self.loaded.description, self.config.latency_table or self.run.latency)
        return table

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

    def rows_in_turn(self, steps: int) -> torch.Tensor:
        """Rows of so many steps: batches of the calibration text and of each guard's in turn, over and over."""
        size = self.config.batch_size
        texts = [blocks.calibration_NT.unflatten(0, (-1, size)) for blocks in (self.blocks, *self.guards.values())]
        rows_NT = torch.stack(texts, dim=1).flatten(0, 2)
        return rows_NT.repeat(-(-steps * size // len(rows_NT)), 1)[: steps * size]

    def guard_losses(self, exported: PreTrainedModel) -> list[dict[str, Any]]:
        """Of each `--guard` its held-out loss, unpruned and exported, nats a token, and whether the bound is held."""
        found = []
        for guard, text in self.guards.items():
            dense, pruned = (mean_loss(model, text.held_out_NT) for model in (self.loaded.model, exported))
            about = {"data": guard.data, "tolerance": guard.tolerance, "held": pruned - dense <= guard.tolerance}
            found.append({**about, "dense": dense, "pruned": pruned})
        return found

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Announces a stage and records the seconds it took in timings.json."""
        self.progress.stage(stage)
        start = time.perf_counter()
        yield
        timings = read_json(self.run.timings, "secateur prune") if self.run.timings.exists() else {}
        write_json(self.run.timings, {**timings, stage: round(time.perf_counter() - start, 2)})
