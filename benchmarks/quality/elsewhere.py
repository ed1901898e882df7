"""Perplexity of finished runs on a text that is in no file of the study: the reference manual that ships with Python.

    python benchmarks/quality/elsewhere.py MODEL RUN… [--windows 20] [--length 512]

RUN is a run folder with a plan, such as the study leaves in `runs/study/NAME`. The model is loaded once; each plan's
gates are put on it, which computes what the exported checkpoint computes (a run's `verify.json` says how closely).
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

from secateur.api import open_session
from secateur.bos import leading_bos
from secateur.evaluate import mean_loss, windows
from secateur.files import InputError
from secateur.load import load, selected
from secateur.plan import load_plan


def main() -> int:
    """Exit codes: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the unpruned model, as `secateur prune` takes it")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    try:
        loaded = load(options.model, "auto", "float32", trust_remote_code=False)
        text = "\n\n".join(topics[name] for name in sorted(topics))
        ids_T = loaded.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        bos = leading_bos(loaded.model, loaded.tokenizer)
        ids_NT = windows(ids_T, options.windows, options.length, "Python's reference manual", bos)
        dense = mean_loss(loaded.model, ids_NT)
        print(f"unpruned: perplexity {math.exp(dense):.2f} on Python's reference manual")
        for run in options.runs:
            session = open_session(run)
            c = session.config
            description = selected(loaded.model, c.units, c.attention_unit, c.keep, c.depth)
            session.loaded = replace(loaded, description=description)
            groups = description.groups
            plan, _ = load_plan(session.run.plan, groups, session.architecture)
            loss = mean_loss(loaded.model, ids_NT, groups, plan.gates(groups))
            print(f"{run.name}: {math.exp(loss):.2f}, {math.exp(loss - dense):.3f} × unpruned", flush=True)
    except InputError as error:
        print(f"elsewhere: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
