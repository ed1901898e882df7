"""What a learning step costs over the three passes it cannot do without.

    python benchmarks/step_cost.py MODEL [--rounds 12] [--batch-size 2] [--seq-len 256] [--precision bfloat16]

Floor: teacher forward + student forward + one more forward for the backward pass through activations, all three timed
as the plain model without gradients. Floor and step alternate in one process; medians and their ratio are printed, and
what the gates' own bookkeeping takes of a step: multipliers, annealing, the optimiser.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.budget import make_budget
from secateur.describe import Description
from secateur.learn import learn
from secateur.load import autocast, load
from secateur.optimise import Optimiser
from secateur.recipes import RECIPES
from secateur.speed import lowered, memory_kept

WARM_UP = 2
"""Steps before those that count."""


@dataclass
class Timed:
    """Seconds of each round."""

    floors: list[float]
    steps: list[float]
    bookkeeping: list[float]

    @property
    def ratios(self) -> list[float]:
        """Step over floor, pair by pair, sorted."""
        return sorted(s / f for s, f in zip(self.steps, self.floors, strict=True))

    @property
    def share_of_bookkeeping(self) -> float:
        """Of a step."""
        return statistics.median(b / s for b, s in zip(self.bookkeeping, self.steps, strict=True))


def timed(
    model: PreTrainedModel,
    description: Description,
    rounds: int,
    batch_size: int,
    seq_len: int,
    precision: str,
    plain: bool = False,
) -> Timed:
    """Steps and floors in turn; `plain` leaves out what speed.py does."""
    rows = (rounds + WARM_UP) * batch_size
    words = model.get_input_embeddings().num_embeddings
    ids_NT = torch.randint(words, (rows, seq_len), generator=torch.Generator().manual_seed(0))
    floors: list[float] = []
    steps: list[float] = []
    bookkeeping: list[float] = []
    mark = time.perf_counter()

    def now() -> float:
        if model.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def after_step(_step: object) -> None:
        nonlocal mark
        start = now()
        steps.append(start - mark)
        with torch.no_grad():
            for _ in range(3):
                model(ids_NT[:batch_size].to(model.device), use_cache=False)
        mark = now()
        floors.append(mark - start)

    own = Optimiser.advance

    def advance(self: Optimiser, *found: Any) -> Any:
        start = now()
        step = own(self, *found)
        bookkeeping.append(now() - start)
        return step

    limits = make_budget(description.groups, description.shapes, 0.2, "model")
    recipe = RECIPES["paper"](rounds + WARM_UP)  # no measurement of sensitivity and no settling between the steps
    model.requires_grad_(False)
    with autocast(model.device, precision), ExitStack() as stack:
        if not plain:
            stack.enter_context(memory_kept())
            stack.enter_context(lowered(model))
        stack.callback(_put_back, own)
        Optimiser.advance = advance  # type: ignore[method-assign]
        learn(
            model, description.groups, ids_NT, ids_NT[:1], limits, recipe, steps=rounds + WARM_UP,
            batch_size=batch_size, on_step=after_step,
        )  # fmt: skip
    return Timed(floors[WARM_UP:], steps[WARM_UP:], bookkeeping[WARM_UP:])


def _put_back(advance: Callable[..., Any]) -> None:
    Optimiser.advance = advance  # type: ignore[method-assign]


def main() -> None:
    """Times one model and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--plain", action="store_true", help="without what speed.py does, for comparison")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    loaded = load(options.model, "auto", "auto", trust_remote_code=False)
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    found = timed(
        loaded.model, loaded.description, options.rounds, options.batch_size, options.seq_len, options.precision,
        options.plain,
    )  # fmt: skip
    step, floor, ratios = statistics.median(found.steps), statistics.median(found.floors), found.ratios
    rounds = len(found.steps)
    print(f"weights held     {weights / 1e6:.0f} MB, once")
    print(f"floor, 3 passes  {floor:.2f} s (median of {rounds}, {min(found.floors):.2f} to {max(found.floors):.2f})")
    print(f"learning step    {step:.2f} s ({min(found.steps):.2f} to {max(found.steps):.2f})")
    print(f"step / floor     {statistics.median(ratios):.3f} (pair by pair, {ratios[0]:.3f} to {ratios[-1]:.3f})")
    print(f"bookkeeping      {100 * found.share_of_bookkeeping:.1f} % of a step")
    print(f"tokens a second  {options.batch_size * options.seq_len / step:.0f}")


if __name__ == "__main__":
    main()
