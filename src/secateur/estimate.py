"""What a run would take, before anything but the configuration is downloaded: memory by part, tokens a second, hours.

Memory is that of a step without values (footprint.py); time is FLOPs by the rate of the hardware, by its data sheet or
measured here. Serves `secateur estimate MODEL`, which ends with exit code 2 where the run would not fit.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
import torch.nn.functional as F
from rich.table import Table

from secateur.card import human
from secateur.config import Config
from secateur.files import InputError
from secateur.footprint import Footprint, footprint
from secateur.guard import read_guards
from secateur.hardware import free_memory
from secateur.ideal import CONTEXT, HEAD, MAPS, cost_of
from secateur.load import Described, autocast, describe_selected, learning_dtype, pick_device
from secateur.recipes import ONE_SHOT
from secateur.vocabulary import ROWS_AT_ONCE

LIBRARIES = 0.6e9
"""Bytes of Python, PyTorch and a device's context."""

HEAP = 8
"""Layers whose activations a CPU's allocator keeps for the next step though they are gone (speed.py): measured on
SmolLM2-135M, in float32 and bfloat16, with gradient checkpointing and without."""

LINK = {"cpu": 25e9, "disk": 2e9}
"""Bytes a second that offloaded weights come at: over PCIe 4 × 16, from an NVMe disk."""

USABLE = 0.95
"""Share of a device's memory that allocations can fill; the rest is lost between them."""

UTILISATION = {"cpu": 0.75, "other": 0.4}
"""Share of the hardware's rate of products that a step reaches: on a CPU of that of the model's own products, as
measured; on a GPU of the data sheet's, as a rule of thumb (no GPU was at hand to measure it)."""


@dataclass(frozen=True)
class Hardware:
    """A device that learns."""

    name: str
    memory: float
    """Bytes."""
    rate: float
    """FLOPs a second of products in the run's dtype."""
    bandwidth: float
    """Bytes a second from its memory."""
    kind: str = "other"


SHEET: dict[str, tuple[float, float, float, float]] = {
    "A100-40GB": (40, 312, 19.5, 1555),
    "A100-80GB": (80, 312, 19.5, 2039),
    "H100": (80, 989, 67, 3350),
    "H200": (141, 989, 67, 4800),
    "B200": (180, 2250, 80, 8000),
    "L4": (24, 121, 30.3, 300),
    "L40S": (48, 362, 91.6, 864),
    "RTX-3090": (24, 71, 35.6, 936),
    "RTX-4090": (24, 165, 82.6, 1008),
    "MI300X": (192, 1307, 163, 5300),
}
"""Name → GB, TFLOP/s of dense products in bfloat16 and in float32, GB/s, by the makers' data sheets."""


@dataclass(frozen=True)
class Stage:
    """A part of a run that takes time."""

    name: str
    tokens: int
    flops: float


