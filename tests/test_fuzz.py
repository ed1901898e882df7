"""Whatever is in a file, its reader returns or raises InputError, soon and in little memory.

Real files are changed: bytes anywhere, or values anywhere in their JSON. SECATEUR_FUZZ=2000 tries so many of each kind.
"""

import copy
import json
import os
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from made_runs import make_run
from runs import small_llama, write_checkpoint
from secateur.checkpoints import Checkpoints, State
from secateur.config import Config
from secateur.config_file import load_config, save_config
from secateur.data import load_stored, store
from secateur.describe import describe
from secateur.files import InputError
from secateur.gates import Gates, architecture_fingerprint, load_gates, save_gates
from secateur.gguf_header import check_gguf
from secateur.latency import LatencyTable, Sublayers, Times, read_table, write_table
from secateur.load import describe_pretrained, load, read_export
from secateur.order import positions
from secateur.own_code import brings_own_code
from secateur.plan import Plan, Rounding, load_plan, save_plan
from secateur.report.reading import read_runs
from secateur.updates import updates_of
from secateur.wanted import read_budgets, read_pick, read_sweep

EXAMPLES = int(os.environ.get("SECATEUR_FUZZ", "40"))
MEMORY = 2**30
"""Bytes that a reader may take for a file of a few kilobytes."""

HOSTILE = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**299, 10**301, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "../../x", "/etc/passwd", "\0", "\ud800", "é" * 99, "1e999999999", "9" * 5000, "params=0.7", [], [[]], {},
    {"": None}, [None], ["x", 1], [1, 2, 3], [0.1] * 9, json.loads("[" * 70 + "]" * 70), {"a": {"a": {}}},
]  # fmt: skip


