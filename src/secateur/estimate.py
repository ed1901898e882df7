"""What a run would take, before anything but the configuration is downloaded: memory by part, tokens a second, hours.

Memory is that of a step without values (footprint.py); time is FLOPs by the rate of the hardware (devices.py). Serves
`secateur estimate MODEL`, which ends with exit code 2 where the run would not fit.

With several devices it is as with several ranks (ranks.py, sharding.py): learning is shared, all else is done by the
first one; with `--shard` by its processor, where the whole model lies.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from rich.table import Table

from secateur.card import human
from secateur.config import Config
from secateur.devices import SHEET, Hardware, hardware_of
from secateur.files import InputError
from secateur.footprint import footprint
from secateur.guard import read_guards
from secateur.ideal import CONTEXT, HEAD, MAPS, cost_of
from secateur.load import Described, describe_selected, learning_dtype
from secateur.ranks import check_count
from secateur.recipes import ONE_SHOT

LIBRARIES = 0.6e9
"""Bytes of Python, PyTorch and a device's context."""

KERNELS = 0.15e9
"""Bytes more on a CPU once layers have been computed: code that is mapped then, and buffers of its own."""

HEAP = 0.23
"""Share of what all layers keep for their own backward passes that a CPU's allocator holds though it is gone: learning
has it give nothing back (speed.py), and holes between small objects do not fit what comes next. Fitted, with KERNELS,
to SmolLM2-135M; benchmarks/estimate.py compares."""

LINK = {"cpu": 25e9, "disk": 2e9, "ranks": 25e9}
"""Bytes a second that weights come at which lie elsewhere: over PCIe 4 × 16, from an NVMe disk, from other devices over
PCIe again, as not all have a faster link."""

GATHERED = 2
"""Layers that a device has whole at once with `--shard`: FSDP2 gathers a layer's weights into one piece, from which it
takes the weights; each layer is gathered by itself (sharding.py), none ahead of its turn."""

MOST_DEVICES = 8
"""Devices of a node, up to which more of them are suggested."""

USABLE = 0.95
"""Share of a device's memory that allocations can fill; the rest is lost between them."""

UTILISATION = {"cpu": 0.75, "other": 0.4}
"""Share of the hardware's rate of products that a step reaches: on a CPU of that of the model's own products, as
measured; on a GPU of the data sheet's, as a rule of thumb (no GPU was at hand to measure it)."""


@dataclass(frozen=True)
class Stage:
    """A part of a run that takes time."""

    name: str
    tokens: int
    flops: float


