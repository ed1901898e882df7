"""`secateur bench RUN`: the unpruned model and the export, timed in turns in one runtime: RUN/bench-RUNTIME.json, .png.

`bench` takes any two checkpoints, `bench_run` those of a run. Measuring is in measure.py, prices on paper in ideal.py,
the processes that hold the models in workers/.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from secateur.bench_report import draw
from secateur.bench_report import show as show
from secateur.exported import check_plan, checked_export, planned
from secateur.files import InputError, scratch_folder, write_json
from secateur.gates import architecture_fingerprint
from secateur.ideal import Cost, Ideal, cost_of, eaten, ideals, odd_widths
from secateur.latency import against_measured, read_table
from secateur.load import describe_pretrained, describe_selected
from secateur.measure import Measured, Settings, Timing, measure, processor
from secateur.own_code import brings_own_code
from secateur.run import Run
from secateur.workers.parent import Worker

BENCH_FORMAT = 1

WORKERS = {"transformers": "hf", "vllm": "vllm", "vllm-server": "vllm_server", "llamacpp": "llamacpp"}
"""Runtime → module in workers/."""

PROFILED = ("transformers",)
"""Runtimes that can tell what each part of a model takes."""

PHASES = {"prefill": "prefill", "decode": "decode", "first_token": "prefill", "between_tokens": "decode"}
"""Metric → the phase whose ideal it has; what takes both has a mixture of both."""

CACHE_BLOCK = 128
"""Tokens of a sequence are rounded up to a multiple of it where a cache is sized."""


def bench_run(run: Run, settings: Settings, hear: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Times the export of a run against its unpruned model; returns what bench-RUNTIME.json holds."""
    settings.check()
    pruned, dense, trust = checked_export(run), run.config.model, run.config.trust_remote_code
    predict = prediction_of(run)
    with scratch_folder(run.folder, "bench") as scratch:
        results = bench(dense, str(pruned), settings, scratch, hear, trust_remote_code=trust)
    if predict is not None:
        results["predicted"] = predict(results)
    write_json(run.folder / f"bench-{settings.runtime}.json", results)
    hear(draw(results, run.folder / f"bench-{settings.runtime}.png"))
    return results


def prediction_of(run: Run) -> Callable[[Mapping[str, Any]], dict[str, Any]] | None:
    """What sets the prediction of the run's latency table beside measured results; None where the run has no table."""
    if not run.latency.exists():
        return None
    c, table = run.config, read_table(run.latency)
    selected = describe_selected(c.model, c.trust_remote_code, c.units, c.attention_unit, c.keep, c.depth)
    description = selected.description
    table.check_model(description, run.latency)
    groups = description.groups
    plan, _ = planned(run, groups, architecture_fingerprint(groups, description.shapes))
    exported, _ = describe_pretrained(str(checked_export(run)), brings_own_code(run.model))
    check_plan(run, exported.shapes, description, plan)
    return partial(against_measured, table, description, plan.stored(groups))


