"""Programs that run an exported checkpoint, and whether they say the same. `secateur verify RUN --runtime llamacpp`.

Each module here is a runtime, with `greedy(model, prompts, new_tokens)` and `version()`: most likely tokens one by one,
through ends of text, and what each was held to be worth. `hf.py`, transformers in float32, is the reference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Continuation:
    """What a runtime wrote after a prompt."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    """Natural logarithm of the probability that each token had, under the model itself."""
    margins: list[float] = field(default_factory=list)
    """How much more than the second best it was worth; only the reference has to say so."""


@dataclass(frozen=True)
class Agreement:
    """How far another runtime writes what the reference writes after the same prompt."""

    equal: bool
    """Whether all tokens are the same."""
    same: int
    """Tokens before the two part; behind it they run on different texts."""
    difference: float
    """Largest difference of a log-probability before they part."""
    tokens: tuple[int, int] | None = None
    """What each wrote where they part: the reference, the other."""
    logprobs: tuple[float, float] | None = None
    """What each held its own token to be worth there."""
    margin: float = 0.0
    """What the reference held its token to be worth there above the second best: nearly 0 is a near-tie."""


def compare(reference: Sequence[Continuation], other: Sequence[Continuation]) -> list[Agreement]:
    """Compares continuations of the same prompts, prompt by prompt."""
    return [_agreement(one, two) for one, two in zip(reference, other, strict=True)]


def _agreement(one: Continuation, two: Continuation) -> Agreement:
    assert one.prompt == two.prompt and len(one.tokens) == len(two.tokens), "not continuations of one prompt"
    pairs = list(zip(one.tokens, two.tokens, strict=True))
    same = next((place for place, (own, others) in enumerate(pairs) if own != others), len(pairs))
    differences = [abs(a - b) for a, b in zip(one.logprobs[:same], two.logprobs[:same], strict=True)]
    largest = math.nan if any(math.isnan(d) for d in differences) else max(differences, default=0.0)
    if same == len(pairs):
        return Agreement(True, same, largest)
    there = one.logprobs[same], two.logprobs[same]
    return Agreement(False, same, largest, pairs[same], there, one.margins[same])
