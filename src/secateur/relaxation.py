"""What a gate z stands for while it is learned and when it is deployed: the method, and the relaxations it is held
against. All share the optimiser, the multipliers, the start and the settling; so a comparison isolates the relaxation.

| `--method` | forward gate in training | what the budget is held on | deployed gate | μ, λ₃ |
|---|---|---|---|---|
| deterministic | ReLU(z) | retention score at μ_t | ReLU(z) | as the recipe has them |
| hard-concrete-expanded | ReLU(z) | retention score | ReLU(z) | μ = ½, no λ₃ |
| hard-concrete-deterministic | retention score | retention score | retention score | μ = ½, no λ₃ |
| hard-concrete | sampled | probability of being open | retention score | μ = ½, no λ₃ |
| grasprune | 1 where z is in the budget, else 0 | the same mask | scale learned afterwards | no multipliers |

The paper's ablation (method.md section 4) goes from hard concrete by three steps to the full method. Our reading: each
step changes what its row names and no more, so annealing and binarisation come with the last one. Distillation is in
every row; `--kd-weight 0` is without. The kept set is {z > 0} for all but grasprune, and all gradients are straight
through clamps (method.md section 3).

Shape suffixes: N units of the whole model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from secateur.objective import SCORE_SLOPE, STRETCH_HIGH, STRETCH_LOW, forward_gate, retention_score, straight_through

LOWEST = -0.1
"""After every step z is clamped to at least this, so that a closed gate stays within reach of opening (method §3)."""

BETA = 2 / 3
"""Temperature of hard concrete (Louizos et al. 2018, section 4)."""

LOWEST_SAMPLED = -0.46
"""The same bound for sampled gates, log α = log 1 %, as CoFi (Xia et al. 2022) has it: by then P(open) = 5 %. At
`LOWEST` it is 22 %, and no budget that is held on probabilities could be met."""

PROJECTION_TEMPERATURE = 1.5
"""τ of GRASPrune's keep probability, from its released code."""


def log_alpha(z_N: torch.Tensor, mu: float) -> torch.Tensor:
    """log α = (z − μ) C₀/μ: the parameter of hard concrete in units of z, so that its gate without noise is the score.

    With it all methods start alike: the gate is 0 at z = 0 and 1 at z = 2μ.
    """
    return (z_N - mu) * (SCORE_SLOPE / mu)


def sampled_gate(z_N: torch.Tensor, mu: float, generator: torch.Generator) -> torch.Tensor:
    """m = clamp(σ((log u − log(1−u) + log α)/β)(r − l) + l, 0, 1), u ~ U(0, 1) for each unit. Method §2, Louizos et al.
    2018 (arXiv 1712.01312) equations 10 and 11."""
    u_N = torch.rand(z_N.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(z_N.device)
    stretched_N = torch.sigmoid((u_N.logit() + log_alpha(z_N, mu)) / BETA) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW
    return straight_through(stretched_N.clamp(0.0, 1.0), stretched_N)


def probability_open(z_N: torch.Tensor, mu: float) -> torch.Tensor:
    """P(m ≠ 0) = σ(log α − β log(−l/r)), whose sum is the expected l0 norm. Method §2, Louizos et al. equation 12."""
    return torch.sigmoid(log_alpha(z_N, mu) + BETA * SCORE_SLOPE)


def confined_gate(z_N: torch.Tensor, mu: float) -> torch.Tensor:
    """The hard concrete gate without noise, in [0, 1] exactly: clamp(σ(log α)(r − l) + l, 0, 1), as Louizos et al.
    deploy it (equation 13, without β); it is the retention score."""
    score_N = retention_score(z_N, mu)
    return score_N.detach().clamp(0.0, 1.0) + (score_N - score_N.detach())


def projected_gate(z_N: torch.Tensor, inside_N: torch.Tensor) -> torch.Tensor:
    """The mask of the units inside the budget, with the gradient of their keep probabilities σ((z − 1)/τ).

    GRASPrune (Wang et al. 2026, arXiv 2604.19398): units are taken by falling probability, not divided by cost, until
    the budget is full, anew at every step. Its scores start at 0; here z does at 1, hence the shift. Ours: what still
    fits after the first unit that does not is taken, too, and a layer may close.
    """
    return straight_through(inside_N.to(z_N.dtype), torch.sigmoid((z_N - 1.0) / PROJECTION_TEMPERATURE))


def calibrated_scale(z_N: torch.Tensor, _mu: float) -> torch.Tensor:
    """GRASPrune's scales once the mask is fixed, 1 + ½ tanh θ with θ = 2 (z − 1), so that they move as z does at 1."""
    return torch.where(z_N > 0, 1.0 + 0.5 * torch.tanh(2.0 * (z_N - 1.0)), 0.0)


@dataclass(frozen=True)
class Relaxation:
    """A method of learning gates, as maps of z. Gradients flow through all of them."""

    train: Callable[[torch.Tensor, float, torch.Generator, torch.Tensor], torch.Tensor]
    """(z, μ, generator, mask of the open units) → what the forward pass multiplies by, until the kept set is fixed."""
    score: Callable[[torch.Tensor, float], torch.Tensor] | None
    """(z, μ) → retention score, on which the multipliers hold the budget. None: there are none; the open units are
    those that fit the budget by z, at every step, and z starts anew, as a scale, when the kept set is fixed."""
    deployed: Callable[[torch.Tensor, float], torch.Tensor]
    """(z, μ) → gate value of the finished model; also what is learned on once the kept set is fixed."""
    lowest: float = LOWEST
    """Lower bound of z."""
    sampled: bool = False
    """Whether `train` draws from the generator."""


def _relu(z_N: torch.Tensor, _mu: float, *_: object) -> torch.Tensor:
    return forward_gate(z_N)


_EXPANDED = Relaxation(train=_relu, score=retention_score, deployed=_relu)

RELAXATIONS = {
    "deterministic": _EXPANDED,
    "hard-concrete-expanded": _EXPANDED,
    "hard-concrete-deterministic": Relaxation(
        train=lambda z_N, mu, *_: confined_gate(z_N, mu), score=retention_score, deployed=confined_gate
    ),
    "hard-concrete": Relaxation(
        train=lambda z_N, mu, generator, _: sampled_gate(z_N, mu, generator),
        score=probability_open,
        deployed=confined_gate,
        lowest=LOWEST_SAMPLED,
        sampled=True,
    ),
    "grasprune": Relaxation(
        train=lambda z_N, _mu, _generator, inside_N: projected_gate(z_N, inside_N),
        score=None,
        deployed=calibrated_scale,
    ),
}
"""`--method` → its relaxation. The first two differ by the recipe only (config.recipe_of)."""
