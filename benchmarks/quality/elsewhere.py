"""Perplexity of finished runs on a text that is in no file of the study: the reference manual that ships with Python.

    python benchmarks/quality/elsewhere.py MODEL RUN… [--windows 20] [--length 512]

RUN is a run folder with a plan, such as the study leaves in `runs/study/NAME`. The model is loaded once; each plan's
gates are put on it, which computes what the exported checkpoint computes (a run's `verify.json` says how closely).
"""

import argparse
import math
import sys
from pathlib import Path
from pydoc_data.topics import topics

from rich.console import Console
from rich.table import Table

from secateur.evaluate import mean_loss, windows
from secateur.files import InputError
from secateur.gates import architecture_fingerprint
from secateur.load import load
from secateur.plan import load_plan


def main() -> int:
    """Exit codes: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the unpruned model, as `secateur prune` takes it")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    console = Console(highlight=False)
    try:
        loaded = load(options.model, "auto", "float32", trust_remote_code=False)
        text = "\n\n".join(topics[name] for name in sorted(topics))
        ids_T = loaded.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        ids_NT = windows(ids_T, options.windows, options.length, "Python's reference manual")
        dense = mean_loss(loaded.model, ids_NT)
        table = Table("run", "perplexity", "× unpruned", title="Python's reference manual", title_justify="left")
        table.add_row("unpruned", f"{math.exp(dense):.2f}", "1.000")
        groups = loaded.description.groups
        architecture = architecture_fingerprint(groups, loaded.description.shapes)
        for run in options.runs:
            plan, _ = load_plan(run / "plan.json", groups, architecture)
            loss = mean_loss(loaded.model, ids_NT, groups, plan.gates(groups))
            table.add_row(run.name, f"{math.exp(loss):.2f}", f"{math.exp(loss - dense):.3f}")
            console.print(f"{run.name}: {math.exp(loss - dense):.3f} × unpruned")
        console.print(table)
    except InputError as error:
        print(f"elsewhere: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
