"""What a learning step costs over the three passes it cannot do without.

    python benchmarks/step_cost.py MODEL [--rounds 12] [--batch-size 2] [--seq-len 256]

Floor: teacher forward + student forward + one more forward for the backward pass through activations, all three timed
as the plain model without gradients. Floor and step alternate in one process; medians and their ratio are printed.
"""

import argparse
import statistics
import time

import torch

from secateur.budget import make_budget
from secateur.learn import learn
from secateur.load import load
from secateur.recipes import RECIPES


def main() -> None:
    """Times the floor and the step in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    loaded = load(options.model, "auto", "auto", trust_remote_code=False)
    model, groups = loaded.model, loaded.description.groups
    rows = (options.rounds + 2) * options.batch_size
    ids_NT = torch.randint(loaded.description.shapes["model.embed_tokens.weight"][0], (rows, options.seq_len))
    limits = make_budget(groups, loaded.description.shapes, 0.2, "model")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    floors: list[float] = []
    steps: list[float] = []
    mark = time.perf_counter()

    def after_step(_step: object) -> None:
        nonlocal mark
        steps.append(time.perf_counter() - mark)
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(3):
                model(ids_NT[: options.batch_size].to(model.device), use_cache=False)
        floors.append(time.perf_counter() - start)
        mark = time.perf_counter()

    recipe = RECIPES["paper"](options.rounds + 2)  # no measurement of sensitivity and no settling between the steps
    learn(
        model, groups, ids_NT, ids_NT[:1], limits, recipe, steps=options.rounds + 2, batch_size=options.batch_size,
        on_step=after_step,
    )  # fmt: skip
    steps, floors = steps[2:], floors[2:]
    ratios = sorted(s / f for s, f in zip(steps, floors, strict=True))
    step, floor = statistics.median(steps), statistics.median(floors)
    print(f"weights held     {weights / 1e6:.0f} MB, once")
    print(f"floor, 3 passes  {floor:.2f} s (median of {len(floors)}, {min(floors):.2f} to {max(floors):.2f})")
    print(f"learning step    {step:.2f} s ({min(steps):.2f} to {max(steps):.2f})")
    print(f"step / floor     {statistics.median(ratios):.3f} (pair by pair, {ratios[0]:.3f} to {ratios[-1]:.3f})")
    print(f"tokens a second  {options.batch_size * options.seq_len / step:.0f}")


if __name__ == "__main__":
    main()
