"""One step of the primal–dual optimiser over gates and multipliers; the loop in `learn` only feeds it gradients.

Descends z and ascends λ (method.md section 3). Gates move in units of their own step size: z = 1 + step_size · θ with
Adam on θ, where Adam's step does not depend on the gradient's scale. With the default recipe the multipliers are
measured in units of the loss gradient, so that λ = 1 pushes as hard as a typical unit resists, for any model and loss.

Shape suffixes: N units of the whole model, C constraints, M units in constraints (budget.py).
"""

import hashlib
import math
from dataclasses import dataclass

import torch

from secateur.budget import Budget, largest_that_fits
from secateur.objective import annealed, lagrangian
from secateur.order import largest_within, ranked
from secateur.recipes import Recipe
from secateur.relaxation import RELAXATIONS, Relaxation

REOPENED = 0.05
"""Where z restarts for a unit that the budget has room for though its gate was closed when the kept set was fixed."""

BARELY_OPEN = 1e-6
"""The least z of a unit in the fixed kept set."""

STEP_SIZE_RANGE = (0.1, 3.0)
"""Bounds of a gate's step size relative to the median gate's."""


@dataclass(frozen=True)
class Step:
    """One line of metrics.jsonl."""

    step: int
    """Its number, from 1."""
    loss: float
    """L_ce + η L_kl, nats a token."""
    ce: float
    """L_ce, cross-entropy of the next token."""
    kl: float
    """L_kl, from the teacher."""
    kept: float
    """Share of the unit parameters whose gates are open (z > 0; by the mask where there is one)."""
    score: float
    """The same by the retention score s̄, which the budget is held on."""
    target: float | None
    """Share to keep, ρ; None where budgets weigh units by other costs."""
    mu: float
    """μ_t, half the width of the retention score."""
    lr: float
    """Step size of the gates."""
    lambda1: list[float]
    """Of each constraint, the multiplier of its violation."""
    lambda2: list[float]
    """The same of the violation squared."""
    lambda3: list[float]
    """The same of the term for undecided units."""
    budgets: dict[str, float] | None = None
    """Of each of those, s̄ / ρ: at most 1 where it is held."""
    guard_rises: list[float] | None = None
    """Of each `--guard` how far its batch's loss was above the unpruned model's, nats a token."""
    guard_weights: list[float] | None = None
    """And what its loss weighed beside the calibration text's."""
    teacher_rest: float | None = None
    """With `--teacher cache`, mean mass of the words that are not kept."""
    held_out_trained: float | None = None
    """Loss on held-out text after the step, gates as in training, nats a token; where it was asked for."""
    held_out_deployed: float | None = None
    """The same with the gates as they would be deployed: the set that fits the budget, without noise."""