def bench(
    dense: str,
    pruned: str,
    settings: Settings,
    scratch: Path,
    hear: Callable[[str], None] = lambda _: None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Times two checkpoints, named as `secateur.load.load` has them, against each other; returns the results.

    What a runtime wants in another form is written to the folder `scratch`. `hear` is told what is being done.
    """
    settings.check()
    names, trust = (
        {"dense": dense, "pruned": pruned},
        {"dense": trust_remote_code, "pruned": brings_own_code(Path(pruned))},
    )
    described = {name: describe_pretrained(model, trust[name]) for name, model in names.items()}
    costs = {name: cost_of(description) for name, (description, _) in described.items()}
    stand = stand_for(settings, described["pruned"][1], costs["dense"], scratch, hear)
    dtype, weight_bytes, kv_bytes = stand.options["dtype"], stand.weight_bytes, stand.kv_bytes
    files = {name: stand.prepared(name, model, trust[name]) for name, model in names.items()}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        about: dict[str, dict[str, Any]] = {}
        for name, file in files.items():  # one after the other, so that their peaks of loading do not add up
            workers[name] = stack.enter_context(stand.worker(name, file, trust[name]))
            about[name] = workers[name].loaded()
        profiled = {"layers": described["dense"][0].layers} if settings.runtime in PROFILED else None
        measured = measure(workers, settings, hear, profiled)
        cache = stand.options["kv_cache_bytes"]
        for name, worker in workers.items():
            about[name] |= _memory(worker.ask("memory"), costs[name], weight_bytes, kv_bytes, cache)
    for name, cost in costs.items():
        odd = {str(block): groups for block, groups in odd_widths(cost).items()}
        about[name] |= {"parameters": cost.parameters, "odd_widths": odd, "widths": len(cost.widths)}
    return {
        "format": BENCH_FORMAT,
        "runtime": settings.runtime,
        "dtype": dtype,
        "settings": stand.said,
        "machine": machine(),
        **about,
        "timings": list(_rows(measured, costs, settings, weight_bytes, kv_bytes)),
    }


# --- before ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stand:
    """How checkpoints come to be timed in a runtime."""

    settings: Settings
    options: Mapping[str, Any]
    """What all workers are told."""
    weight_bytes: float
    """Of a value in the weights."""
    kv_bytes: float
    """Of a value in the cache."""
    scratch: Path
    """Where a runtime's own form of a checkpoint goes."""
    hear: Callable[[str], None]

    @property
    def said(self) -> dict[str, Any]:
        """The settings, for a file."""
        own = [f.name for f in fields(Settings) if f.name != "python"]
        return {name: getattr(self.settings, name) for name in own} | {"batch_sizes": self.options["batch_sizes"]}

    def prepared(self, name: str, model: str, trust: bool) -> str:
        """What the runtime loads: the checkpoint, or what is made of it."""
        runtime, dtype = self.settings.runtime, self.options["dtype"]
        checkpoint = Path(model).expanduser()
        read_as_it_is = runtime == "transformers" or checkpoint.is_dir()
        if not read_as_it_is and (runtime == "llamacpp" or checkpoint.suffix == ".gguf"):
            from secateur.equivalence import write_dense
            from secateur.load import load

            self.hear(f"writing the {name} model as a checkpoint")
            checkpoint = self.scratch / name
            stored = "float32" if dtype == "q8_0" else dtype
            write_dense(load(model, "cpu", stored, trust), checkpoint, getattr(torch, stored))
        if runtime == "llamacpp":
            from secateur.gguf_file import write_gguf

            self.hear(f"writing the {name} model as a GGUF file")
            file = self.scratch / f"{name}.gguf"
            kind = {"float32": "f32", "float16": "f16"}.get(dtype, dtype)
            write_gguf(checkpoint, file, kind, tokenizer=False)
            return str(file)
        return str(checkpoint) if checkpoint.exists() else model

    def worker(self, name: str, file: str, trust: bool) -> Worker:
        """A process that loads what was prepared."""
        self.hear(f"loading the {name} model")
        own = {**self.options, "model": file, "trust_remote_code": trust}
        module = f"secateur.workers.{WORKERS[self.settings.runtime]}"
        return Worker(module, name, own, timeout=self.settings.timeout, python=self.settings.python)


def stand_for(
    settings: Settings, config: PreTrainedConfig, dense: Cost, scratch: Path, hear: Callable[[str], None]
) -> Stand:
    """How models of a configuration are timed, whose unpruned one costs so much on paper."""
    _check_positions(settings, config)
    dtype = _dtype(settings, config)
    weight_bytes = 34 / 32 if dtype == "q8_0" else getattr(torch, dtype).itemsize
    kv_bytes = 2 if settings.runtime == "llamacpp" else weight_bytes  # llama.cpp caches in float16
    options = {
        "runtime": settings.runtime, "dtype": dtype, "threads": settings.threads, "eager": settings.eager,
        "batch_sizes": list(settings.batch_sizes), "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens, "vocabulary": config.vocab_size,
        "kv_cache_bytes": _cache_bytes(settings, dense, kv_bytes),
    }  # fmt: skip
    return Stand(settings, options, weight_bytes, kv_bytes, scratch, hear)


def _check_positions(settings: Settings, config: PreTrainedConfig) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    wanted = settings.prompt_tokens + settings.new_tokens + 1
    if positions is not None and wanted > positions:
        raise InputError(
            f"--prompt-tokens {settings.prompt_tokens} and --new-tokens {settings.new_tokens} need {wanted} positions; "
            f"the model has {positions}"
        )


def _dtype(settings: Settings, config: PreTrainedConfig) -> str:
    if settings.dtype != "auto":
        return settings.dtype
    return "float16" if settings.runtime == "llamacpp" else str(config.dtype or torch.float32).removeprefix("torch.")


def _cache_bytes(settings: Settings, dense: Cost, kv_bytes: float) -> int:
    """Room for twice the largest batch of the unpruned model: what both models get, where a runtime has to be told."""
    blocks = -(-(settings.prompt_tokens + settings.new_tokens + 1) // CACHE_BLOCK) + 1
    return int(2 * max(settings.batch_sizes) * blocks * CACHE_BLOCK * dense.kv_values * kv_bytes)


# --- after -----------------------------------------------------------------------------------------------------------


def _memory(found: Mapping[str, Any], cost: Cost, weight_bytes: float, kv_bytes: float, cache: int) -> dict[str, Any]:
    """Peak, and the tokens whose keys and values fit: as the engine says of the cache that it was given, or else what
    the device's memory holds beside the weights."""
    weights = int(cost.parameters * weight_bytes)
    a_token = cost.kv_values * kv_bytes
    values = {"peak_bytes": found["peak_bytes"], "weight_bytes": weights, "kv_bytes_per_token": a_token}
    if found.get("kv_tokens") is not None:
        return values | {"kv_tokens": found["kv_tokens"], "kv_space_bytes": cache, "kv_tokens_by": "engine"}
    space = found["device_bytes"] - weights if "device_bytes" in found else cache
    tokens = int(space // a_token) if a_token else None
    return values | {"kv_tokens": tokens, "kv_space_bytes": space, "kv_tokens_by": "bytes a token"}


def _rows(
    measured: Measured, costs: Mapping[str, Cost], settings: Settings, weight_bytes: float, kv_bytes: float
) -> Any:
    for timing in measured.timings:
        size = timing.batch_size
        found = ideals(
            costs["dense"], costs["pruned"], size, settings.prompt_tokens, settings.new_tokens, weight_bytes, kv_bytes
        )
        phase = PHASES.get(timing.metric)
        if phase is None:
            yield timing.to_json() | {"ideal": _mixed(measured, timing, found, settings)}
            continue
        ideal = found[phase]
        parts = measured.parts.get(phase, {}).get(size)
        about = {"speedup": ideal.speedup, "by": ideal.by, "flops": ideal.flops, "bytes": ideal.bytes}
        eats = asdict(eaten(timing.speedup.median, ideal, parts))
        yield timing.to_json() | {"ideal": about, "eaten": eats} | ({"part_seconds": parts} if parts else {})


def _mixed(measured: Measured, timing: Timing, found: Mapping[str, Ideal], settings: Settings) -> dict[str, Any]:
    """The ideal of a whole request: prefill and decoding, each for as long as it takes the unpruned model."""
    took = {t.metric: t.dense.median for t in measured.timings if t.batch_size == timing.batch_size}
    first, rest = took["first_token"], took["between_tokens"] * settings.new_tokens
    speedup = (first + rest) / (first / found["prefill"].speedup + rest / found["decode"].speedup)
    return {"speedup": speedup, "by": "both"}


def machine() -> dict[str, Any]:
    """What it was measured on."""
    return {"cpu": processor(), "cores": os.cpu_count()}
