"""Exports a random mixture of experts that is larger than the memory the process may take.

    python benchmarks/export_memory.py [--gigabytes 6] [--limit 4] [--folder DIR]

Writes a Qwen3-30B-A3B-shaped model (its layers' sizes, fewer of them) in bfloat16, shard by shard, with a random plan
that keeps half of all channels; then runs `secateur export --low-memory` in a control group whose memory is limited,
and prints the peak. Without `--low-memory` the kernel kills the same command. Needs Linux and root; nothing here says
anything about quality.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

from secateur.budget import make_budget
from secateur.config import Config
from secateur.describe import describe
from secateur.gates import Gates, architecture_fingerprint, save_gates
from secateur.plan import make_plan, save_plan
from secateur.run import new_run

GIGABYTE = 1e9
SIZES = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 1024,
    "tie_word_embeddings": True,
}  # fmt: skip
"""Of Qwen3-30B-A3B, but for the vocabulary, which is not what this is about."""


def write_model(folder: Path, gigabytes: float) -> Qwen3MoeConfig:
    """The checkpoint, a shard for each quarter of a layer's experts, under the names that Qwen ships."""
    layer_bytes = 2 * 3 * SIZES["num_experts"] * SIZES["moe_intermediate_size"] * SIZES["hidden_size"]
    layers = max(2, round(gigabytes * GIGABYTE / layer_bytes))
    config = Qwen3MoeConfig(**SIZES, num_hidden_layers=layers, dtype="bfloat16")
    folder.mkdir(parents=True)
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weight_map = {}
    for number, shard in enumerate(_shards(model, config)):
        file = f"model-{number:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return config


def _shards(model: torch.nn.Module, config: Qwen3MoeConfig) -> Iterator[dict[str, torch.Tensor]]:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)

    yield {n: drawn(*p.shape) for n, p in model.named_parameters() if ".experts." not in n and n != "lm_head.weight"}
    hidden, width = config.hidden_size, config.moe_intermediate_size
    for layer in range(config.num_hidden_layers):
        for start in range(0, config.num_experts, 32):
            shard = {}
            for e in range(start, start + 32):
                prefix = f"model.layers.{layer}.mlp.experts.{e}."
                shard |= {f"{prefix}{n}.weight": drawn(width, hidden) for n in ("gate_proj", "up_proj")}
                shard[f"{prefix}down_proj.weight"] = drawn(hidden, width)
            yield shard


def write_run(model_folder: Path, folder: Path, config: Qwen3MoeConfig) -> None:
    """A run with random gates and their plan."""
    run = new_run(Config(str(model_folder), sparsity=0.5, out=folder, max_shard_size="500MB"))
    with torch.device("meta"):
        description = describe(AutoModelForCausalLM.from_config(config)).only(())
    architecture = architecture_fingerprint(description.groups, description.shapes)
    z_N = torch.rand(sum(g.units for g in description.groups), generator=torch.Generator().manual_seed(0))
    gates = Gates(z_N, description.groups, {"architecture": architecture, "method": "random"})
    save_gates(run.gates, gates)
    limits = make_budget(description.groups, description.shapes, 0.5, "model", "rows")
    plan, rounding = make_plan(gates, limits, "ragged", lambda _gates: 0.0)
    save_plan(run.plan, plan, rounding, architecture)


@contextmanager
def memory_group(limit: float) -> Iterator[Path]:
    """A control group whose processes may take `limit` bytes, file cache included; needs root."""
    first = Path("/sys/fs/cgroup/memory")
    root = first if first.is_dir() else Path("/sys/fs/cgroup")
    group = root / f"secateur-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if root == first else "memory.max")).write_text(str(int(limit)))
        yield group
    finally:
        group.rmdir()


def limited(limit: float, *arguments: str) -> tuple[int, float, float, str]:
    """Exit code, peak of anonymous memory in bytes, seconds, and what was said, of a command under the limit."""
    command = [str(Path(sys.executable).with_name("secateur")), *arguments]
    start, peak = time.perf_counter(), 0.0
    with memory_group(limit) as group, TemporaryFile("w+") as output:
        join = f"echo $$ > {group}/cgroup.procs && exec {shlex.join(command)}"
        process = subprocess.Popen(["bash", "-c", join], stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines if ":" in line)
            peak = max(peak, float(status.get("RssAnon", "0 kB").split()[0]) * 1024)
            time.sleep(0.05)
        output.seek(0)
        return process.returncode, peak, time.perf_counter() - start, output.read()


def main() -> int:
    """Exit code of the export within the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the experts")
    parser.add_argument("--limit", type=float, default=4.0, help="memory the export may take, gigabytes")
    parser.add_argument("--folder", type=Path, default=Path("runs/export-memory"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    config = write_model(options.folder / "dense", options.gigabytes)
    words = PreTrainedTokenizerFast(tokenizer_object=one_letter_tokenizer(), bos_token="a")
    words.save_pretrained(options.folder / "dense")
    write_run(options.folder / "dense", options.folder / "run", config)
    size = sum(f.stat().st_size for f in (options.folder / "dense").glob("*.safetensors"))
    layer = size / config.num_hidden_layers
    print(f"dense: {size / GIGABYTE:.2f} GB in {config.num_hidden_layers} layers of {layer / GIGABYTE:.2f} GB")
    code, peak, seconds, said = limited(options.limit * GIGABYTE, "export", str(options.folder / "run"))
    print(f"limit {options.limit:.1f} GB, exit code {code}, peak {peak / GIGABYTE:.2f} GB, {seconds:.0f} s")
    if code:
        print("  " + (said.strip().splitlines() or [""])[-1])
    else:
        written = sum(f.stat().st_size for f in (options.folder / "run" / "model").glob("*.safetensors"))
        print(f"  wrote {written / GIGABYTE:.2f} GB")
    shutil.rmtree(options.folder)
    return code


def one_letter_tokenizer():  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))


if __name__ == "__main__":
    sys.exit(main())