class Estimate:
    """What a run with some settings would take on some devices of one kind."""

    def __init__(
        self, config: Config, described: Described, hardware: Hardware, products: torch.dtype, devices: int = 1
    ) -> None:
        self.config, self.described, self.hardware, self.products = config.resolved(), described, hardware, products
        self.devices, self.on_cpu = devices, hardware.kind == "cpu"
        self.description = described.description
        shapes, asked = self.description.shapes, config.sparsity or 0.0
        self.parameters = sum(map(prod, shapes.values()))
        self.kept = self.parameters - asked * self.description.unit_parameters
        self.dtype = learning_dtype(described, torch.device("cpu" if self.on_cpu else "meta"), config.dtype)

    @property
    def rows(self) -> int:
        """Sequences that go through the model at once, on each device."""
        return self.config.rows_a_pass(self.devices) or self.config.batch_size

    @property
    def learns(self) -> bool:
        """Whether gates are learned, rather than units scored once."""
        return self.config.method not in ONE_SHOT

    @cached_property
    def layers(self) -> list[int]:
        """Parameters of each decoder layer."""
        inside, found = f"{self.description.layers}.", dict[str, int]()
        for name, shape in self.description.shapes.items():
            if name.startswith(inside):
                layer = name.removeprefix(inside).partition(".")[0]
                found[layer] = found.get(layer, 0) + prod(shape)
        return list(found.values())

    @property
    def in_layers(self) -> int:
        """Parameters of the decoder layers."""
        return sum(self.layers)

    def step(self, rows: int, checkpointing: bool) -> dict[str, float]:
        """Part → bytes of the activations of a step over so many rows at once."""
        c = self.config
        found = footprint(
            self.described.config, self.description.groups, rows, c.seq_len, self.dtype, self.products, checkpointing,
            self.hardware.kind, c.trust_remote_code, c.shard,
        )  # fmt: skip
        parts = {
            "activations": float(found.activations),
            "a chunk of logits": float(found.logits),
            "what comes and goes": float(found.passing),
        }
        freed = {"the kernels' own": KERNELS, "freed, but not given back": HEAP * len(self.layers) * found.layer}
        return parts | (freed if self.on_cpu else {})

    def present(self, parameters: float) -> float:
        """Those of a model's parameters that are in memory at once: all, or with `--offload` of one layer only."""
        if self.config.offload == "none":
            return parameters
        outside = self.parameters - self.in_layers
        return outside + (parameters - outside) / len(self.layers)

    @cached_property
    def memory(self) -> dict[str, dict[str, float]]:
        """Stage → part → bytes on a device that does it."""
        c, units = self.config, sum(g.units for g in self.description.groups)
        size, but = float(self.dtype.itemsize), "" if c.offload == "none" else f" but for layers on {c.offload}"
        dense, kept = self.present(self.parameters), self.present(self.kept)
        weights = {f"weights{but}" if but else "weights, which are the teacher's, too": size * dense}
        weights |= {"libraries": LIBRARIES}
        step = self.step(self.rows, c.gradient_checkpointing)
        found = {}
        if self.learns:
            gates = {"gates and their optimiser": 40.0 * units}
            found["learn"] = self._learning_weights | {"libraries": LIBRARIES} | step | gates
        found["verify"] = {
            f"weights in float32{but}": 4.0 * dense, "the export's": 4.0 * kept, "libraries": LIBRARIES
        }  # fmt: skip
        if c.recover:
            each = 16.0 if c.recover == "full" else size
            what = "the export's, gradients, moments" if c.recover == "full" else "the export's"
            found["recover"] = weights | {what: each * self.kept} | step
        found["eval"] = weights | {
            "the export's": size * kept,
            "a chunk of logits": step["a chunk of logits"],
        }
        return found

    @property
    def _learning_weights(self) -> dict[str, float]:
        """Part → bytes of the weights that a device holds while gates are learned."""
        c, each = self.config, float(self.dtype.itemsize)
        outside = each * (self.parameters - self.in_layers)
        if c.shard:
            return {
                "weights outside of layers, on every device": outside,
                f"1 / {self.devices} of the layers' weights": each * self.in_layers / self.devices,
                "a layer's weights, gathered": each * GATHERED * max(self.layers),
            }
        if c.offload != "none":
            return {f"weights but for layers on {c.offload}": each * self.present(self.parameters)}
        return {"weights, which are the teacher's, too": each * self.parameters}

    def where(self, stage: str) -> str:
        """On what a stage is done that takes memory; nothing where there is one device only."""
        if self.devices == 1:
            return ""
        what = "process" if self.on_cpu else "device"
        if stage == "learn":
            return f"on each of {self.devices} {'processes' if self.on_cpu else 'devices'}"
        return "on the first rank's CPU" if self.config.shard and not self.on_cpu else f"on the first {what}"

    def shared_memory(self, stage: str) -> bool:
        """Whether several do a stage in one memory: processes on a CPU."""
        return stage == "learn" and self.on_cpu and self.devices > 1

    def held(self, stage: str) -> float:
        """Bytes of a stage in the memory that the hardware has, which processes of a CPU share; 0 for what is done
        elsewhere."""
        whole, spread = sum(self.memory[stage].values()), self.config.shard
        if self.shared_memory(stage):
            return self.devices * whole + (self.dtype.itemsize * self.parameters if spread else 0.0)
        return 0.0 if spread and stage != "learn" and not self.on_cpu else whole

    @property
    def peak(self) -> tuple[str, float]:
        """The stage that takes the most, and how much."""
        totals = {stage: self.held(stage) for stage in self.memory}
        stage = max(totals, key=lambda name: totals[name])
        return stage, totals[stage]

    @property
    def fits(self) -> bool:
        """Whether all stages do."""
        return self.peak[1] <= USABLE * self.hardware.memory

    def forward(self, tokens: int, length: int) -> dict[str, float]:
        """FLOPs of a forward pass over rows of some length, by part."""
        cost = cost_of(self.description)
        flops = cost.flops(1, tokens, (length + 1) / 2)
        return flops | {HEAD: flops[HEAD] * tokens}

    @property
    def stages(self) -> list[Stage]:
        """The parts of a run that take time."""
        c = self.config
        assert c.learning is not None
        texts = 1 + len(read_guards(c.guard))

        def passes(name: str, rows: float, length: int, whole: float) -> Stage:
            """So many passes over rows; `whole` counts the layers once more where they are computed again."""
            parts = self.forward(int(rows * length), length)
            again = (parts[MAPS] + parts[CONTEXT]) if c.gradient_checkpointing and name != "evaluation" else 0.0
            return Stage(name, int(rows * length), whole * sum(parts.values()) + again)

        found = []
        if c.scored_rows:
            first = c.first_removed
            again = 0 if first is None else c.remeasured_rows(self.description.sparsity_of_rest(first))
            rows = texts * c.scored_rows + again
            found.append(passes("sensitivity" if self.learns else "scores", rows, c.seq_len, 2))
        if self.learns:
            found.append(passes("learning", texts * c.steps * c.batch_size, c.seq_len, 3))
        if c.recover:
            rows = c.recovery_steps * c.batch_size
            found.append(passes("recovery", rows, c.seq_len, 4 if c.recover == "full" else 3.2))
        windows = c.eval_windows if c.eval_data else c.held_out_tokens // c.seq_len
        length = c.eval_length if c.eval_data else c.seq_len
        found.append(passes("evaluation", 2 * windows + 4 * c.held_out_tokens / length, length, 1))
        return found

    def seconds(self, stage: Stage) -> float | None:
        """By the rate of products, and by the weights that each pass reads; None for what is done elsewhere."""
        c, shared = self.config, stage.name in ("learning", "sensitivity")
        if c.shard and not (shared or self.on_cpu):
            return None
        at_once = self.devices if shared and not self.on_cpu else 1  # processes of one machine share its cores, too
        passes = stage.tokens / (self.rows * c.seq_len) / at_once
        by_flops = stage.flops / at_once / (self.hardware.rate * UTILISATION[self.hardware.kind])
        by_bytes = 3 * self.parameters * self.dtype.itemsize * passes / self.hardware.bandwidth
        come = 3 * self.in_layers * self.dtype.itemsize * passes
        if stage.name == "evaluation":  # a window a pass
            come = self.in_layers * self.dtype.itemsize * stage.tokens / (c.eval_length if c.eval_data else c.seq_len)
        by_link = come / LINK[c.offload] if c.offload != "none" else 0.0
        gathering = come * (1 - 1 / self.devices) / LINK["ranks"] if c.shard else 0.0
        return max(by_flops, by_bytes, by_link) + gathering


