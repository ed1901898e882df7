"""Peak memory of a learning step with losses over the vocabulary in chunks, against whole logits.

    python benchmarks/memory.py MODEL [--batch-size 4] [--seq-len 512] [--precision float32]

Each way takes a step in a process of its own: `chunks`, as Secateur learns; `at once`, the same with one chunk of all
tokens; `by the book`, F.cross_entropy and F.kl_div on whole logits. Printed is how far the process's resident memory
rises above what it holds with the model loaded, with gradient checkpointing and without, and what share of that the
chunks take; and the loss, which must not depend on the way. Needs Linux.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from secateur import learn as learning
from secateur import passes, vocabulary
from secateur.budget import make_budget
from secateur.load import autocast, load
from secateur.recipes import RECIPES
from secateur.speed import lowered, memory_kept

WAYS = ("chunks", "at once", "by the book")


def by_the_book(student_BTD, teacher_BTD, ids_BT, kd_weight, temperature, head, teacher_head):  # type: ignore[no-untyped-def]
    """`distillation_loss` as one writes it down, for autograd to differentiate."""
    student_RV = head.logits(student_BTD[:, :-1].flatten(0, 1)).float()
    with torch.no_grad():
        teacher_RV = teacher_head.logits(teacher_BTD[:, :-1].flatten(0, 1)).float()
    ce = F.cross_entropy(student_RV, ids_BT[:, 1:].flatten())
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (student_RV, teacher_RV))
    kl = temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return ce + kd_weight * kl, ce.detach(), kl.detach()


def resident(field: str) -> int:
    """Bytes: VmRSS, what the process holds in memory; VmHWM, the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """VmHWM begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


def child(options: argparse.Namespace) -> None:
    """Takes the step one way; prints what the process held before, what at most, and the loss."""
    loaded = load(options.model, "cpu", "auto", trust_remote_code=False)
    model, groups = loaded.model, loaded.description.groups
    limits = make_budget(groups, loaded.description.shapes, 0.2, "model")
    words = model.get_input_embeddings().num_embeddings
    ids_NT = torch.randint(words, (options.batch_size, options.seq_len), generator=torch.manual_seed(0))
    if options.way != "chunks":
        vocabulary.LOGITS_AT_ONCE["cpu"] = vocabulary.ROWS_AT_ONCE["cpu"] = sys.maxsize
    if options.way == "by the book":
        passes.distillation_loss = by_the_book
    losses: list[float] = []
    forget_peak()  # which is that of loading
    before = resident("VmRSS")
    model.requires_grad_(False)
    with autocast(model.device, options.precision), memory_kept(), lowered(model):
        learning.learn(
            model, groups, ids_NT, ids_NT[:1], limits, RECIPES["paper"](1), steps=1,
            batch_size=options.batch_size, gradient_checkpointing=options.checkpointing,
            on_step=lambda step: losses.append(step.loss),
        )  # fmt: skip
    print(json.dumps({"before": before, "peak": resident("VmHWM"), "loss": losses[0]}))


def main() -> None:
    """Runs every way and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        child(options)
        return
    for checkpointing in (True, False):
        print(
            f"{options.batch_size * options.seq_len:,} tokens, {options.precision}, "
            f"{'with' if checkpointing else 'without'} gradient checkpointing"
        )
        least = None
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way, *["--checkpointing"] * checkpointing]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            step = found["peak"] - found["before"]
            least = least or found
            print(
                f"  {way:12} step {step / 1e6:5.0f} MB ({(least['peak'] - least['before']) / step:.2f}), process "
                f"{found['peak'] / 1e6:5.0f} MB ({least['peak'] / found['peak']:.2f}), loss {found['loss']:.6f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