def fuzzed(**kinds: Any) -> Callable[[Any], Any]:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    profile = settings(
        max_examples=EXAMPLES, derandomize="SECATEUR_FUZZ" not in os.environ, deadline=20_000, database=None,
        suppress_health_check=quiet,
    )  # fmt: skip
    return lambda test: profile(given(**kinds)(test))


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Changes of bytes: bits, lengths, and pieces that are gone, twice, or something else."""
    changes = draw(st.lists(st.tuples(
        st.integers(0, 2**20 - 1), st.booleans(), st.integers(0, 5), st.binary(max_size=9),
        st.sampled_from([1, 2**31 - 1, 2**32 - 1, 2**60, 2**63, 2**64 - 1]),
    ), min_size=1, max_size=4))  # fmt: skip

    def apply(content: bytes) -> bytes:
        for where, early, how, piece, number in changes:
            at = where * (min(len(content), 400) if early else len(content)) >> 20
            if how == 0:
                content = content[:at] + piece + content[at + len(piece) :]
            elif how == 1:
                content = content[:at]
            elif how == 2:
                content = content[:at] + piece + content[at:]
            elif how == 3:
                content = content[:at] + struct.pack("<Q", number) + content[at + 8 :]
            elif how == 4:
                content = content[:at] + content[at + len(piece) :]
            else:
                content = content[:at] + content[at : at + 40] + content[at:]
        return content

    return apply


@st.composite
def rewriting(draw: st.DrawFn) -> Callable[[Any], Any]:
    """Changes of JSON: a value somewhere becomes a hostile one, or is gone, or goes by a hostile key."""
    changes = draw(st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 3), st.sampled_from(HOSTILE)), min_size=1, max_size=3
    ))  # fmt: skip

    def places(node: Any) -> list[tuple[Any, Any]]:
        keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        return [place for key in keys for place in ((node, key), *places(node[key]))]

    def apply(values: Any) -> Any:
        values = copy.deepcopy(values)
        for which, how, hostile in changes:
            value = copy.deepcopy(hostile)
            if not (found := places(values)):
                return value
            node, key = found[which % len(found)]
            if how == 0:
                del node[key]
            elif how == 1 and isinstance(node, dict) and isinstance(value, str):
                node[value] = node.pop(key)
            else:
                node[key] = value
        return values

    return apply


def survives(read: Callable[[], Any], bounded: bool = True) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read()
    except InputError as error:
        assert "\n" not in str(error), error
    took = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert took < MEMORY or not bounded


class Source:
    """A file as it should be, and its reader."""

    def __init__(self, path: Path, read: Callable[[Path], Any]) -> None:
        self.path, self.read, self.content = path, read, path.read_bytes()

    def check(self, content: bytes) -> None:
        self.path.write_bytes(content)
        try:
            survives(lambda: self.read(self.path), "tokenizer" not in self.path.name)  # a library reads that
        finally:
            self.path.write_bytes(self.content)


def said_with(content: bytes, change: Callable[[Any], Any]) -> bytes:
    """A safetensors file of Secateur's whose header, and what it says of itself, are changed."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {"secateur": json.loads(header["__metadata__"]["secateur"])}
    header = change(header)
    if isinstance(header, dict) and isinstance(said := header.get("__metadata__"), dict):
        header["__metadata__"] = {key: json.dumps(value) for key, value in said.items()}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Source]:
    """A file of each kind."""
    folder = tmp_path_factory.mktemp("fuzz")
    description = describe(small_llama())
    groups, units = description.groups, sum(g.units for g in description.groups)
    fingerprint = architecture_fingerprint(groups, description.shapes)
    found: dict[str, Source] = {}

    z_N = torch.randn(units, generator=torch.Generator().manual_seed(0))
    about = {"architecture": fingerprint, "steps": 7, "model": "m", "sparsity": 0.2, "budget": ["kv=0.5"],
             "experts": {}, "fixing": {"step": 3, "kept_before": 0.5, "held_out_before": 1.0, "held_out_after": 1.0},
             "weights": "abc", "tokens": 99, "shape": "ragged", "sweep": "1", "recipe": {"lr": 0.1}}  # fmt: skip
    save_gates(folder / "gates.safetensors", Gates(z_N, groups, about, z_N.abs(), None, positions(z_N), z_N.abs()))

    def gates(path: Path) -> Any:
        loaded = load_gates(path, groups, fingerprint)
        assert len(loaded.z_N) == units and loaded.z_N.isfinite().all() and (loaded.deployed() >= 0).all()
        return loaded.asked, loaded.about.get("steps", 0) + 1

    found["gates"] = Source(folder / "gates.safetensors", gates)

    kept = {g.name: torch.arange(0, g.units, 2) for g in groups}
    plan = Plan(kept, {name: torch.ones(len(index)) for name, index in kept.items()})
    budget = {"budget": "kv=0.5", "counts": "bytes", "bound": 9, "dense": 20, "pruned": 8}
    save_plan(folder / "plan.json", plan, Rounding(0.5, 0.5, 0.5, 0, 0, 0.0, 1.0, 1.0, (budget,)), fingerprint)

    def planned(path: Path) -> Any:
        from secateur.planning import said

        plan, rounding = load_plan(path, groups, fingerprint)
        return plan.gates(groups), said(rounding)

    found["plan"] = Source(folder / "plan.json", planned)

    save_config(Config("model", sparsity=0.3, guard=("code/:0.1",)).resolved(), folder / "config.yaml")
    found["config"] = Source(folder / "config.yaml", lambda path: load_config(path).resolved())

    times = {kind: {1: Times(0.01, ((0.0, 0.001, 0.002),))} for kind in ("latency", "prefill-latency")}
    channels = tuple(g for g in groups if g.kind == "channels")
    alike = Sublayers("channels", tuple(g.name for g in channels), 64, (0, 32, 64))
    table = LatencyTable(1, "m", architecture_fingerprint((), description.shapes), None, "ragged", "transformers",
                         "float32", {"prompt_tokens": 8, "new_tokens": 8}, {"cpu": "c", "cores": 2}, {}, (alike,),
                         times, {})  # fmt: skip
    write_table(folder / "latency.json", table)

    def timed(path: Path) -> Any:
        found, only = read_table(path), description.only(("channels",))
        found.check_model(only, path)
        return found.said, found.tokens, found.bound(only, read_budgets(["latency=0.7"])[0])

    found["latency"] = Source(folder / "latency.json", timed)

    states = Checkpoints(folder / "states")
    states.save(State(3, "these", {"z": z_N, "done": torch.tensor(3)}, {"fixing": None}, 0.5))
    path = folder / "states" / "step-00000003.safetensors"
    found["state"] = Source(path, lambda _path: (states.latest("these"), states.left_over(4)))

    store(folder / "data.safetensors", {"ids": torch.ones(3, 8, dtype=torch.int32)}, {"a": 1}, {"fingerprint": "f"})

    def stored(path: Path) -> None:
        if (read := load_stored(path, {"a": 1}, 64, ("ids",))) is not None:
            assert read[0]["ids"].dtype == torch.int32 and read[0]["ids"].max() < 64 and read[0]["ids"].min() >= 0

    found["tokens"] = Source(folder / "data.safetensors", stored)

    run = make_run(folder / "run", layers=2)
    for path in sorted(run.rglob("*.json*")):
        found[f"report {path.relative_to(run)}"] = Source(path, lambda _path: read_runs([run]))
    exported = run / "model" / "config.json"
    found["export"] = Source(exported, lambda path: (updates_of(path.parent), brings_own_code(path.parent)))

    model = write_checkpoint(folder / "model")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        found[f"checkpoint {name}"] = Source(model / name, lambda path: load(str(path.parent), "cpu", "float32", False))
    shutil.copytree(model, folder / "pruned")
    found["read_export"] = Source(folder / "pruned/config.json", lambda path: read_export(path.parent, torch.float32))

    pytest.importorskip("gguf")
    from secateur.gguf_file import write_gguf

    write_gguf(model, folder / "model.gguf", "f32", tokenizer=False)
    check_gguf(folder / "model.gguf")
    found["gguf"] = Source(folder / "model.gguf", lambda path: describe_pretrained(str(path)))
    return found


