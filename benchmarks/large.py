"""Inspects, plans and exports a random Llama that is larger than the memory the process may take.

    python benchmarks/large.py [--gigabytes 12] [--limit 4] [--folder DIR]

Writes a model in Llama-3-8B's layers and vocabulary, fewer layers of them, in bfloat16 and shards of at most 2 GB, with
random gates; then runs `secateur inspect`, `plan` and `export` with no options, each in a control group whose memory is
limited, and prints the peaks. Needs Linux and root; nothing here says anything about quality.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from export_memory import GIGABYTE, limited, one_letter_tokenizer
from secateur.config import Config
from secateur.describe import describe
from secateur.gates import Gates, architecture_fingerprint, save_gates
from secateur.run import new_run

SIZES = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 128256,
}  # fmt: skip
"""Of Llama-3-8B."""


def write_model(folder: Path, gigabytes: float) -> LlamaConfig:
    """The checkpoint, a shard at a time."""
    ends = 2 * 2 * SIZES["vocab_size"] * SIZES["hidden_size"]
    attention = 2 * SIZES["head_dim"] * SIZES["hidden_size"] * (32 + 8)
    layer = 2 * (attention + 3 * SIZES["hidden_size"] * SIZES["intermediate_size"])
    layers = round((gigabytes * GIGABYTE - ends) / layer)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    parameters = list(model.named_parameters())
    for number, (name, parameter) in enumerate(parameters):
        shard[name] = torch.empty(parameter.shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
        held = sum(tensor.nbytes for tensor in shard.values())
        following = parameters[number + 1][1].numel() * 2 if number + 1 < len(parameters) else 2 * GIGABYTE
        if held + following > 2 * GIGABYTE:
            file = f"model-{len(set(weight_map.values())):05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    words = PreTrainedTokenizerFast(tokenizer_object=one_letter_tokenizer(), bos_token="a")
    words.save_pretrained(folder)
    return config


def write_gates(model: Path, folder: Path, config: LlamaConfig) -> None:
    """A run with random gates."""
    run = new_run(Config(str(model), sparsity=0.5, out=folder))
    with torch.device("meta"):
        description = describe(AutoModelForCausalLM.from_config(config))
    z_N = torch.randn(sum(g.units for g in description.groups), generator=torch.Generator().manual_seed(0))
    architecture = architecture_fingerprint(description.groups, description.shapes)
    save_gates(run.gates, Gates(z_N, description.groups, {"architecture": architecture, "method": "random"}))


def main() -> int:
    """Exit code 0 if all three commands succeeded within the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=12.0, help="size of the checkpoint")
    parser.add_argument("--limit", type=float, default=4.0, help="memory a command may take, gigabytes")
    parser.add_argument("--folder", type=Path, default=Path("runs/large"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    dense, run = options.folder / "dense", options.folder / "run"
    config = write_model(dense, options.gigabytes)
    write_gates(dense, run, config)
    files = [f.stat().st_size for f in dense.glob("*.safetensors")]
    print(f"dense: {sum(files) / GIGABYTE:.2f} GB in {len(files)} files of at most {max(files) / GIGABYTE:.2f} GB")
    failed = 0
    for command in (["inspect", str(dense)], ["plan", str(run)], ["export", str(run)]):
        code, peak, seconds, said = limited(options.limit * GIGABYTE, *command)
        failed |= code
        print(
            f"{command[0]}: limit {options.limit:.1f} GB, exit code {code}, peak of anonymous memory "
            f"{peak / GIGABYTE:.2f} GB, {seconds:.0f} s",
            flush=True,
        )
        if code:
            print("  " + (said.strip().splitlines() or [""])[-1])
    written = sum(f.stat().st_size for f in (run / "model").glob("*.safetensors"))
    print(f"wrote {written / GIGABYTE:.2f} GB")
    shutil.rmtree(options.folder)
    return failed


if __name__ == "__main__":
    sys.exit(main())
