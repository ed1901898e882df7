"""Times a random Llama-shaped model, dense against pruned by half, in a runtime of choice.

    python benchmarks/serving/speed.py [--runtime vllm] [--shape uniform aligned ragged] [--out DIR]

The model is bound by its matrices: wide, of few layers and words, so that what pruning takes from them is nearly all
there is to gain. Its plan is random and removes half of the block parameters: `uniform` the same from each layer,
`ragged` from a quarter to three quarters, `aligned` the same rounded to widths that kernels like. Speed does not depend
on what weights say; nothing here says anything about quality. The other options are those of `secateur bench`.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.bench import bench, show
from secateur.bench_report import draw
from secateur.describe import Description, describe
from secateur.export import export
from secateur.files import InputError, write_json
from secateur.measure import Settings
from secateur.plan import Plan

SIZES = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 1024, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
"""63 M parameters a layer: six of them are 382 M with the embeddings."""

ALIGNED = 128
"""Widths of MLPs are multiples of it where the shape is `aligned`; those of heads are multiples of the head size."""

SHAPES = ("uniform", "aligned", "ragged")


def random_model(layers: int, dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    """The dense model."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers))
    model = model.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.uniform_(-0.02, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    return model


def random_plan(description: Description, shape: str, seed: int = 0) -> Plan:
    """Keeps half of all units. Where layers differ, one keeps more by as much as the next one keeps less."""
    generator = torch.Generator().manual_seed(seed)
    layers = max(group.layer for group in description.groups) + 1
    shift_L = (torch.rand(-(-layers // 2), generator=generator) - 0.5) / 2
    shift_L = torch.stack([shift_L, -shift_L], dim=1).flatten() * (shape != "uniform")
    if layers % 2:
        shift_L[-2:] = 0.0
    kept = {}
    for group in description.groups:
        step = ALIGNED if shape == "aligned" and not group.attends else 1
        width = round(group.units * (0.5 + float(shift_L[group.layer])) / step) * step
        kept[group.name] = torch.randperm(group.units, generator=generator)[:width].sort().values
    ones = {name: torch.ones(len(index)) for name, index in kept.items()}
    return Plan(kept, ones, "uniform" if shape == "uniform" else "ragged")


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token: servers want a tokenizer."""
    words = {f"w{i}": i for i in range(SIZES["vocab_size"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", bos_token="w1", eos_token="w2")


def write_dense(folder: Path, layers: int, dtype: torch.dtype) -> None:
    """The dense checkpoint."""
    random_model(layers, dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def write_pruned(folder: Path, layers: int, dtype: torch.dtype, shape: str) -> None:
    """The checkpoint with half of its units."""
    model = random_model(layers, dtype)
    description = describe(model)
    export(model, tokenizer(), description, random_plan(description, shape), folder, dtype=dtype)


def main() -> int:
    """Exit codes: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Settings()
    parser.add_argument("--runtime", default=default.runtime)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["uniform", "aligned"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(default.batch_sizes))
    for name in ("prompt_tokens", "new_tokens", "rounds", "threads", "timeout"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--python", type=Path, help="interpreter of another environment, where the runtime is")
    parser.add_argument("--out", type=Path, help="folder for the results, a file and a plot a shape")
    options = parser.parse_args()
    values = {field.name: getattr(options, field.name) for field in fields(Settings)}
    settings = Settings(**values | {"batch_sizes": tuple(options.batch_sizes)})
    console = Console(highlight=False)
    stored = getattr(torch, options.dtype, torch.float32)
    try:
        settings.check()
        with TemporaryDirectory(prefix="speed-") as folder:
            scratch = Path(folder)
            write_dense(scratch / "model", options.layers, stored)
            for shape in options.shape:
                console.print(f"[bold]{shape}[/bold]")
                write_pruned(scratch / shape, options.layers, stored, shape)
                results = bench(str(scratch / "model"), str(scratch / shape), settings, scratch, console.print)
                show(console, results)
                if options.out:
                    name = f"{settings.runtime}-{shape}-{results['dtype']}"
                    write_json(options.out / f"{name}.json", results | {"shape": shape, "layers": options.layers})
                    console.print(draw(results, options.out / f"{name}.png"))
    except InputError as error:
        print(f"speed: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
