"""How two models are timed against each other: settings of `secateur bench`, the protocol, and statistics.

Both models are loaded, each in a process of its own, and only one works at a time. A visit is one measurement of one
model; at a batch size, visits go dense, pruned, pruned, dense, and so on: what slows the machine slows both.
Each pair of visits has its own random prompts. The first pair of every batch size warms up and is not counted.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import tyro

from secateur.config import AnyShape
from secateur.files import InputError
from secateur.selection import AttentionUnit, Kind

Runtime = Literal["transformers", "vllm", "vllm-server", "llamacpp"]

PAUSE = 0.25
"""Seconds between visits: threads of the other model's matrix products spin for up to 0.2 s before they sleep."""

PROFILES = 3
"""Passes in which the time of each part of a model is measured, where a runtime can tell."""


@dataclass(kw_only=True)
class Settings:
    """What to measure, and how often."""

    runtime: Runtime = "transformers"
    """What runs the models: `vllm` generates offline, `vllm-server` answers concurrent requests over HTTP."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Sequences at a time; of `vllm-server` requests at a time."""
    prompt_tokens: int = 256
    """Tokens a prompt, drawn at random."""
    new_tokens: int = 32
    """Tokens to decode after the one that prefill ends with."""
    rounds: int = 5
    """Measurements of each model at each batch size, after one that warms up."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0"] = "auto"
    """Of the weights (default: the checkpoint's; of `llamacpp` float16, and q8_0 is there alone)."""
    threads: int | None = None
    """CPU threads of each model (default: the runtime's)."""
    eager: bool = False
    """Of vLLM: no compiled graphs, so that models load sooner and run slower."""
    python: Path | None = None
    """Interpreter of another environment, where the runtime is installed (default: this one)."""
    timeout: int = 1800
    """Seconds that a model may take to load, or a measurement to end."""

    def check(self) -> None:
        """Raises InputError where something cannot be."""
        for name in ("prompt_tokens", "new_tokens", "rounds", "timeout", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            found = " ".join(map(str, self.batch_sizes)) or "empty"
            raise InputError(f"--batch-sizes is {found}; batch sizes must be at least 1")
        if self.dtype == ("bfloat16" if self.runtime == "llamacpp" else "q8_0"):
            raise InputError(f"--dtype {self.dtype} and --runtime {self.runtime} do not go together")
        if self.python is not None and not self.python.is_file():
            raise InputError(f"--python {self.python} is no file; give an interpreter such as ENV/bin/python")


@dataclass
class Bench(Settings):
    """Time the export against the unpruned model, in turns, beside what FLOPs and bytes promise: bench-RUNTIME.json.

    Example: secateur bench RUN --runtime vllm --batch-sizes 1 8 32
    Before there is a run: secateur bench MODEL --table latency.json
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run; with `--table` the model, a local folder, hub id or GGUF file."""
    table: Path | None = None
    """Time the sublayers of the model at several widths instead and write this file, for `prune --latency-table`. It
    takes a few minutes of an idle machine: about twelve models are timed against the unpruned one."""
    shape: AnyShape = None
    """Of a table: the widths that are timed, as for `prune` (default: ragged)."""
    units: tuple[Kind, ...] = ()
    """Of a table: what is timed, as for `prune`."""
    attention_unit: AttentionUnit | None = None
    """Of a table: what attention is divided into, as for `prune`."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the unpruned model."""

    def check(self) -> None:
        """Raises InputError where something cannot be, or is of a table and none is asked for."""
        super().check()
        for name in ("shape", "units", "attention_unit"):
            if self.table is None and getattr(self, name):
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} is of --table FILE; a run is timed as its own settings say")


class Measurable(Protocol):
    """One of the two models: a process that answers (workers/parent.py), or what stands for it in tests."""

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """Has the model do something; what it answers."""


@dataclass(frozen=True)
class Unit:
    """How a figure reads."""

    name: str
    title: str
    higher_is_better: bool = True


UNITS = {
    "prefill": Unit("tokens/s", "prefill"),
    "decode": Unit("tokens/s", "decode"),
    "first_token": Unit("s", "time to first token", higher_is_better=False),
    "between_tokens": Unit("s", "time between tokens", higher_is_better=False),
    "requests": Unit("requests/s", "requests"),
}
"""What is measured: the first two offline, the others of a server."""


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float
    values: list[float]


def spread(values: Sequence[float]) -> Spread:
    """Median, least and largest."""
    return Spread(statistics.median(values), min(values), max(values), list(values))


def speedups(metric: str, dense: Sequence[float], pruned: Sequence[float]) -> list[float]:
    """How many times as fast the pruned model was in each round, pair by pair."""
    pairs = zip(dense, pruned, strict=True)
    return [p / d if UNITS[metric].higher_is_better else d / p for d, p in pairs]


@dataclass(frozen=True)
class Timing:
    """One metric at one batch size, dense against pruned."""

    metric: str
    batch_size: int
    dense: Spread
    pruned: Spread
    speedup: Spread

    def to_json(self) -> dict[str, Any]:
        """As bench-RUNTIME.json has it."""
        return asdict(self) | {"unit": UNITS[self.metric].name}


@dataclass
class Measured:
    """All that came of the visits."""

    timings: list[Timing] = field(default_factory=list)
    parts: dict[str, dict[int, dict[str, dict[str, float]]]] = field(default_factory=dict)
    """Phase → batch size → `dense` or `pruned` → seconds of each part; empty where the runtime cannot tell."""


def measure(
    models: Mapping[str, Measurable],
    settings: Settings,
    hear: Callable[[str], None],
    profile: Mapping[str, Any] | None = None,
) -> Measured:
    """Visits the models `dense` and `pruned` in turn. `profile`: what they need to tell parts; None: they cannot."""
    assert list(models) == ["dense", "pruned"]
    size: dict[str, Any] = {"prompt_tokens": settings.prompt_tokens, "new_tokens": settings.new_tokens}
    values: dict[tuple[int, str, str], list[float]] = {}
    for number in range(settings.rounds + 1):
        hear(f"round {number} of {settings.rounds}" if number else "warming up")
        for place, batch in enumerate(settings.batch_sizes):
            for name in _order(models, number + place):
                answer = _visit(models[name], "measure", batch=batch, seed=_seed(number, batch), **size)
                for metric, value in answer.items() if number else ():
                    values.setdefault((batch, metric, name), []).append(value)
    measured = Measured()
    for batch, metric, name in values:
        if name == "dense":
            dense, pruned = values[batch, metric, "dense"], values[batch, metric, "pruned"]
            ratios = speedups(metric, dense, pruned)
            measured.timings.append(Timing(metric, batch, spread(dense), spread(pruned), spread(ratios)))
    measured.timings.sort(key=lambda t: (list(UNITS).index(t.metric), settings.batch_sizes.index(t.batch_size)))
    if profile is not None:
        hear("timing the parts")
        measured.parts = _profiles(models, settings, {**size, **profile})
    return measured


def _profiles(
    models: Mapping[str, Measurable], settings: Settings, options: Mapping[str, Any]
) -> dict[str, dict[int, dict[str, dict[str, float]]]]:
    found: dict[tuple[str, int, str, str], list[float]] = {}
    for number in range(PROFILES):
        for place, batch in enumerate(settings.batch_sizes):
            for name in _order(models, number + place):
                seed = _seed(settings.rounds + 1 + number, batch)
                answer = _visit(models[name], "profile", batch=batch, seed=seed, **options)
                for phase, parts in answer.items():
                    for part, seconds in parts.items():
                        found.setdefault((phase, batch, name, part), []).append(seconds)
    result: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    for (phase, batch, name, part), seconds in found.items():
        by_model = result.setdefault(phase, {}).setdefault(batch, {})
        by_model.setdefault(name, {})[part] = statistics.median(seconds)
    return result


def _order(models: Mapping[str, Measurable], number: int) -> list[str]:
    """A B for even numbers, B A for odd ones."""
    return list(models)[:: -1 if number % 2 else 1]


def _visit(model: Measurable, do: str, **options: Any) -> dict[str, Any]:
    time.sleep(PAUSE)
    return model.ask(do, **options)


def _seed(number: int, batch: int) -> int:
    """Of a pair's prompts: no other pair has it, so that no cache knows them."""
    return number * 1_000_003 + batch


def processor() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
