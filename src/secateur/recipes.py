"""How gates are learned: the methods there are, and the step sizes and schedules of those that learn.

A `Recipe` is chosen by name (`--recipe`) and complete in itself, so that config.yaml repeats a run even if a later
version changes the defaults.
"""

from dataclasses import dataclass, replace
from math import floor
from typing import ClassVar, Literal

from pydantic import ConfigDict

from secateur.policy import policy_of


@dataclass(frozen=True)
class Recipe:
    """Step sizes and schedules of the learning loop (method.md section 3). All rates decay along a cosine to zero."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    lr: float
    """Step size of the gates z: about how far Adam moves a gate in a step."""
    betas: tuple[float, float]
    """Adam's averages of the gradient and of its square."""
    warmup_steps: int
    """Steps over which rates rise linearly from zero."""
    kd_weight: float
    """η, weight of the distillation term beside the cross-entropy."""
    kd_temperature: float
    """τ, temperature of the distillation term."""
    init_noise: float
    """Standard deviation of z around 1 at the start."""
    mu_start: float
    """μ_0, half the width of the retention score at the start."""
    mu_end: float
    """μ_T, the same at the end: the score is then nearly the indicator of z > 0."""
    mu_power: float
    """μ falls with this power of the time passed; the paper's is ½."""
    dual_lr: tuple[float, float, float]
    """Ascent rates of λ₁ (violation), λ₂ (its square) and λ₃ (undecided units)."""
    dual_start: tuple[float, float, float]
    """Initial λ₁, λ₂, λ₃."""
    adam_duals: bool
    """Adam ascends the duals (the released recipe); otherwise plain gradient ascent, in units of the loss gradient."""
    sensitivity_batches: int
    """Batches on which the loss sensitivity of every gate is measured first; it sets their step sizes and the start of
    those that the budget has no room for. 0: all gates start at 1 and move alike, as in the paper."""
    attention_weight: float
    """How much more a head's sensitivity counts than a channel's: heads removed together hurt more than their sum."""
    layer_balance: float
    """How much the channels' sensitivities are evened out between layers, 0 to 1: units that go together from one layer
    hurt more than their sum, so that sensitivity one by one takes too many from the same layers."""
    start_outside: float
    """z at the start of units that do not fit the budget by sensitivity."""
    settle: float
    """Share of the steps, at the end, in which the kept set is fixed and only gate values are learned."""
    remeasured_batches: int = 0
    """Batches on which sensitivity is measured again, each time, where the budget takes a quarter or more away
    (remeasure.py). 0: never."""


def paper_recipe(steps: int) -> Recipe:
    """The released recipe to the letter (method.md section 3), made for 1,000 steps of 16 × 2,048 tokens."""
    return Recipe(
        name="paper", lr=2e-2, betas=(0.9, 0.999), warmup_steps=min(100, steps), kd_weight=2.0, kd_temperature=1.0,
        init_noise=0.01, mu_start=0.5, mu_end=0.1, mu_power=0.5, dual_lr=(2e-2, 4e-1, 2e-2),
        dual_start=(0.0, 0.0, 0.0), adam_duals=True, sensitivity_batches=0, attention_weight=1.0,
        layer_balance=0.0, start_outside=1.0,
        settle=0.0,
    )  # fmt: skip


def auto_recipe(steps: int) -> Recipe:
    """The default: the same method, with step sizes and schedules that fit any number of steps (docs/study.md)."""
    return Recipe(
        name="auto", lr=0.3 / steps**0.5, betas=(0.9, 0.99), warmup_steps=max(1, steps // 20), kd_weight=2.0,
        kd_temperature=1.0, init_noise=0.0, mu_start=0.15, mu_end=0.05, mu_power=1.0,
        dual_lr=(50.0 / steps, 50.0 / steps, 5.0 / steps), dual_start=(0.0, 5.0, 0.0), adam_duals=False,
        sensitivity_batches=min(120, steps), attention_weight=1.5, layer_balance=0.3, start_outside=0.1, settle=0.5,
        remeasured_batches=min(24, steps),
    )  # fmt: skip


MEASURED_ONCE, MEASURED_AGAIN = 0.2, 0.1
"""Shares of the units' parameters that go by one measurement: by the dense model's, and by each one after."""


def remeasured_at(removed: float) -> list[float]:
    """The shares at which sensitivity is measured again where `removed` is to go: 0.2, 0.3 and 0.4 of 0.5. Tenths are
    rounded: a budget is hardly met to the last unit."""
    times = floor((removed - MEASURED_ONCE) / MEASURED_AGAIN + 0.5 + 1e-6)
    return [MEASURED_ONCE + MEASURED_AGAIN * n for n in range(times)]


RECIPES = {"auto": auto_recipe, "paper": paper_recipe}

Tie = Literal["rows", "experts"]
"""What of a mixture goes together: `rows`, the channels of the same rank in all experts of a layer, so that these stay
equally wide; `experts`, all channels of an expert."""

Method = Literal[
    "deterministic", "hard-concrete", "hard-concrete-deterministic", "hard-concrete-expanded", "grasprune",
    "sensitivity", "magnitude", "wanda-sp", "flap", "taylor-element", "taylor-vector", "frequency", "reap", "camera",
]  # fmt: skip

OF_EXPERTS = ("frequency", "reap", "camera")
"""Methods that score experts only (importance_experts.py)."""

ONE_SHOT = ("sensitivity", "magnitude", "wanda-sp", "flap", "taylor-element", "taylor-vector", *OF_EXPERTS)
"""Methods that score the units once and learn nothing (importance.py)."""

EQUAL_WIDTHS = ("magnitude", "wanda-sp", "taylor-element", "taylor-vector", *OF_EXPERTS)
"""Methods whose papers remove the same share of every layer; FLAP's and GRASPrune's budgets are the model's."""

WHOLE_EXPERTS = ("frequency", "reap")
"""Methods that score experts, and remove these whole."""


def tie_of(method: str, shape: str) -> Tie | None:
    """What of a mixture goes together."""
    if method in WHOLE_EXPERTS:
        return "experts"
    return None if policy_of(shape).form == "padded" else "rows"


def recipe_of(method: str, name: str, steps: int, binarise: bool, remeasure: bool = True) -> Recipe:
    """The recipe called `name`, with what a method's own paper changes in it (relaxation.py says why)."""
    recipe = RECIPES[name](steps)
    if not remeasure:
        recipe = replace(recipe, remeasured_batches=0)
    if method.startswith("hard-concrete"):
        recipe = replace(recipe, mu_start=0.5, mu_end=0.5)
    elif method == "grasprune":
        recipe = replace(recipe, dual_lr=(0.0, 0.0, 0.0), dual_start=(0.0, 0.0, 0.0))
        if name == "paper":
            recipe = replace(recipe, lr=1e-2, betas=(0.9, 0.99), warmup_steps=1, kd_weight=0.0, settle=0.2)
    if not binarise or method.startswith("hard-concrete"):
        recipe = replace(recipe, dual_lr=(*recipe.dual_lr[:2], 0.0), dual_start=(*recipe.dual_start[:2], 0.0))
    return recipe