class Optimiser:
    """State of a learning run: gates, multipliers, schedules. `state` and `restore` carry it over an interruption."""

    def __init__(
        self,
        recipe: Recipe,
        limits: Budget,
        steps: int,
        seed: int,
        device: torch.device,
        relaxation: Relaxation = RELAXATIONS["deterministic"],
    ) -> None:
        self.recipe, self.limits, self.steps, self.seed, self.relaxation = recipe, limits, steps, seed, relaxation
        self.done = 0
        noise = torch.randn(limits.params_N.numel(), generator=torch.Generator().manual_seed(seed))
        self.z_N = 1.0 + recipe.init_noise * noise.to(device)
        self.step_size_N = torch.ones_like(self.z_N)
        self.theta_N = (self.z_N - 1.0).requires_grad_()
        self.duals = [torch.full((len(limits.names),), start, device=device, requires_grad=True)
                      for start in recipe.dual_start]  # fmt: skip
        self.unit_C = torch.zeros(len(limits.names), device=device)
        """What a multiplier of 1 is worth: a running mean of the loss gradient a unit of budget."""
        self.kept_N: torch.Tensor | None = None
        """The kept set once it is fixed."""
        self.rank_N: torch.Tensor | None = None
        """What the units ranked by, where z has become something else since."""
        self.within_N: torch.Tensor | None = None
        """The units that may be kept, where not all may."""
        self.sensitivity_N: torch.Tensor | None = None
        """What each unit is worth alone, in nats, where that was measured."""
        self.last_open_N = torch.zeros_like(self.z_N)
        """The number of the last step after which each gate was open."""
        self.adam = torch.optim.AdamW([self.theta_N], betas=recipe.betas, eps=1e-12, weight_decay=0.0)
        ascent = [{"params": [dual], "lr": rate} for dual, rate in zip(self.duals, recipe.dual_lr, strict=True)]
        self.ascent = (
            torch.optim.AdamW(ascent, weight_decay=0.0, maximize=True)
            if recipe.adam_duals
            else torch.optim.SGD(ascent, maximize=True)
        )
        self._see_open()

    @property
    def settles_at(self) -> int:
        """The step before which the kept set is fixed; `steps` when it never is."""
        return self.steps - int(self.recipe.settle * self.steps)

    @property
    def mu(self) -> float:
        """μ_t of the next step."""
        progress = min(1.0, self.done / max(1, self.settles_at))
        return annealed(progress, self.recipe.mu_start, self.recipe.mu_end, self.recipe.mu_power)

    def train_gates(self, z_N: torch.Tensor, sample: int = 0) -> torch.Tensor:
        """What the forward pass of the next step multiplies by; noise depends on seed, step and `sample` alone."""
        if self.kept_N is not None:
            return self.relaxation.deployed(z_N, self.mu)
        seed = hashlib.sha256(f"{self.seed} {self.done} {sample}".encode()).digest()[:4]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        return self.relaxation.train(z_N, self.mu, generator, self.open_N)

    @torch.no_grad()
    def values(self) -> torch.Tensor:
        """Gate values as deployed, shape (N,)."""
        if self.relaxation.score is None and self.kept_N is None:
            return self.open_N.to(self.z_N.dtype)
        return self.relaxation.deployed(self.z_N, self.mu)

    def ranking(self) -> torch.Tensor:
        """z of the gates file: units rank by it, and those with z > 0 are open."""
        if self.rank_N is not None:
            return self.rank_N
        return self.z_N if self.relaxation.score is not None else ranked(self.z_N, self.open_N)

    def go_on_from(self, z_N: torch.Tensor, within_N: torch.Tensor) -> None:
        """Gates that were learned before, of which no more than those `within` may be kept; both of shape (N,)."""
        self.within_N = within_N
        self.z_N = torch.where(within_N, z_N, self.relaxation.lowest)
        with torch.no_grad():
            self.theta_N.copy_((self.z_N - 1.0) / self.step_size_N)
        self._see_open()

    def start_from(self, sensitivity_N: torch.Tensor, cost_N: torch.Tensor) -> None:
        """Step sizes from how much the loss minds each gate moving, the start from what its unit is taken to be worth.

        Step sizes ∝ (sensitivity a parameter)^−½, 1 for the median gate: with Adam's division by the gradient's own
        size that is a natural-gradient step. Units that the budget has no room for, by cost a parameter, start nearly
        closed; all stay free to move, so that learning decides. Both are in nats, of shape (N,), and of gates at 1,
        where gates were learned before, too: by the squares of these, heads would go that are missed later (study.md).
        """
        cost_N = cost_N.to(self.z_N.device)
        density_N = sensitivity_N.to(self.z_N.device) / self.limits.behind_N
        relative_N = (density_N / density_N.median()).clamp(min=1e-12)
        self.step_size_N = relative_N.pow(-0.5).clamp(*STEP_SIZE_RANGE)
        if self.within_N is not None:
            cost_N = cost_N * self.within_N
        worth_N = self.limits.per_cost(cost_N)
        inside_N = self.largest(worth_N)
        if self.limits.sublayers is not None:
            inside_N = self.limits.sublayers.begun(inside_N, worth_N)
        outside_N = self.z_N.clamp(max=self.recipe.start_outside)
        self.z_N = torch.where(inside_N, self.z_N, outside_N)
        with torch.no_grad():
            self.theta_N.copy_((self.z_N - 1.0) / self.step_size_N)
        self._see_open()

    def advance(
        self, grad_N: torch.Tensor, loss: float, ce: float, kl: float, unseen_N: torch.Tensor | None = None
    ) -> Step:
        """One step, from the gradient of the loss by z. Returns what metrics.jsonl records.

        Units marked in `unseen_N`, of experts that no token was sent to, stay as they are, moments included: their
        gradient of 0 says nothing, and the budget's pull on them would be all that they hear.
        """
        mu, rate = self.mu, self._rate()
        kept = score = self.limits.share_of(self.open_N)
        score_N = (
            self.open_N.float()
            if self.relaxation.score is None
            else self.limits.times(self.relaxation.score(self.z_N, mu))
        )
        if self.relaxation.score is not None:
            score = self.limits.share_of(score_N)
        budgets = None
        if self.limits.bounds:
            held_C = self.limits.kept_share(score_N) / self.limits.target_C
            budgets = dict(zip(self.limits.names, held_C.tolist(), strict=True))
        lambdas = [dual.detach().tolist() for dual in self.duals]
        if self.kept_N is not None:
            grad_N = grad_N * self.kept_N
        elif self.relaxation.score is not None:
            grad_N = grad_N + self._budget_gradient(grad_N, mu, rate)
        self.theta_N.grad = grad_N * self.step_size_N
        self.adam.param_groups[0]["lr"] = self.recipe.lr * rate
        before = [] if unseen_N is None else [tensor.detach().clone() for tensor in self._moving()]
        self.adam.step()
        if unseen_N is not None:
            self._put_back(unseen_N, before)
        self._bound()
        self.done += 1
        self.last_open_N = torch.where(self.open_N, float(self.done), self.last_open_N)
        first, second, third = lambdas
        return Step(
            self.done, loss, ce, kl, kept, score, self.limits.target, mu, self.recipe.lr * rate, first, second, third,
            budgets,
        )  # fmt: skip

    def _moving(self) -> list[torch.Tensor]:
        """What a step of Adam changes in every unit: θ and, once there are any, its moments."""
        state = self.adam.state[self.theta_N]
        return [self.theta_N, *(state[key] for key in ("exp_avg", "exp_avg_sq") if key in state)]

    @torch.no_grad()
    def _put_back(self, unseen_N: torch.Tensor, before: list[torch.Tensor]) -> None:
        for i, tensor in enumerate(self._moving()):  # moments were zero before the first step
            tensor.copy_(torch.where(unseen_N, before[i] if i < len(before) else 0.0, tensor))

    def _budget_gradient(self, grad_N: torch.Tensor, mu: float, rate: float) -> torch.Tensor:
        """Gradient of the Lagrangian terms by z, after which the multipliers ascend theirs."""
        assert self.relaxation.score is not None
        limits = self.limits
        z_M = limits.entries(self.z_N).clone().requires_grad_()
        score_M, moving = self.relaxation.score(z_M, mu), [z_M]
        if limits.sublayers is not None:
            gate_M = limits.sublayers.gate_N[limits.unit_M]
            moving.append(self.z_N[gate_M].requires_grad_())
            score_M = score_M * torch.where(gate_M != limits.unit_M, self.relaxation.score(moving[1], mu), 1.0)
        excess_C = limits.excess(limits.times(self.relaxation.score(self.z_N, mu)))
        violation_C = limits.mean(score_M) + excess_C - limits.target_C
        undecided_C = limits.mean(score_M * (1.0 - score_M))
        several = len(limits.bounds) > 1  # of which not all need bind
        terms = lagrangian(violation_C, undecided_C, *self.duals, at_most=several)
        grads = torch.autograd.grad(terms, [*moving, *self.duals])
        pulls, dual_grads = grads[: len(moving)], grads[len(moving) :]
        for dual, dual_grad, group, base in zip(
            self.duals, dual_grads, self.ascent.param_groups, self.recipe.dual_lr, strict=True
        ):
            dual.grad = dual_grad
            group["lr"] = base * rate if self.recipe.adam_duals else base
        self.ascent.step()
        if not self.recipe.adam_duals:
            unit_M = self._unit(grad_N)[limits.constraint_M]
            pulls = tuple(pull_M * unit_M for pull_M in pulls)
        budget_N = limits.gathered(pulls[0])
        return budget_N if len(pulls) == 1 else budget_N.index_add(0, gate_M, pulls[1])

    def _unit(self, grad_N: torch.Tensor) -> torch.Tensor:
        """Running mean of the median |∂L/∂m| a share of budget, shape (C,)."""
        entries, constraint_M = self.limits.entries, self.limits.constraint_M
        pressure_M = (entries(grad_N) / self.limits.weight_M * entries(self.step_size_N)).abs()
        heard = [pressure_M[(constraint_M == c) & (pressure_M > 0)] for c in range(len(self.unit_C))]
        now_C = torch.stack([p.median() if len(p) else p.new_zeros(()) for p in heard])
        settled_C = torch.where(self.unit_C > 0, 0.9 * self.unit_C + 0.1 * now_C, now_C)
        self.unit_C = torch.where(now_C > 0, settled_C, self.unit_C)  # a constraint that was not heard keeps its own
        return self.unit_C

    def _rate(self) -> float:
        """Linear warm-up, then a cosine to zero (method §3, released recipe)."""
        warm = min(1.0, (self.done + 1) / max(1, self.recipe.warmup_steps))
        return warm * 0.5 * (1.0 + math.cos(math.pi * self.done / self.steps))

    def _bound(self) -> None:
        with torch.no_grad():
            z_N = (1.0 + self.step_size_N * self.theta_N).clamp(min=self.relaxation.lowest)
            if self.kept_N is not None:
                z_N = torch.where(self.kept_N, z_N.clamp(min=BARELY_OPEN), self.relaxation.lowest)
            elif self.within_N is not None:
                z_N = torch.where(self.within_N, z_N, self.relaxation.lowest)
            self.z_N = z_N
            self.theta_N.copy_((z_N - 1.0) / self.step_size_N)
        self._see_open()

    def _see_open(self) -> None:
        projecting = self.relaxation.score is None and self.kept_N is None
        self.open_N = largest_that_fits(self.z_N, self.limits) if projecting else self.limits.open(self.z_N > 0)
        """The open units, a mask of shape (N,)."""

    def largest(self, rank_N: torch.Tensor) -> torch.Tensor:
        """The largest set that fits the budget, by rank, within what may be kept."""
        if self.within_N is None:
            return largest_that_fits(rank_N, self.limits)
        return largest_within(rank_N, self.limits, self.within_N)

    def fix_kept_set(self) -> None:
        """Keeps the largest set that fits the budget, by z, from here on; only the values of its gates still move."""
        self.kept_N = self.largest(self.z_N)
        reopened_N = self.kept_N & (self.z_N <= 0)
        z_N = torch.where(reopened_N, REOPENED, self.z_N)
        if self.relaxation.score is None:
            self.rank_N = ranked(self.z_N, self.kept_N)
            z_N = torch.ones_like(z_N)
            self.adam.state.clear()
        with torch.no_grad():
            self.theta_N.copy_((z_N - 1.0) / self.step_size_N)
        self._bound()

    def state(self) -> dict[str, torch.Tensor]:
        """All that `restore` needs to go on to bit-identical gates."""
        tensors = {"z": self.z_N, "theta": self.theta_N.detach(), "step_size": self.step_size_N, "unit": self.unit_C}
        tensors |= {"done": torch.tensor(self.done), "last_open": self.last_open_N}
        found = {"kept": self.kept_N, "rank": self.rank_N, "sensitivity": self.sensitivity_N}
        tensors |= {name: tensor for name, tensor in found.items() if tensor is not None}
        for i, dual in enumerate(self.duals):
            tensors[f"dual.{i}"] = dual.detach()
        for name, optimiser in (("adam", self.adam), ("ascent", self.ascent)):
            for i, entry in optimiser.state_dict()["state"].items():
                tensors |= {f"{name}.{i}.{key}": value for key, value in entry.items() if value is not None}
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    def _check(self, tensors: dict[str, torch.Tensor]) -> None:
        own = self.state()
        own = {"kept": own["z"] > 0, "rank": own["z"], "sensitivity": own["z"]} | own
        for name, tensor in tensors.items():
            like = own.get(name)
            if name.startswith(("adam.", "ascent.")) and name not in own:
                _, index, field = name.split(".")
                like = {"adam": own["z"], "ascent": own.get(f"dual.{index}")}[name.split(".")[0]]
                like = torch.zeros(()) if field == "step" else like
            if like is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise ValueError(f"{name} is {tensor.dtype} of shape {list(tensor.shape)}")
        if not 0 <= int(tensors["done"]) <= self.steps:
            raise ValueError(f"{int(tensors['done'])} of {self.steps} steps are done")

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over the state of an interrupted run. Raises ValueError for one of something else."""
        device = self.z_N.device
        self._check(tensors)
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.done = int(moved["done"])
        self.z_N, self.step_size_N, self.unit_C = moved["z"], moved["step_size"], moved["unit"]
        self.kept_N, self.rank_N, self.sensitivity_N = map(moved.get, ("kept", "rank", "sensitivity"))
        self.last_open_N = moved.get("last_open", self.last_open_N)
        with torch.no_grad():
            self.theta_N.copy_(moved["theta"])
            for i, dual in enumerate(self.duals):
                dual.copy_(moved[f"dual.{i}"])
        for name, optimiser in (("adam", self.adam), ("ascent", self.ascent)):
            entries: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in moved.items():
                if key.startswith(f"{name}."):
                    _, index, field = key.split(".")
                    entries.setdefault(int(index), {})[field] = value
            optimiser.load_state_dict({"state": entries, "param_groups": optimiser.state_dict()["param_groups"]})
        self._see_open()
