"""`--guard`: texts whose loss must stay near the unpruned model's while gates are learned on another text.

For `learn`, which holds the bounds, and `eval`, which says whether they were held. Each guard is an inequality,
L(gates) − L(dense) ≤ tolerance, whose multiplier weighs the guard's loss beside the calibration text's. Multipliers
move by factors, as far as the bound is missed for its own size: the same for every model, loss and number of steps.
How far it is missed each step's batch says; but what is learned from says less and less of what is not. So some rows
of other documents are measured now and then, and how much more they say is added.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import exp, log

from secateur.files import InputError

MOST = 16.0
"""The largest multiplier; the least is its inverse. Beyond it the calibration text would hardly be heard any more."""

RANGE_IN = 0.25
"""Share of the learning steps in which a multiplier that is pushed all along goes from 1 to `MOST`."""

MEMORY = 0.9
"""Weight of the past in the running mean of what a guard's batches say."""

LOOKS = 5
"""Times in a run that held-out rows are measured."""

LOOKED_AT = 4
"""Of so many calibration rows of the run, one held-out row is measured each time, if there are as many: all of them but
in short runs, where six of sixteen rows said 0.2 nats and all of them 0.31."""


@dataclass(frozen=True)
class Guard:
    """One text and its bound."""

    data: str
    tolerance: float
    """Nats a token that its loss may rise by."""

    def __str__(self) -> str:
        """The word."""
        return f"{self.data}:{self.tolerance:g}"


def read_guards(words: Iterable[str]) -> tuple[Guard, ...]:
    """Reads the words of `--guard`. Raises InputError for what is none, or names a text twice."""
    found: dict[str, Guard] = {}
    for word in words:
        data, _, tolerance = word.rpartition(":")
        try:
            guard = Guard(data, float(tolerance))
        except ValueError:
            guard = Guard(data, 0.0)
        if not data or not 0 < guard.tolerance < float("inf"):
            raise InputError(
                f"--guard {word}: say a text and by how many nats a token its loss may rise, above 0, e.g. code/:0.1"
            )
        if data == "self":
            raise InputError(f"--guard {word}: a guard is a text of its own; give a file, a folder or a hub dataset")
        if data in found:
            raise InputError(f"--guard {found[data]} contradicts --guard {word}: name {data} once")
        found[data] = guard
    return tuple(found.values())


@dataclass
class Multipliers:
    """What the guards weigh while gates are learned."""

    guards: Sequence[Guard]
    steps: int
    """Of the learning run."""
    weights: list[float] = field(default_factory=list)
    """Of each guard's loss; the calibration text's is 1."""
    rises: list[float] = field(default_factory=list)
    """Running means of how far each guard's batches' loss is above the unpruned model's, nats a token."""
    gaps: list[float] = field(default_factory=list)
    """How much further it is on held-out rows."""

    def __post_init__(self) -> None:
        self.weights = self.weights or [1.0] * len(self.guards)
        self.gaps = self.gaps or [0.0] * len(self.guards)

    def looks_after(self, step: int) -> bool:
        """Whether held-out rows are measured after this step."""
        return bool(self.guards) and step % max(1, self.steps // LOOKS) == 0

    def look(self, held_out: Sequence[float]) -> None:
        """Takes in how far the loss of held-out rows is above the unpruned model's."""
        self.gaps = [now - rise for now, rise in zip(held_out, self.rises, strict=True)]

    def hear(self, rises: Sequence[float]) -> None:
        """Takes in what a step's batches say, and moves the weights."""
        self.rises = [
            MEMORY * before + (1.0 - MEMORY) * now for before, now in zip(self.rises or rises, rises, strict=True)
        ]
        stride = log(MOST) / max(1.0, RANGE_IN * self.steps)
        for g, guard in enumerate(self.guards):
            rise = self.rises[g] + self.gaps[g]
            missed = min(1.0, max(-1.0, rise / guard.tolerance - 1.0))
            self.weights[g] = min(MOST, max(1.0 / MOST, self.weights[g] * exp(stride * missed)))

    def state(self) -> dict[str, list[float]]:
        """JSON-able, exactly."""
        return {"weights": list(self.weights), "rises": list(self.rises), "gaps": list(self.gaps)}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Takes over what `state` gave."""
        found = [list(map(float, state[name])) for name in ("weights", "rises", "gaps")]
        if {len(found[0]), len(found[2]), len(found[1] or self.guards)} != {len(self.guards)}:
            raise ValueError(f"it has multipliers of other than {len(self.guards)} guards")
        self.weights, self.rises, self.gaps = found