OF_BYTES = ["gates", "plan", "config", "latency", "state", "tokens", "gguf", "checkpoint model.safetensors",
            "checkpoint config.json", "checkpoint tokenizer.json", "report metrics.jsonl"]  # fmt: skip
OF_VALUES = ["plan", "latency", "export", "checkpoint config.json", "checkpoint tokenizer_config.json",
             "checkpoint tokenizer.json", "read_export", "report eval.json", "report verify.json", "report plan.json",
             "report model/config.json", "report bench-vllm.json"]  # fmt: skip


@pytest.mark.parametrize("name", OF_BYTES)
@fuzzed(change=damage())
def test_changed_bytes_are_read_or_refused(sources, name, change):
    sources[name].check(change(sources[name].content))


@pytest.mark.parametrize("name", OF_VALUES)
@fuzzed(change=rewriting())
def test_changed_values_are_read_or_refused(sources, name, change):
    if name not in sources:
        pytest.skip(f"no {name}")
    sources[name].check(json.dumps(change(json.loads(sources[name].content))).encode())


@fuzzed(change=rewriting())
def test_changed_settings_are_read_or_refused(sources, change):
    values = change(yaml.safe_load(sources["config"].content))
    sources["config"].check(json.dumps(values).encode())  # JSON is YAML


@pytest.mark.parametrize("name", ["gates", "state", "tokens"])
@fuzzed(change=rewriting())
def test_changed_headers_are_read_or_refused(sources, name, change):
    sources[name].check(said_with(sources[name].content, change))


READERS = {"sweep": read_sweep, "pick": read_pick, "budget": lambda word: read_budgets([word])}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@fuzzed(
    word=st.text(alphabet="0123456789.:,=<eE-+paramskvunit@ \0µ", max_size=24) | st.sampled_from(["1e999999999:0.5"])
)
def test_words_are_read_or_refused(read, word):
    survives(lambda: read(word))


def test_what_is_whole_is_read(sources):
    for source in sources.values():
        source.read(source.path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bfloat16, torch.complex64])
def test_gates_of_other_dtypes_are_refused(sources, tmp_path, dtype):
    tensors = {"layers.0.channels": torch.ones(3).to(dtype)}
    save_file(tensors, tmp_path / "gates.safetensors", metadata={"secateur": '{"format": 1}'})
    with pytest.raises(InputError, match="not a row of float32"):
        sources["gates"].read(tmp_path / "gates.safetensors")