# --- the command -----------------------------------------------------------------------------------------------------


def estimate(config: Config, hardware: str, devices: int = 1) -> Estimate:
    """What a run with these settings takes on so many devices. Downloads the configuration at most."""
    c = config
    if devices < 1:
        raise InputError(f"--devices must be at least 1, not {devices}")
    check_count(c, devices, "say --devices 2 or more")
    described = describe_selected(c.model, c.trust_remote_code, c.units, c.attention_unit, c.keep, c.depth)
    return Estimate(c, described, *hardware_of(hardware, c, described), devices)


def check_fit(found: Estimate) -> None:
    """Raises InputError where the run does not fit, with settings that would."""
    if found.fits:
        return
    stage, peak = found.peak
    place = f"in {found.devices} processes" if found.shared_memory(stage) else found.where(stage)
    has = f"{found.hardware.name} has {human(found.hardware.memory, 'B')}"
    what = f"{stage} takes {human(peak, 'B')}{place and ' ' + place}, and {has}"
    if ways := _ways(found):
        words, *more = ways
        raise InputError(
            f"this does not fit: {what}; {words[0]} would ({words[1]})"
            + "".join(f", and so would {other} ({size})" for other, size in more)
        )
    larger = [name for name, (gigabytes, *_) in SHEET.items() if USABLE * gigabytes * 1e9 >= peak]
    raise InputError(
        f"this does not fit: {what}; no settings would" + (f", but --hardware {larger[0]} would" if larger else "")
    )


def _ways(found: Estimate) -> list[tuple[str, str]]:
    """Settings with which the run would fit, as words, each with what it takes then: on these devices, and where that
    is slow or none would, on more of them."""
    ways = []
    for tried in (_smaller(found), _on_more(found)):
        fitting = next(((words, other) for words, other in tried if other.fits), None)
        if fitting is not None:
            words, other = fitting
            ways.append((words, human(other.peak[1], "B") + (" on each" if other.devices > 1 else "")))
            if other.config.offload == found.config.offload:
                break
    return ways


