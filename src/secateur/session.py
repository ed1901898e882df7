"""A run with what its stages share, loaded when first needed: the dense model and the token blocks."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch
from transformers import PreTrainedModel

from secateur.attach import compensation
from secateur.bos import leading_bos
from secateur.checkpoints import Checkpoints
from secateur.config import Config
from secateur.data import SELF, Blocks, load_blocks
from secateur.describe import Description
from secateur.evaluate import mean_loss, windows
from secateur.experts import is_fused
from secateur.files import InputError, remove, scratch_folder, write_json
from secateur.gates import Gates, architecture_fingerprint, load_gates
from secateur.guard import Guard, read_guards
from secateur.hardware import free_memory
from secateur.latency import LatencyTable, read_table
from secateur.listeners import Progress
from secateur.load import (
    Described,
    Loaded,
    autocast,
    describe_selected,
    learning_dtype,
    load,
    pick_device,
    places,
    weights_fingerprint,
)
from secateur.offloaded import is_offloaded
from secateur.ranks import here
from secateur.report.files import checked
from secateur.run import Run
from secateur.selftext import self_written
from secateur.text import HELD_OUT, evaluation_text, local_files
from secateur.updates import updates_of

if TYPE_CHECKING:
    from secateur.tasks import Tasks


@dataclass
class Session:
    """A run with what its stages share, loaded when first needed."""

    run: Run
    progress: Progress = field(default_factory=Progress)
    low_memory: bool = False
    """Leave the dense weights on disk (`--low-memory`); also where they would not fit in memory."""
    offload: Path | None = None
    """Where meanwhile, if they are converted when they are read."""
    learning: bool = False
    """Whether gates are being learned."""
    whole: bool = False
    """Whether weights are being changed, for which both models are in memory whatever `--offload` says."""
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
        for data in self._texts_to_read() - {SELF, None}:
            local_files(str(data))  # a wrong path shows before a large model is loaded
        with self.timed("load"):
            layers_on = None if self.offload else self.layers_on
            folder = self._scratch / "dense" if layers_on else self.offload
            return load(c.model, c.device, c.dtype, c.trust_remote_code, folder, self.described, layers_on, c.shard)

    def _texts_to_read(self) -> set[str | None]:
        """Those whose tokens are not in the run yet: it goes on whatever has become of the others."""
        c, run = self.config, self.run
        guards = {guard.data for n, guard in enumerate(read_guards(c.guard)) if not run.guard(n).exists()}
        return guards | ({c.eval_data} if self.learning else set()) | (set() if run.data.exists() else {c.data})

    @property
    def layers_on(self) -> str | None:
        """Where the dense model's decoder layers lie, "cpu" or "disk" (`--offload`), of a model that is too large for
        memory on disk whenever nothing is learned; None: where all else lies."""
        own = self.config.offload
        if self.whole:
            return None
        on_cpu = pick_device(self.config.device).type == "cpu"
        if own == "disk" or (own == "cpu" and (self.learning or not on_cpu)):
            return own
        return None if self.learning or self.too_large is None else "disk"

    def export_placed(self, device: torch.device) -> dict[str, Any]:
        """Options of `read_export` that leave the layers of the exported model where the dense one's lie, or on disk
        where there is no memory for them beside it; none if all of it goes to the device."""
        layers_on, known = self.layers_on, self.loaded if self.in_memory else self.described
        if layers_on is None and not self.whole and device.type == "cpu":
            size = sum(file.stat().st_size for file in self.run.model.glob("*.safetensors"))
            values = size / known.checkpoint_dtype.itemsize
            layers_on = "disk" if 4 * values > free_memory() else None  # it is verified in float32
        if layers_on is None:
            return {}
        folder = self._scratch / "export"
        remove(folder)
        return {"device_map": places(known, device, layers_on), "offload_folder": str(folder)}

    @cached_property
    def _scratch(self) -> Path:
        """Where offloaded weights lie that are converted when they are read, as long as this session lives."""
        folder = self.run.folder / f".weights.{os.getpid()}.tmp"
        finalize(self, remove, folder)
        return folder

    def take_whole(self) -> None:
        """From now on both models are in memory, all of them."""
        self.whole = True
        if self.in_memory and is_offloaded(self.loaded.model):
            vars(self).pop("loaded")

    @cached_property
    def described(self) -> Described:
        """What is known of the dense model without its weights."""
        c = self.config
        return describe_selected(c.model, c.trust_remote_code, c.units, c.attention_unit, c.keep, c.depth)

    @property
    def description(self) -> Description:
        """The dense model's units."""
        return self.loaded.description if self.in_memory else self.described.description

    @property
    def in_memory(self) -> bool:
        """Whether the dense model has been loaded."""
        return "loaded" in vars(self)

    @cached_property
    def unloadable(self) -> str | None:
        """Why the dense model is not loaded, not even with its layers on disk; None where it is, or can be."""
        if self.in_memory:
            return None
        if self.low_memory:
            return "--low-memory leaves the weights on disk"
        if self.too_large is None:
            return None
        layers = f"{self.described.description.layers}."
        return self._lacking("the weights outside of the layers", lambda name: not name.startswith(layers))

    @cached_property
    def too_large(self) -> str | None:
        """Why the dense model cannot be in memory as a whole; None where it can, or is."""
        return None if self.in_memory else self._lacking("the weights", lambda _name: True)

    def _lacking(self, what: str, counts: Callable[[str], bool]) -> str | None:
        device = pick_device(self.config.device)
        dtype = learning_dtype(self.described, device, self.config.dtype)
        need = dtype.itemsize * sum(prod(s) for n, s in self.described.description.shapes.items() if counts(n))
        free = free_memory() if device.type == "cpu" else need
        return None if need <= free else f"{what} take {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"

    @property
    def _converts(self) -> bool:
        return self.config.model.endswith(".gguf") or any(is_fused(m) for m in self.described.model.modules())

    @contextmanager
    def on_disk(self) -> Iterator[None]:
        """Within the context, the weights of a model that is not loaded yet stay in their files, and each is read when
        it is needed. Where transformers converts weights when it reads them (experts, GGUF), which takes a second copy
        of these in the run folder meanwhile, only if the model cannot be loaded."""
        if self.in_memory or (self._converts and not self.low_memory and self.too_large is None):
            yield
            return
        with scratch_folder(self.run.folder, "offload") as self.offload:
            try:
                yield
            finally:
                self.offload = None
                vars(self).pop("loaded", None)

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
            if any(getattr(c, name) != getattr(Config, name) for name in ("eval_join", "eval_windows", "eval_length")):
                raise InputError(
                    "--eval-join, --eval-windows and --eval-length are of another text's windows: held-out text is "
                    "measured in the sequences that it was cut into; name a text by --eval-data, or leave them out"
                )
            rows_NT = self.blocks.held_out_NT
            return rows_NT, f"{HELD_OUT}{c.data}", "packed"
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
        return architecture_fingerprint(self.description.groups, self.description.shapes)

    @cached_property
    def pruned_shapes(self) -> str:
        """The same of what is pruned alone: siblings with other embeddings share it."""
        groups, shapes = self.description.groups, self.description.shapes
        inside = {s.param for g in groups for s in g.slices}
        return architecture_fingerprint(groups, {name: shapes[name] for name in inside})

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the dense model's weights."""
        return weights_fingerprint(self.loaded.model, self.description.shapes)

    @property
    def learned_steps(self) -> int:
        """Learning steps behind the gates of a run: of a size of a sweep, those of the sizes before, too; fewer than
        the settings say where a callback ended them."""
        gates = load_gates(self.run.gates, self.description.groups, self.architecture)
        steps = gates.about.get("steps", 0) if "sweep" in gates.about else gates.about.get("stopped", self.config.steps)
        return int(steps)

    @cached_property
    def given(self) -> Gates | None:
        """The gates that `--gates` names, checked."""
        if self.config.gates is None:
            return None
        groups = self.description.groups
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
        table.check_model(self.description, self.config.latency_table or self.run.latency)
        return table

    def checkpoints(self, folder: Path) -> Checkpoints:
        """States of a training of this run."""
        return Checkpoints(folder, self.config.checkpoint_every, self.progress.warned)

    def recovered_before(self) -> bool:
        """Whether the states of recovery, gone then, are those of what the export has been updated with already."""
        run, updates = self.run, updates_of(self.run.model)
        steps, after = self.config.recovery_steps, tuple(updates[:-1])
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
        timings = checked(self.run.timings, dict[str, float], "secateur prune") if self.run.timings.exists() else {}
        write_json(self.run.timings, {**timings, stage: round(time.perf_counter() - start, 2)})
