"""KV heads and query heads of a layer that are kept together: `--attention-unit nested`, wherever a kept set is chosen.

A layer keeps k of its KV heads and q query heads of each: kernels want as many of each. From nothing, a path leads to
all of them, by one more KV head (with its q best query heads) or one more query head of each KV head that is there,
whichever is worth more a parameter. The budget then takes the steps of all layers' paths by their worth, each path in
its order: what a step costs is exact, and a smaller budget keeps a subset.

Shape suffixes: K KV heads of a layer, Q query heads of each.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Pair:
    """The nested attention of a layer, as places among all units."""

    keys: slice
    """KV heads."""
    heads: slice
    """Query heads, one KV head's after the other's."""
    permitted: frozenset[tuple[int, int]]
    """How many KV heads, and query heads of each, there may be."""


class Steps(NamedTuple):
    """With which step of the path each head comes, from 0 on; −1: never."""

    keys_K: torch.Tensor
    heads_KQ: torch.Tensor


def path(
    rank_K: torch.Tensor, rank_KQ: torch.Tensor, cost: tuple[float, float], permitted: Collection[tuple[int, int]]
) -> Steps:
    """The path by ranks (what a parameter is worth) and the parameters of a KV head and of a query head."""
    rank_KQ, order_KQ = rank_KQ.sort(dim=1, descending=True, stable=True)
    worth_K = cost[0] * rank_K.double()
    worth_KQ = worth_K[:, None] + cost[1] * rank_KQ.double().cumsum(1)  # with the best query heads, 1 and up
    steps = Steps(torch.full(rank_K.shape, -1), torch.full(rank_KQ.shape, -1))
    chosen: list[int] = []
    queries = number = 0
    while True:
        there = float(worth_KQ[chosen, queries - 1].sum()) if chosen else 0.0
        before = len(chosen) * (cost[0] + queries * cost[1])
        best: tuple[float, list[int], int] | None = None
        for keys, more in sorted(_next(len(chosen), queries, permitted)):
            left = [k for k in worth_KQ[:, more - 1].argsort(descending=True, stable=True).tolist() if k not in chosen]
            then = [*chosen, *left[: keys - len(chosen)]]
            gain = float(worth_KQ[then, more - 1].sum()) - there
            density = gain / (keys * (cost[0] + more * cost[1]) - before)
            if best is None or density > best[0]:
                best = density, then, more
        if best is None:
            return steps
        _, chosen, queries = best
        for k in chosen:
            steps.keys_K[k] = number if steps.keys_K[k] < 0 else steps.keys_K[k]
            now_Q = order_KQ[k, :queries]
            steps.heads_KQ[k, now_Q] = torch.where(steps.heads_KQ[k, now_Q] < 0, number, steps.heads_KQ[k, now_Q])
        number += 1


def _next(keys: int, queries: int, permitted: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
    """Where a path can go on to: from nothing, to all that has nothing permitted below it."""
    if not keys:
        above = set(permitted)
        return {p for p in above if not any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in above)}
    more_keys = [(k, q) for k, q in permitted if q == queries and k > keys]
    more_queries = [(k, q) for k, q in permitted if k == keys and q > queries]
    return {min(options) for options in (more_keys, more_queries) if options}