def _smaller(found: Estimate) -> Iterator[tuple[str, Estimate]]:
    """Settings that take less memory on the same devices, the least change first, as words."""
    c, words = found.config, ""
    changes: list[tuple[str, Mapping[str, object]]] = []
    if not c.gradient_checkpointing:
        changes.append(("--gradient-checkpointing", {"gradient_checkpointing": True}))
    if found.dtype == torch.float32:
        changes.append(("--dtype bfloat16", {"dtype": "bfloat16"}))
    if found.rows > 1:
        changes.append(("--micro-batch-size 1", {"micro_batch_size": 1}))
    if found.devices > 1:
        changes.append(("--shard", {"shard": True}))
    elif c.offload == "none":
        where = "disk" if found.on_cpu else "cpu"
        changes.append((f"--offload {where}", {"offload": where}))
    for word, change in changes:
        with suppress(InputError):  # of settings that contradict others
            c, words = replace(c, **change), f"{words} {word}".strip()  # type: ignore[arg-type]
            yield words, Estimate(c, found.described, found.hardware, found.products, found.devices)


def _on_more(found: Estimate) -> Iterator[tuple[str, Estimate]]:
    """The same on more devices, as few as would do; the processes of a CPU have no more memory than one."""
    changes: dict[str, Mapping[str, object]] = {
        " --shard": {"shard": True},
        " --shard --gradient-checkpointing": {"shard": True, "gradient_checkpointing": True},
    }
    if found.peak[0] == "learn":  # else rows are not what takes so much
        changes = {"": {}} | changes
    if found.on_cpu or not found.learns:
        return
    for count in (n for n in (2, 4, MOST_DEVICES) if n > found.devices):
        for words, change in changes.items():
            with suppress(InputError):
                c = replace(found.config, **change)  # type: ignore[arg-type]
                check_count(c, count)
                yield f"--devices {count}{words}", Estimate(c, found.described, found.hardware, found.products, count)


def tables(found: Estimate) -> list[Table]:
    """Memory by part, and time by stage."""
    return [_memory_table(found), _time_table(found)]


def _memory_table(found: Estimate) -> Table:
    c = found.config
    title = (
        f"{c.model}: {found.parameters:,} parameters, {c.batch_size} × {c.seq_len:,} tokens a step"
        + (f", {found.rows} of these sequences at once on each of {found.devices}" if found.devices > 1 else "")
        + f", weights in {_name(found.dtype)}, products in {_name(found.products)}"
    )
    memory = Table(title=title, title_justify="left")
    memory.add_column("stage")
    memory.add_column("part")
    memory.add_column("memory", justify="right")
    for stage, parts in found.memory.items():
        said = f"{stage} {found.where(stage)}".strip()
        for part, count in parts.items():
            memory.add_row(said, part, human(count, "B"))
            said = ""
        whole = sum(parts.values())
        ends = not found.shared_memory(stage)
        memory.add_row("", "in all", human(whole, "B"), end_section=ends)
        if not ends:
            with_model = ", and the whole model on the first" if c.shard else ""
            memory.add_row("", f"all {found.devices}{with_model}", human(found.held(stage), "B"), end_section=True)
    return memory


def _time_table(found: Estimate) -> Table:
    hardware, share = found.hardware, UTILISATION[found.hardware.kind]
    several = found.devices > 1 and not found.on_cpu
    name = f"{found.devices} × {hardware.name}, each" if several else hardware.name
    times = Table(
        title=f"{name}: {human(hardware.memory, 'B')}, {human(hardware.rate, 'FLOP/s')}, of which a step is taken to "
        f"reach {share:.0%}",
        title_justify="left",
    )
    for column in ("stage", "tokens", "FLOPs", "tokens a second", "hours"):
        times.add_column(column, justify="left" if column == "stage" else "right")
    whole, elsewhere = 0.0, False
    for each in found.stages:
        seconds = found.seconds(each)
        if seconds is None:
            elsewhere = True
            times.add_row(each.name, f"{each.tokens:,}", human(each.flops), "on a CPU", "unknown")
            continue
        whole += seconds
        speed = f"{each.tokens / seconds:,.0f}"
        times.add_row(each.name, f"{each.tokens:,}", human(each.flops), speed, f"{seconds / 3600:.2f}")
    times.add_section()
    times.add_row("on these devices" if elsewhere else "in all", "", "", "", f"{whole / 3600:.2f}")
    return times


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
