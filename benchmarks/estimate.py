"""What `secateur estimate` says that learning takes of memory, beside what it takes.

    python benchmarks/estimate.py MODEL --data FILE [--batch-size 8] [--seq-len 256] [--steps 3]

Each row is a process of its own, which learns gates as `secateur prune` does, on the CPU: in float32 and bfloat16, with
gradient checkpointing and without. Measured is the most that the process held in memory while it learned, after its
model and text had been loaded. Needs Linux.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from memory import forget_peak, resident
from secateur.config import Config
from secateur.estimate import estimate
from secateur.run import new_run
from secateur.session import Session
from secateur.stages import learn_stage


def settings(options: argparse.Namespace, precision: str, checkpointing: bool, out: Path | None = None) -> Config:
    """Those of a run."""
    return Config(
        options.model, sparsity=0.2, data=options.data, out=out, steps=options.steps, seq_len=options.seq_len,
        batch_size=options.batch_size, held_out_tokens=2048, device="cpu", precision=precision,  # type: ignore[arg-type]
        gradient_checkpointing=checkpointing,
    )  # fmt: skip


def child(options: argparse.Namespace) -> None:
    """Learns; prints the most bytes that this process held meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        session = Session(new_run(settings(options, options.precision, options.checkpointing, Path(folder) / "run")))
        _loaded = session.blocks
        forget_peak()
        learn_stage(session)
        print(json.dumps(resident("VmHWM")))


def main() -> None:
    """Runs every row and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.precision:
        child(options)
        return
    for precision in ("float32", "bfloat16"):
        for checkpointing in (True, False):
            parts = estimate(settings(options, precision, checkpointing), "present").memory["learn"]
            said = sum(parts.values())
            own = ["--precision", precision, *["--checkpointing"] * checkpointing]
            command = [sys.executable, __file__, *sys.argv[1:], *own]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            held = json.loads(output.splitlines()[-1])
            print(
                f"{options.batch_size} × {options.seq_len}, {precision:8}, "
                f"{'with' if checkpointing else 'without':7} gradient checkpointing: estimated {said / 1e9:.2f} GB, "
                f"measured {held / 1e9:.2f} GB ({said / held - 1:+.0%})",
                flush=True,
            )


if __name__ == "__main__":
    main()