class Estimate:
    """What a run with some settings would take on some hardware."""

    def __init__(self, config: Config, described: Described, hardware: Hardware, products: torch.dtype) -> None:
        self.config, self.described, self.hardware, self.products = config.resolved(), described, hardware, products
        self.description = described.description
        shapes, asked = self.description.shapes, config.sparsity or 0.0
        self.parameters = sum(map(prod, shapes.values()))
        self.kept = self.parameters - asked * self.description.unit_parameters
        self.dtype = learning_dtype(described, torch.device("cpu" if hardware.kind == "cpu" else "meta"), config.dtype)

    @property
    def rows(self) -> int:
        """Sequences that go through the model at once."""
        return self.config.micro_batch_size or self.config.batch_size

    @property
    def in_layers(self) -> int:
        """Parameters of the decoder layers."""
        inside = f"{self.description.layers}."
        return sum(prod(shape) for name, shape in self.description.shapes.items() if name.startswith(inside))

    def present(self, parameters: float) -> float:
        """Those of a model's parameters that are in memory at once: all, or with `--offload` of one layer only."""
        if self.config.offload == "none":
            return parameters
        outside = self.parameters - self.in_layers
        return outside + (parameters - outside) / self.description.layer_count

    @cached_property
    def step(self) -> Footprint:
        """Activations of a learning step."""
        c = self.config
        return footprint(
            self.described.config, self.description.groups, self.rows, c.seq_len, self.dtype, self.products,
            c.gradient_checkpointing, self.hardware.kind, c.trust_remote_code,
        )  # fmt: skip

    @property
    def memory(self) -> dict[str, dict[str, float]]:
        """Stage → part → bytes on the device."""
        c, units = self.config, sum(g.units for g in self.description.groups)
        size, where = float(self.dtype.itemsize), "" if c.offload == "none" else f" but for layers on {c.offload}"
        dense, kept = self.present(self.parameters), self.present(self.kept)
        weights = {(where and f"weights{where}") or "weights, which are the teacher's, too": size * dense}
        weights |= {"libraries": LIBRARIES}
        step = {
            "activations": float(self.step.activations),
            "a chunk of logits": float(self.step.logits),
            "what comes and goes": float(self.step.passing),
        }
        if self.hardware.kind == "cpu":
            step["freed, but not given back"] = float(HEAP * self.step.layer)
        found = {}
        if c.method not in ONE_SHOT:
            found["learn"] = weights | step | {"gates and their optimiser": 40.0 * units}
        found["verify"] = {
            f"weights in float32{where}": 4.0 * dense, "the export's": 4.0 * kept, "libraries": LIBRARIES
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
    def peak(self) -> tuple[str, float]:
        """The stage that takes the most, and how much."""
        totals = {stage: sum(parts.values()) for stage, parts in self.memory.items()}
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
            found.append(
                passes("sensitivity" if c.method not in ONE_SHOT else "scores", texts * c.scored_rows, c.seq_len, 2)
            )
        if c.method not in ONE_SHOT:
            found.append(passes("learning", texts * c.steps * c.batch_size, c.seq_len, 3))
        if c.recover:
            rows = (c.recover_steps or c.steps) * c.batch_size
            found.append(passes("recovery", rows, c.seq_len, 4 if c.recover == "full" else 3.2))
        windows = c.eval_windows if c.eval_data else c.held_out_tokens // c.seq_len
        length = c.eval_length if c.eval_data else c.seq_len
        found.append(passes("evaluation", 2 * windows + 4 * c.held_out_tokens / length, length, 1))
        return found

    def seconds(self, stage: Stage) -> float:
        """By the rate of products, and by the weights that each pass reads."""
        by_flops = stage.flops / (self.hardware.rate * UTILISATION[self.hardware.kind])
        rows = self.rows * self.config.seq_len
        by_bytes = 3 * self.parameters * self.dtype.itemsize * stage.tokens / rows / self.hardware.bandwidth
        reads = 3 * stage.tokens / rows  # of all layers
        if stage.name == "evaluation":  # of a window a pass
            reads = stage.tokens / (self.config.eval_length if self.config.eval_data else self.config.seq_len)
        by_link = reads * self.in_layers * self.dtype.itemsize / LINK.get(self.config.offload, float("inf"))
        return max(by_flops, by_bytes, by_link)


# --- hardware --------------------------------------------------------------------------------------------------------


def hardware_of(name: str, config: Config, described: Described) -> tuple[Hardware, torch.dtype]:
    """The hardware of a name, or `present`, and the dtype of its products for these settings."""
    known = {key.casefold(): key for key in SHEET}
    if name == "present":
        return _present(config, described)
    if name.casefold() not in known:
        raise InputError(f"--hardware {name} is not known; there are present, {', '.join(SHEET)}")
    name = known[name.casefold()]
    gigabytes, low, full, bandwidth = SHEET[name]
    products = torch.float32 if config.precision == "float32" else torch.bfloat16
    if config.precision == "float32" and config.dtype != "float32":
        products = learning_dtype(described, torch.device("meta"), config.dtype)
    rate = full if products == torch.float32 else low
    return Hardware(name, gigabytes * 1e9, rate * 1e12, bandwidth * 1e9), products


def _present(config: Config, described: Described) -> tuple[Hardware, torch.dtype]:
    device = pick_device(config.device)
    dtype = learning_dtype(described, device, config.dtype)
    context = autocast(device, config.precision)
    products = torch.bfloat16 if context._enabled else dtype
    kind, name = ("cpu", f"this CPU ({torch.get_num_threads()} threads)") if device.type == "cpu" else ("other", "this")
    memory = float(free_memory())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, float(torch.cuda.mem_get_info(device)[0])
    with context:
        rate = _rate(described, device, dtype, products, config.batch_size * config.seq_len)
    return Hardware(name, memory, rate, _bandwidth(device), kind), products


def _rate(
    described: Described, device: torch.device, dtype: torch.dtype, products: torch.dtype, rows: int,
    seconds: float = 1.0,
) -> float:  # fmt: skip
    """FLOPs a second of the model's own linear maps, those of a layer and the head, as each is used."""
    description = described.description
    shapes: dict[tuple[int, ...], int] = {}
    for name in description.matmuls:
        shape = description.shapes[name][-2:]
        shapes[shape] = shapes.get(shape, 0) + 1
    head = description.shapes[list(description.matmuls)[-1]][-2:]
    flops = taken = 0.0
    most = ROWS_AT_ONCE["cpu" if device.type == "cpu" else "other"]
    for shape, count in shapes.items():
        used = min(rows, most if shape == head else 4096)
        x = torch.randn((used, shape[1]), device=device).to(dtype)
        weight = torch.randn(shape, device=device).to(products)
        F.linear(x, weight)
        start, times = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / len(shapes):
            F.linear(x, weight)
            times += 1
            if device.type != "cpu":
                torch.accelerator.synchronize()
        each = (time.perf_counter() - start) / times
        flops += count * 2.0 * rows * prod(shape)
        taken += count * each * rows / used
    return flops / taken


def _bandwidth(device: torch.device, count: int = 2**27) -> float:
    """Bytes a second that a sum reads."""
    values = torch.ones(count // 4, device=device)
    values.sum().item()
    start = time.perf_counter()
    values.sum().item()
    return count / (time.perf_counter() - start)


# --- the command -----------------------------------------------------------------------------------------------------


def estimate(config: Config, hardware: str) -> Estimate:
    """What a run with these settings takes. Downloads the configuration at most."""
    c = config
    described = describe_selected(c.model, c.trust_remote_code, c.units, c.attention_unit, c.keep, c.depth)
    return Estimate(c, described, *hardware_of(hardware, c, described))


def check_fit(found: Estimate) -> None:
    """Raises InputError where the run does not fit, with settings that would."""
    if found.fits:
        return
    stage, peak = found.peak
    what = f"{stage} takes {human(peak, 'B')}, and {found.hardware.name} has {human(found.hardware.memory, 'B')}"
    for words, other in _smaller(found):
        if other.fits:
            raise InputError(f"this does not fit: {what}; {words} would ({human(other.peak[1], 'B')})")
    larger = [name for name, (gigabytes, *_) in SHEET.items() if USABLE * gigabytes * 1e9 >= peak]
    raise InputError(
        f"this does not fit: {what}; no settings would" + (f", but --hardware {larger[0]} would" if larger else "")
    )


def _smaller(found: Estimate) -> Iterator[tuple[str, Estimate]]:
    """Settings that take less memory, the least change first, as words."""
    c, words = found.config, ""
    changes: list[tuple[str, Mapping[str, object]]] = []
    if not c.gradient_checkpointing:
        changes.append(("--gradient-checkpointing", {"gradient_checkpointing": True}))
    if found.dtype == torch.float32:
        changes.append(("--dtype bfloat16", {"dtype": "bfloat16"}))
    if found.rows > 1:
        changes.append(("--micro-batch-size 1", {"micro_batch_size": 1}))
    if c.offload == "none" and c.method not in ONE_SHOT and not (c.refit or c.recover):
        where = "disk" if found.hardware.kind == "cpu" else "cpu"
        changes.append((f"--offload {where}", {"offload": where}))
    for word, change in changes:
        c, words = replace(c, **change), f"{words} {word}".strip()  # type: ignore[arg-type]
        yield words, Estimate(c, found.described, found.hardware, found.products)


def tables(found: Estimate) -> list[Table]:
    """Memory by part, and time by stage."""
    c, hardware = found.config, found.hardware
    title = (
        f"{c.model}: {found.parameters:,} parameters, {c.batch_size} × {c.seq_len:,} tokens a step, weights in "
        f"{_name(found.dtype)}, products in {_name(found.products)}"
    )
    memory = Table(title=title, title_justify="left")
    memory.add_column("stage")
    memory.add_column("part")
    memory.add_column("memory", justify="right")
    for stage, parts in found.memory.items():
        for part, count in parts.items():
            memory.add_row(stage, part, human(count, "B"))
            stage = ""
        memory.add_row("", "in all", human(sum(parts.values()), "B"), end_section=True)
    share = UTILISATION[hardware.kind]
    times = Table(
        title=f"{hardware.name}: {human(hardware.memory, 'B')}, {human(hardware.rate, 'FLOP/s')}, of which a step is "
        f"taken to reach {share:.0%}",
        title_justify="left",
    )
    for column in ("stage", "tokens", "FLOPs", "tokens a second", "hours"):
        times.add_column(column, justify="left" if column == "stage" else "right")
    whole = 0.0
    for each in found.stages:
        seconds = found.seconds(each)
        whole += seconds
        speed = f"{each.tokens / seconds:,.0f}"
        times.add_row(each.name, f"{each.tokens:,}", human(each.flops), speed, f"{seconds / 3600:.2f}")
    times.add_section()
    times.add_row("in all", "", "", "", f"{whole / 3600:.2f}")
    return [memory, times]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
