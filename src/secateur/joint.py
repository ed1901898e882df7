"""Width and depth in one budget: sublayers with gates of their own beside those of their units (`--depth joint`).

A unit is kept if its gate and that of its sublayer are open, so its score is the product of both, and closing a
sublayer saves what its units that are still open cost. Ranked, a unit stands no higher than its sublayer: so one budget
takes and leaves units and whole sublayers in one order.

Where ranks are what losses say, a sublayer has its price: the one at which to close it, which costs what the sublayer
as a whole is worth, is as good as to keep what of its units is worth that price. A sublayer that is worth as much as
its units together, or more, never goes before them.

Shape suffixes: N gates of the whole model, those of units and of sublayers; K units of a sublayer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.units import Group


@dataclass(frozen=True)
class Sublayers:
    """The gates of sublayers among all gates."""

    gate_N: Tensor
    """The place of the gate of the sublayer that a unit lies in; its own, where it lies in none that has one."""
    inside_N: Tensor
    """Which gates are those of units in a sublayer that has one."""
    are_N: Tensor
    """Which gates are those of sublayers."""

    def to(self, device: torch.device) -> "Sublayers":
        """The same on `device`."""
        return Sublayers(self.gate_N.to(device), self.inside_N.to(device), self.are_N.to(device))

    def times(self, value_N: Tensor) -> Tensor:
        """Values of units times those of their sublayers."""
        return torch.where(self.inside_N, value_N * value_N[self.gate_N], value_N)

    def open(self, open_N: Tensor) -> Tensor:
        """What is kept where these gates are open: units behind two open gates, sublayers with a unit that is kept."""
        kept_N = open_N & open_N[self.gate_N] & ~self.are_N
        return kept_N | (self._most(kept_N.float()) > 0)

    def _most(self, value_N: Tensor) -> Tensor:
        """The highest value of each sublayer's units, 0 at the places of units; values are at least 0."""
        inside_N = self.inside_N
        return torch.zeros_like(value_N).scatter_reduce(0, self.gate_N[inside_N], value_N[inside_N], "amax")

    def sums(self, value_N: Tensor) -> Tensor:
        """The sum over each sublayer's units at the place of its gate, units as they are."""
        inside_N = self.inside_N
        return torch.where(self.are_N, 0.0, value_N).index_add(0, self.gate_N[inside_N], value_N[inside_N])

    def highest(self, value_N: Tensor) -> Tensor:
        """The same with the highest value of each sublayer's units."""
        return torch.where(self.are_N, self._most(value_N), value_N)

    def ranks(self, rank_N: Tensor) -> Tensor:
        """Ranks in which no unit stands above its sublayer, float64: of one sublayer the units by their own, and those
        of closed sublayers (ranks of at most 0) after all others."""
        rank_N = rank_N.double()
        of_N, places_N = rank_N[self.gate_N], rank_N.argsort(stable=True).argsort() / len(rank_N)
        level_N = of_N + 1e-9 * of_N.abs() * places_N  # which keeps the order of those above their sublayer
        joint_N = torch.where(self.inside_N & (rank_N > of_N), level_N, rank_N)
        span = 2.0 * float(rank_N.abs().max()) + 1.0
        return torch.where(self.inside_N & (of_N <= 0), joint_N - span, joint_N)

    def whole(self, rank_N: Tensor, largest: Callable[[Tensor], Tensor], in_order: bool) -> Tensor:
        """The kept set by ranks, where `largest` gives that of units by theirs. A sublayer that the budget would cut at
        its own rank, where all of it goes rather than a part, is closed, and other units have its room; `in_order`,
        where a smaller budget has to keep a subset, it is kept in part. Closed ones do not open for what little room is
        left, unless all others are whole."""
        rank_N = rank_N.double()
        last, closed_N = -float(rank_N.abs().max()) - 1.0, torch.zeros_like(self.are_N)
        while True:
            kept_N = largest(self.ranks(torch.where(closed_N, last, rank_N)))
            kept_N = self.open(kept_N | self.are_N)
            cut_N = self.inside_N & ~kept_N & (rank_N > rank_N[self.gate_N])
            cut_N = torch.zeros_like(closed_N).index_fill(0, self.gate_N[cut_N], True) & kept_N & ~closed_N
            if in_order or not cut_N.any():
                break
            closed_N |= cut_N
        shut_N = (closed_N | (self.are_N & (rank_N <= 0)))[self.gate_N]
        return kept_N if kept_N[~shut_N].all() else kept_N & ~shut_N

    def worth(self, value_N: Tensor, cost_N: Tensor) -> Tensor:
        """What units are worth for what they cost, and of sublayers their price."""
        density_N = value_N / torch.where(self.are_N, 1.0, cost_N)
        inside_N = self.inside_N
        order_N = torch.arange(len(value_N), device=value_N.device)[inside_N]
        for gate in self.are_N.nonzero().flatten().tolist():
            units_K = order_N[self.gate_N[inside_N] == gate]
            density_N[gate] = price(value_N[units_K], cost_N[units_K], float(value_N[gate]))
        return density_N

    def rescaled(self, before_N: Tensor, now_N: Tensor) -> Tensor:
        """Values as they are now, of sublayers in the proportion in which those of their units have changed."""
        ratio_N = self.sums(now_N) / self.sums(before_N).clamp(min=1e-30)
        return torch.where(self.are_N, before_N * ratio_N, now_N)

    def begun(self, inside_N: Tensor, density_N: Tensor) -> Tensor:
        """The gates that start open where these are in the budget: units of a sublayer that is not, too, if they are
        worth what others are that are. Their sublayer's gate says that they go."""
        units_N = inside_N & ~self.are_N
        least = density_N[units_N].min() if units_N.any() else float("inf")
        return inside_N | (self.inside_N & ~inside_N[self.gate_N] & (density_N >= least))


def price(value_K: Tensor, cost_K: Tensor, whole: float) -> float:
    """The price τ at which a sublayer may as well close: Σ_k min(value_k, τ cost_k) = `whole`, what it is worth as a
    whole. Where no price is that high, that of its best unit.

    For at a price τ of the budget, the sublayer that stays loses the value of the units that are not worth it, and pays
    τ cost_k for each of the others; the one that goes loses `whole`.
    """
    density_K, order_K = (value_K.double() / cost_K.double()).sort(stable=True)
    value_K, cost_K = value_K.double()[order_K], cost_K.double()[order_K]
    below_K = value_K.cumsum(0) - value_K
    dearer_K = cost_K.flip(0).cumsum(0).flip(0)
    reached_K = below_K + density_K * dearer_K >= whole
    if not reached_K.any():
        return float(density_K[-1])
    first = int(reached_K.byte().argmax())
    return float((whole - below_K[first]) / dearer_K[first])


def sublayers_of(groups: Sequence[Group]) -> Sublayers | None:
    """Where the gates of sublayers are; None where there are none beside those of units."""
    if not any(g.depth for g in groups):
        return None
    starts: dict[str, int] = {}
    start = 0
    for g in groups:
        starts[g.name] = start
        start += g.units
    parts = []
    for g in groups:
        own = torch.arange(starts[g.name], starts[g.name] + g.units)
        parts.append(torch.full_like(own, starts[g.depth]) if g.depth else own)
    gate_N = torch.cat(parts)
    inside_N = gate_N != torch.arange(len(gate_N))
    return Sublayers(gate_N, inside_N, torch.zeros_like(inside_N).index_fill(0, gate_N[inside_N], True))
