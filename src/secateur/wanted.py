"""What `--budget` says, read: `params=0.7`, `bytes=200MB`; and `--sweep`, `--pick`. What the kinds count is costs.py's
business.

The command line and config.yaml read the words before torch is imported, and before any model is known.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from secateur.files import InputError

KINDS = {
    "units": "parameters in units",
    "params": "parameters a token meets",
    "total-params": "parameters",
    "flops": "FLOPs a token",
    "kv": "bytes of KV cache a token",
    "bytes": "bytes of weights",
    "latency": "microseconds to the next token",
    "prefill-latency": "microseconds to the first token",
}
"""Kind → what it counts, in words."""

TIMES = ("latency", "prefill-latency")
"""Kinds that a table of measured times says (latency.py)."""

_BYTES = ("kv", "bytes")
_MICROSECONDS = {"": 1, "us": 1, "µs": 1, "ms": 10**3, "s": 10**6}
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Wanted:
    """One budget: at most a share of what the unpruned model has, or at most a figure."""

    kind: str
    value: str
    """As it was said."""
    share: Fraction | None
    figure: int | None
    batch: int | None = None
    """Of times: sequences at once; None: as many as the table says first."""

    def __str__(self) -> str:
        """The words."""
        return f"{self.name}={self.value}"

    @property
    def name(self) -> str:
        """The kind, and the batch size if there is one: `latency@8`."""
        return self.kind if self.batch is None else f"{self.kind}@{self.batch}"

    @property
    def counts(self) -> str:
        """What it counts, in words."""
        return KINDS[self.kind]

    def most(self, dense: Fraction) -> int:
        """The most that may be left of `dense`, in whole numbers."""
        if self.figure is not None:
            return self.figure
        assert self.share is not None
        return int(self.share * dense)

    def instead(self, figure: int, dense: Fraction, less: bool = False) -> str:
        """Words, in the form of these, for a budget that allows `figure` of `dense`; with `less`, no more than it."""
        if self.share is not None:
            thousandths = 1000 * figure / dense
            return f"{self.name}={(int(thousandths) if less else ceil(thousandths)) / 1000:g}"
        return f"{self.name}={figure}{'us' if self.kind in TIMES else ''}"


def read_budgets(words: Iterable[str]) -> tuple[Wanted, ...]:
    """Reads the words of `--budget`. Raises InputError for what is none, or says the same kind twice."""
    found: dict[str, Wanted] = {}
    for word in words:
        wanted = _read(word)
        if wanted.name in found:
            raise InputError(f"--budget {found[wanted.name]} contradicts --budget {wanted}: say {wanted.name} once")
        found[wanted.name] = wanted
    return tuple(found.values())


def what_is_asked(
    sparsity: float | None, words: Iterable[str], has_table: bool = False, sweep: str | None = None
) -> tuple[float | None, tuple[str, ...]]:
    """`--sparsity` and `--budget`, checked and in their plainest form: a share of the units becomes a sparsity.

    Raises InputError where nothing is asked for, or the same twice, or a time and there is no table of times. With a
    `sweep` budgets hold for all of its sizes.
    """
    if sweep is not None:
        if sparsity is not None:
            raise InputError(f"--sweep {sweep} says all sizes, so --sparsity {sparsity:g} contradicts it")
        for size in read_sweep(sweep):
            what_is_asked(*asked_by(size, words), has_table)
        return None, tuple(map(str, read_budgets(words)))
    if sparsity is None and not words:
        raise InputError("sparsity: say what to remove, e.g. --sparsity 0.2, or what to keep, e.g. --budget params=0.8")
    if sparsity is not None and not 0 < sparsity < 1:
        raise InputError(f"--sparsity must lie between 0 and 1, not {sparsity}: it is the share to remove")
    wanted = read_budgets(words)
    if timed := [each for each in wanted if each.kind in TIMES and not has_table]:
        raise InputError(
            f"--budget {timed[0]} needs --latency-table FILE, which `secateur bench MODEL --table FILE` measures on "
            "the machine, and in the runtime, that the pruned model is for"
        )
    units = next((each for each in wanted if each.kind == "units"), None)
    if sparsity is not None and units is not None:
        raise InputError(f"--sparsity {sparsity:g} contradicts --budget {units}: both are of the units' parameters")
    if units is not None and units.share is not None:
        return float(1 - units.share), tuple(str(each) for each in wanted if each is not units)
    return sparsity, tuple(map(str, wanted))


SWEPT = Fraction(1, 10)
"""Between the sizes of a sweep, where nothing else is said."""


def read_sweep(said: str) -> tuple[str, ...]:
    """The sizes of `--sweep`, from the largest model to the smallest, as sparsities (`0.2`) or words of `--budget`
    (`params=0.8`). Raises InputError for what is none."""
    kind, _, values = (part.strip() for part in said.rpartition("="))
    first, *more = [part.strip() for part in values.replace(":", ",").split(",")]
    try:
        # no exponents, which would be written out
        numbers = [Fraction(part) for part in (first, *more) if re.fullmatch(r"[0-9./+-]{1,20}", part)]
    except (ValueError, ZeroDivisionError):
        numbers = []
    numbers = numbers if len(numbers) == 1 + len(more) else []
    spans = ":" in values
    if (kind and kind not in KINDS) or not 2 <= len(numbers) <= (3 if spans else 99) or (spans and "," in values):
        raise InputError(
            f"--sweep {said}: say 0.1:0.6 for sizes 0.1 apart, 0.1:0.6:0.05, or 0.2,0.35,0.5; or shares to keep of "
            "what a budget counts, params=0.9:0.5"
        )
    if spans:
        start, end, step = numbers if len(numbers) == 3 else (*numbers, SWEPT)
        if step <= 0 or start == end or abs(end - start) / step > 99:
            raise InputError(f"--sweep {said}: from {first} to {more[0]} in steps of {float(step):g} are no sizes")
        count = ceil(abs(end - start) / step)
        numbers = [start + (end - start) / abs(end - start) * step * n for n in range(count)] + [end]
    if len(set(numbers)) < len(numbers) or not all(0 < number < 1 for number in numbers):
        raise InputError(f"--sweep {said}: sizes are different shares between 0 and 1")
    return tuple(f"{kind}={float(n):g}" if kind else f"{float(n):g}" for n in sorted(numbers, reverse=bool(kind)))


@dataclass(frozen=True)
class Condition:
    """What `--pick` asks of a size."""

    kind: str
    """`loss`, `perplexity`, `time`, or what budgets count."""
    most: float
    """Times what the unpruned model has."""


PICKED = ("loss", "perplexity", "time", *KINDS)


def read_pick(said: str) -> tuple[Condition, ...]:
    """The conditions of `--pick`. Raises InputError for what is none."""
    found = []
    for word in said.split(","):
        match = re.fullmatch(r"\s*([a-z-]+)\s*<=\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*", word)
        if match is None or match[1] not in PICKED:
            raise InputError(
                f"--pick {said}: say what may be left of the unpruned model's at most, e.g. loss<=1.05 or "
                f"perplexity<=1.3,params<=0.8; there are {', '.join(PICKED)}"
            )
        found.append(Condition(match[1], float(match[2])))
    return tuple(found)


def asked_by(size: str, words: Iterable[str]) -> tuple[float | None, tuple[str, ...]]:
    """The sparsity and budgets of one size of a sweep."""
    return (None, (size, *words)) if "=" in size else (float(size), tuple(words))


def _read(word: str) -> Wanted:
    kind, _, value = (part.strip() for part in word.partition("="))
    kind, at, batch = kind.partition("@")
    if kind not in KINDS:
        raise InputError(f"--budget {word}: {kind!r} is no budget; there are {', '.join(KINDS)}, e.g. params=0.7")
    if at and (kind not in TIMES or not re.fullmatch("[1-9][0-9]{0,8}", batch)):
        raise InputError(f"--budget {word}: a batch size stands behind a time only, e.g. latency@8=0.7")
    found = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})\s*([a-zµ]*)", value.lower())
    factor = None if found is None else _factor(kind, found[2])
    bare = found is not None and not found[2]
    if found is None or factor is None or (bare and kind in TIMES and Fraction(found[1]) >= 1):
        example = {"kv": "10KB", "bytes": "200MB", "flops": "150M"}.get(kind, "12ms" if kind in TIMES else "90M")
        raise InputError(f"--budget {word}: {value!r} is neither a share such as 0.7 nor a figure such as {example}")
    number, size = Fraction(found[1]) * factor, int(batch) if at else None
    if bare and 0 < number < 1:
        return Wanted(kind, value, number, None, size)
    if number <= 1:
        raise InputError(f"--budget {word}: a share to keep lies between 0 and 1, a figure above 1")
    return Wanted(kind, value, None, int(number), size)


def _factor(kind: str, suffix: str) -> int | None:
    """What a suffix multiplies by; None for one that the kind has not."""
    if kind in TIMES:
        return _MICROSECONDS.get(suffix)
    if kind in _BYTES:
        return (_DECIMAL | _BINARY).get(suffix.removesuffix("b"))
    if kind == "flops":
        return _DECIMAL.get(re.sub("flops?$", "", suffix))
    return (_DECIMAL | {"b": 10**9}).get(suffix)
