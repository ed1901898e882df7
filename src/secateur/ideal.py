"""What a model costs on paper, and what keeps a measured speed-up from being as large as pruning's share.

Prefill is bound by multiplications, decoding by the bytes it reads: so each has an ideal of its own, from two
checkpoints' configurations alone. Both models' output heads are whole, and so is much else: `eaten` says how much of
the dense model's time goes there. Serves `secateur bench RUN`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from secateur.budget import figures
from secateur.describe import Description

HEAD, MAPS, CONTEXT = "output head", "layers' maps", "attention over the context"
"""Parts of a model that have a price on paper; workers/hf.py times them, too."""

UNPRICED = "kernels, scheduling, dispatch"
"""What is measured beyond the price on paper, where no part was timed."""

ODD = (64, 32)
"""Widths that are no multiples of these are named: kernels work on blocks of them."""


@dataclass(frozen=True)
class Cost:
    """A model on paper."""

    parameters: int
    maps: tuple[tuple[int, float], ...]
    """Of each linear map in the layers its weights, and the share that a token meets: of experts less than 1."""
    head: int
    """Weights of maps outside the layers."""
    context_columns: int
    """Σ heads × head size over the layers: what attention multiplies by for each token of context, twice."""
    kv_values: int
    """Values that the KV cache holds for a token."""
    widths: Mapping[str, int]
    """Group of units → how many columns its writer has: heads × head size, channels."""

    def flops(self, batch: int, tokens: int, context: float | None = None) -> dict[str, float]:
        """Of `tokens` of each of `batch` sequences, by part. Each token sees `context` others, where these are a prompt
        those before it; the head sees only the last one of each sequence."""
        seen = (tokens + 1) / 2 if context is None else context
        return {
            MAPS: 2.0 * batch * tokens * sum(weights * share for weights, share in self.maps),
            HEAD: 2.0 * batch * self.head,
            CONTEXT: 4.0 * batch * tokens * self.context_columns * seen,
        }

    def bytes_read(self, batch: int, context: float, weight_bytes: float, kv_bytes: float) -> dict[str, float]:
        """Of a step of decoding after `context` tokens, by part. Of experts those that even routing would reach."""
        met = sum(weights * (1.0 - (1.0 - share) ** batch) for weights, share in self.maps)
        return {
            MAPS: weight_bytes * met,
            HEAD: weight_bytes * self.head,
            CONTEXT: kv_bytes * batch * context * self.kv_values,
        }


def cost_of(description: Description) -> Cost:
    """What the model of a description costs."""
    inside = f"{description.layers}."
    maps = [(prod(description.shapes[n]), share, n.startswith(inside)) for n, share in description.matmuls.items()]
    groups = [g for g in (*description.groups, *description.others) if g.writes]
    widths = {g.name: description.shapes[g.writer][g.writer_slice.dim] for g in groups}
    sizes = figures(description, None, 1)
    return Cost(
        sizes.parameters,
        tuple((weights, share) for weights, share, within in maps if within),
        sum(weights for weights, _, within in maps if not within),
        sum(widths[g.name] for g in groups if g.attends),
        sizes.kv_bytes_per_token,
        widths,
    )


@dataclass(frozen=True)
class Ideal:
    """What a phase would gain if time went as its FLOPs, or as its bytes."""

    by: str
    """Which of the two binds: `flops` for prefill, `bytes` for decoding."""
    flops: float
    bytes: float
    kept: float
    """Share of the layers' FLOPs or bytes that pruning left: what all time would shrink to if it were all theirs."""
    parts: Mapping[str, Mapping[str, float]]
    """`dense` and `pruned` → FLOPs or bytes of each part."""

    @property
    def speedup(self) -> float:
        """By what binds."""
        return self.flops if self.by == "flops" else self.bytes


def ideals(
    dense: Cost, pruned: Cost, batch: int, prompt_tokens: int, new_tokens: int, weight_bytes: float, kv_bytes: float
) -> dict[str, Ideal]:
    """Phase → its ideal at a batch size."""
    costs, after = {"dense": dense, "pruned": pruned}, prompt_tokens + (new_tokens + 1) / 2
    found = {}
    for phase, by, tokens, seen, cached in (
        ("prefill", "flops", prompt_tokens, None, 0.0),
        ("decode", "bytes", 1, after, after),
    ):
        flops = {name: c.flops(batch, tokens, seen) for name, c in costs.items()}
        read = {name: c.bytes_read(batch * tokens, cached, weight_bytes, kv_bytes) for name, c in costs.items()}
        parts = flops if by == "flops" else read
        kept = parts["pruned"][MAPS] / parts["dense"][MAPS]
        found[phase] = Ideal(by, _ratio(flops), _ratio(read), kept, parts)
    return found


def _ratio(parts: Mapping[str, Mapping[str, float]]) -> float:
    return sum(parts["dense"].values()) / sum(parts["pruned"].values())


@dataclass(frozen=True)
class Eaten:
    """Where the pruned model's time goes beyond the share that pruning left of the layers."""

    time: float
    """Pruned model's time over the dense model's, as measured."""
    kept: float
    """What it would be if all time were the layers' maps', and went as their FLOPs or bytes."""
    by: Mapping[str, float]
    """Part → share of the dense model's time; the sum is `time` − `kept`."""


def eaten(speedup: float, ideal: Ideal, seconds: Mapping[str, Mapping[str, float]] | None) -> Eaten:
    """What eats the difference: by the seconds that each part took, or else by what it costs on paper.

    A part i of the dense time that takes d_i, and p_i when pruned, eats p_i − kept × d_i. On paper, what a part costs
    stands for its time, and what is measured beyond all parts' cost has no name but its own.
    """
    time, kept = 1.0 / speedup, ideal.kept
    if seconds is not None:
        shares = {name: _normalised(parts) for name, parts in seconds.items()}
        by = {part: time * shares["pruned"][part] - kept * share for part, share in shares["dense"].items()}
        return Eaten(time, kept, by)
    whole = sum(ideal.parts["dense"].values())
    dense, pruned = ideal.parts["dense"], ideal.parts["pruned"]
    by = {part: (pruned[part] - kept * dense[part]) / whole for part in (HEAD, CONTEXT)}
    return Eaten(time, kept, by | {UNPRICED: time - 1.0 / ideal.speedup})


def _normalised(parts: Mapping[str, float]) -> dict[str, float]:
    whole = sum(parts.values())
    return {part: seconds / whole for part, seconds in parts.items()}


def odd_widths(cost: Cost) -> dict[int, dict[str, int]]:
    """Block size → the groups whose width is no multiple of it, with the width; closed ones have none."""
    return {block: {name: width for name, width in cost.widths.items() if width % block} for block in ODD}
