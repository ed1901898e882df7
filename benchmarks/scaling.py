"""How the cost of a learning step grows with the model, its layers, experts, gates, and with the sequence length.

    python benchmarks/scaling.py [--rounds 5] [--precision bfloat16] [--only sizes layers]

Random models in the shapes of Llama (sizes: of SmolLM2-135M and -360M, and one of a quarter) and of Qwen3-MoE, each in
a process of its own: time of a step and over its floor (step_cost.py), what bookkeeping takes of it, tokens a second,
and how far resident memory rises over what the process holds with the model. Needs Linux.
"""

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from memory import forget_peak, resident
from secateur.describe import describe
from step_cost import timed

LLAMA = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
MIXTURE = LLAMA | {
    "model_type": "qwen3_moe", "num_hidden_layers": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384,
}  # fmt: skip
LARGER = {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15}
LARGER |= {"num_key_value_heads": 5}
SMALLER = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}

CASES: dict[str, list[tuple[str, dict[str, Any], int]]] = {
    "sizes": [("33 M", LLAMA | SMALLER, 256), ("135 M", LLAMA, 256), ("362 M", LLAMA | LARGER, 256)],
    "layers": [(f"{n} layers", LLAMA | {"num_hidden_layers": n}, 256) for n in (10, 20, 30)],
    "sequence": [(f"{n} tokens", LLAMA | {"num_hidden_layers": 10}, n) for n in (128, 256, 512, 1024)],
    "gates": [
        (f"{n} channels", LLAMA | {"num_hidden_layers": 10, "intermediate_size": n}, 256) for n in (768, 1536, 3072)
    ],
    "experts": [(f"{n} experts", MIXTURE | {"num_experts": n}, 256) for n in (4, 8, 16, 32)],
}
"""Of each table its rows: a name, a configuration, tokens a sequence; two sequences a step."""

BATCH_SIZE = 2


def child(values: dict[str, Any], seq_len: int, rounds: int, precision: str) -> None:
    """Times one model; prints its figures as JSON."""
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(config).eval().to(torch.accelerator.current_accelerator() or "cpu")
    description = describe(model)
    forget_peak()
    before = resident("VmRSS")
    found = timed(model, description, rounds, BATCH_SIZE, seq_len, precision)
    step = statistics.median(found.steps)
    print(
        json.dumps({
            "parameters": sum(p.numel() for p in model.parameters()), "gates": sum(g.units for g in description.groups),
            "step": step, "ratio": statistics.median(found.ratios), "bookkeeping": found.share_of_bookkeeping,
            "tokens": BATCH_SIZE * seq_len / step, "memory": resident("VmHWM") - before,
        })
    )  # fmt: skip


def main() -> None:
    """Runs the cases and prints a table of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        child(*json.loads(options.case), options.rounds, options.precision)
        return
    console = Console(width=110)
    for kind in options.only:
        table = Table(title=f"{kind} ({options.precision}, 2 sequences a step)", title_justify="left")
        for column in ("", "parameters", "gates", "step", "/ floor", "bookkeeping", "tokens/s", "memory of a step"):
            table.add_column(column, justify="right" if column else "left")
        for name, values, seq_len in CASES[kind]:
            case = ["--case", json.dumps([values, seq_len]), "--rounds", str(options.rounds)]
            command = [sys.executable, __file__, *case, "--precision", options.precision]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            table.add_row(
                name, f"{found['parameters'] / 1e6:.0f} M", f"{found['gates']:,}", f"{found['step']:.2f} s",
                f"{found['ratio']:.2f}", f"{100 * found['bookkeeping']:.1f} %", f"{found['tokens']:.0f}",
                f"{found['memory'] / 1e9:.2f} GB",
            )  # fmt: skip
        console.print(table)


if __name__ == "__main__":
    main()
