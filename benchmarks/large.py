"""Takes a random Llama that is larger than the memory the process may take through the commands.

    python benchmarks/large.py [--gigabytes 12] [--limit 4] [--folder DIR]
    python benchmarks/large.py --prune [--gigabytes 3] [--limit 3] [--vocabulary 32000] [--steps 2]

Writes a model in Llama-3-8B's layers and vocabulary, fewer layers of them, in bfloat16 and shards of at most 2 GB, with
random gates; then runs `secateur inspect`, `plan` and `export` with no options, each in a control group whose memory is
limited, and prints the peaks. With `--prune` a whole `secateur prune --offload disk` of a few short steps instead, and
then each of its stages once more by itself. Needs Linux and root; nothing here says anything about quality.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import Split
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


def write_model(folder: Path, gigabytes: float, vocabulary: int) -> LlamaConfig:
    """The checkpoint, a shard at a time."""
    ends = 2 * 2 * vocabulary * SIZES["hidden_size"]
    attention = 2 * SIZES["head_dim"] * SIZES["hidden_size"] * (32 + 8)
    layer = 2 * (attention + 3 * SIZES["hidden_size"] * SIZES["intermediate_size"])
    layers = round((gigabytes * GIGABYTE - ends) / layer)
    sizes = SIZES | {"vocab_size": vocabulary, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"])
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
    letters = one_letter_tokenizer()
    letters.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="a", eos_token="b").save_pretrained(folder)
    return config


def write_gates(model: Path, folder: Path, config: LlamaConfig) -> None:
    """A run with random gates."""
    run = new_run(Config(str(model), sparsity=0.5, out=folder))
    with torch.device("meta"):
        description = describe(AutoModelForCausalLM.from_config(config))
    z_N = torch.randn(sum(g.units for g in description.groups), generator=torch.Generator().manual_seed(0))
    architecture = architecture_fingerprint(description.groups, description.shapes)
    save_gates(run.gates, Gates(z_N, description.groups, {"architecture": architecture, "method": "random"}))


def pruning(model: Path, folder: Path, steps: int) -> list[str]:
    """Words of a whole run of short steps on letters drawn at random."""
    draw = Random(0)
    text = folder.with_name("letters.txt")
    text.write_text("\n\n".join("".join(draw.choices("ab", k=300)) for _ in range(8 * steps + 40)))
    settings = {"data": text, "out": folder, "sparsity": 0.5, "offload": "disk", "steps": steps, "batch_size": 2,
                "seq_len": 64, "held_out_tokens": 256, "eval_windows": 4}  # fmt: skip
    options = (f"--{name.replace('_', '-')}={value}" for name, value in settings.items())
    return ["prune", str(model), *options]


def main() -> int:
    """Exit code 0 if all commands succeeded within the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, help="size of the checkpoint (default: 12, with --prune 3)")
    parser.add_argument("--limit", type=float, help="memory a command may take, gigabytes (default: 4, with --prune 3)")
    parser.add_argument("--vocabulary", type=int, help="words (default: Llama-3-8B's, with --prune 32,000)")
    parser.add_argument("--prune", action="store_true", help="a whole run instead of random gates")
    parser.add_argument("--steps", type=int, default=2, help="of that run")
    parser.add_argument("--folder", type=Path, default=Path("runs/large"))
    options = parser.parse_args()
    usual = (3.0, 3.0, 32_000) if options.prune else (12.0, 4.0, SIZES["vocab_size"])
    options.gigabytes, options.limit, options.vocabulary = (
        own or default for own, default in zip(
            (options.gigabytes, options.limit, options.vocabulary), usual, strict=True
        )
    )  # fmt: skip
    shutil.rmtree(options.folder, ignore_errors=True)
    dense, run = options.folder / "dense", options.folder / "run"
    config = write_model(dense, options.gigabytes, options.vocabulary)
    if options.prune:
        stages = ("learn", "plan", "export", "verify", "eval")
        commands = [pruning(dense, run, options.steps), *([stage, str(run)] for stage in stages)]
    else:
        write_gates(dense, run, config)
        commands = [["inspect", str(dense)], ["plan", str(run)], ["export", str(run)]]
    files = [f.stat().st_size for f in dense.glob("*.safetensors")]
    print(f"dense: {sum(files) / GIGABYTE:.2f} GB in {len(files)} files of at most {max(files) / GIGABYTE:.2f} GB")
    failed = 0
    for command in commands:
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
    if options.prune and not failed:
        verified, found = (json.loads((run / f"{name}.json").read_text()) for name in ("verify", "eval"))
        print(f"verified: {verified['passed']}; perplexity {found['dense']['perplexity']:.6g} dense, "
              f"{found['pruned']['perplexity']:.6g} pruned")  # fmt: skip
    shutil.rmtree(options.folder)
    return failed


if __name__ == "__main__":
    sys.exit(main())
