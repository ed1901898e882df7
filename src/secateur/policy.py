"""What `--shape` says: how wide a layer may be, so that what is pruned runs fast, too. For `prune`, `plan`, `export`.

Kernels want widths that are multiples of their tiles, quantisation wants rows that divide into its groups, tensor
parallelism wants every layer to divide over its ranks. A policy is the list of widths that a group of units may have; a
budget then moves units between layers within these lists (budget.py) and is spent all the same.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import lcm
from typing import TYPE_CHECKING, Literal, get_args

from secateur.files import InputError

if TYPE_CHECKING:  # units.py packs experts by a policy; the command line reads one without torch
    from secateur.units import Group

ALIGNED = 8
"""Stored widths of experts are multiples of it where the dense width is: grouped matrix products want rows of a
multiple of 16 bytes, which are 8 values of bfloat16."""

Form = Literal["ragged", "uniform", "padded"]

WORDS = "ragged, uniform, padded, aligned:N (e.g. aligned:64) and tp:K (e.g. tp:2)"


@dataclass(frozen=True)
class Policy:
    """A shape, read from its words."""

    form: Form = "ragged"
    align: int = 1
    """N: channels are kept in multiples of it."""
    ranks: int = 1
    """K: every layer divides over so many ranks of tensor parallelism."""

    def __str__(self) -> str:
        """The words in their order, as plan.json and config.yaml have them."""
        words = [f"tp:{self.ranks}"] * (self.ranks > 1) + [f"aligned:{self.align}"] * (self.align > 1)
        return ",".join(words if words and self.form == "ragged" else [self.form, *words])

    @property
    def uniform(self) -> bool:
        """Whether all layers are equally wide."""
        return self.form == "uniform"

    @property
    def free(self) -> bool:
        """Whether it asks for nothing beyond its form."""
        return self.align == self.ranks == 1

    @property
    def said(self) -> str:
        """What it asks of widths, in words that go on from others."""
        multiples = f", channels in multiples of {self.align}" if self.align > 1 else ""
        return multiples + (f", all divisible over {self.ranks} ranks" if self.ranks > 1 else "")


RAGGED = Policy()


def policy_of(shape: str) -> Policy:
    """Reads words such as `tp:2,aligned:64`. Raises InputError for what is none, or contradicts itself."""
    forms: list[Form] = []
    numbers: dict[str, int] = {}
    for word in shape.split(","):
        name, _, number = (part.strip() for part in word.partition(":"))
        if found := [form for form in get_args(Form) if form == word.strip()]:
            forms += found
        elif name not in ("aligned", "tp"):
            raise InputError(f"--shape {shape}: {word.strip()!r} is no shape; there are {WORDS}")
        elif not re.fullmatch("[0-9]{1,9}", number) or int(number) < 1:
            what = ("channels", "32, 64 and 128") if name == "aligned" else ("ranks", "2 and 4")
            raise InputError(
                f"--shape {shape}: {name} takes a whole number of {what[0]}; the least is {name}:1, usual are {what[1]}"
            )
        elif name in numbers:
            raise InputError(f"--shape {shape} says {name} twice")
        else:
            numbers[name] = int(number)
    if len(forms) > 1:
        raise InputError(f"--shape {shape}: {forms[0]} contradicts {forms[1]}")
    if forms == ["padded"] and numbers:
        raise InputError(f"--shape {shape}: padded keeps just what each expert learned to keep, so it stands alone")
    return Policy(forms[0] if forms else "ragged", numbers.get("aligned", 1), numbers.get("tp", 1))


def alignment(width: int) -> int:
    """What stored widths of experts are multiples of, where the dense width is `width`."""
    return 1 if width % ALIGNED else ALIGNED


def _step(group: "Group", policy: Policy) -> int:
    """What widths of channels are multiples of."""
    return policy.ranks * lcm(policy.align, alignment(group.width) if group.experts else 1)


def permitted(group: "Group", policy: Policy) -> tuple[int, ...]:
    """The widths that a policy lets a group, or each of its experts, have, rising; beyond them 0, a closed sublayer.

    Channels: multiples of K × N, so that each rank has multiples of N, of experts also of K × their alignment; without
    N, the dense width, too, if it divides by K. Heads: what divides by K, and their keys too, unless K divides by the
    number of KV heads, which engines such as vLLM then replicate. Nested ones: what some number of the others permits
    (`permitted_pairs`).
    """
    ranks, width = policy.ranks, group.width
    if group.is_sublayer:  # whole, or gone
        keys = "num_key_value_heads"
        divides = all(_keys_divide(w, ranks) if key == keys else w % ranks == 0 for key, w in group.sizes)
        return (1,) if divides else ()
    if group.keys:
        return tuple(sorted({heads for _, heads in permitted_pairs(group, policy)}))
    if group.attends:
        a_unit = dict(group.sizes).get("num_attention_heads", 0) * (group.kv_heads or 1)
        keys_of = (lambda w: w) if group.kind == "kv_groups" else (lambda _: group.kv_heads or ranks)
        return tuple(w for w in range(1, width + 1) if w * a_unit % ranks == 0 and _keys_divide(keys_of(w), ranks))
    step = _step(group, policy)
    whole = (width,) if policy.align == 1 and width % step and width % ranks == 0 else ()
    return (*range(step, width + 1, step), *whole)


def _keys_divide(kv_heads: int, ranks: int) -> bool:
    """Whether so many KV heads can be divided or replicated over ranks."""
    return kv_heads % ranks == 0 or ranks % kv_heads == 0


def permitted_pairs(group: "Group", policy: Policy) -> frozenset[tuple[int, int]]:
    """How many KV heads, with how many query heads of each, a policy lets nested attention have."""
    pairs = product(range(1, group.kv_heads + 1), range(1, group.width + 1))
    return frozenset((k, q) for k, q in pairs if k * q % policy.ranks == 0 and _keys_divide(k, policy.ranks))


def check_permitted(policy: Policy, groups: Iterable["Group"], others: Iterable["Group"] = ()) -> None:
    """Raises InputError where a policy leaves a group no width, or one of the `others`, which stay whole, does not
    divide over its ranks."""
    groups, others = list(groups), list(others)
    present, whole = [*groups, *others], {g.name for g in others}

    def fits(g: "Group", shape: Policy) -> bool:
        return g.width in permitted(g, replace(shape, align=1)) if g.name in whole else bool(permitted(g, shape))

    wrong = next((g for g in present if not fits(g, policy)), None)
    if wrong is None:
        return
    instead = nearest(policy, lambda shape: all(fits(g, shape) for g in present), present)
    if wrong.name in whole:
        kind = "heads" if wrong.attends else wrong.kind
        pruned = any(("heads" if g.attends else g.kind) == kind for g in groups)
        remedy = f"take layers.{wrong.layer} out of --keep" if pruned else f"add {kind} to --units"
        reason = f"{wrong.name} stays whole, and {_said(wrong)} do not divide over {policy.ranks} ranks"
        raise InputError(f"--shape {policy}: {reason}; {remedy}, or {instead}")
    if wrong.is_sublayer:
        widths = " and ".join(str(width) for _, width in wrong.sizes)
        reason = f"{wrong.name} is kept whole or not at all, and {widths} do not divide over {policy.ranks} ranks"
    elif fits(wrong, replace(policy, align=1)):
        over = f" on each of {policy.ranks} ranks" if policy.ranks > 1 else ""
        reason = f"{wrong.name} has {wrong.width} channels, fewer than {_step(wrong, policy) // policy.ranks}{over}"
    else:
        reason = f"neither {_said(wrong)} of {wrong.name} nor fewer divide over {policy.ranks} ranks"
    raise InputError(f"--shape {policy}: {reason}; {instead}")


def nearest(policy: Policy, works: Callable[[Policy], bool], groups: Iterable["Group"]) -> str | None:
    """What to say instead of a policy that does not work for `groups`: the shape with the nearest N that works (first
    of multiples of `ALIGNED`), else with the nearest K, the smaller one of two; without either where no other does.
    None: that does not work, too."""
    most = max(g.width * dict(g.sizes).get("num_attention_heads", 1) * (g.kv_heads or 1) for g in groups)

    def others() -> Iterator[Policy]:
        for n in _around(policy.align, most, ALIGNED):
            yield replace(policy, align=n)
        for k in _around(policy.ranks, most):
            yield replace(policy, ranks=k)
        yield replace(policy, align=1, ranks=1)

    found = next(filter(works, others()), None)
    return None if found is None else f"the nearest that works is --shape {found}"


def _around(number: int, most: int, step: int = 1) -> list[int]:
    """Other numbers from 2 on, by their distance; first the multiples of `step`."""
    found = range(2, min(2 * number, most + 1)) if number > 1 else ()
    return sorted((n for n in found if n != number), key=lambda n: (n % step > 0, abs(n - number)))


def _said(group: "Group") -> str:
    """The dense width in words."""
    if group.attends:
        if not group.writes:
            return f"the {group.width} KV heads"
        groups = group.kv_heads or (group.width if group.kind == "kv_groups" else 0)
        heads = group.units * dict(group.sizes).get("num_attention_heads", 1)
        return f"the {heads} heads" + (f" in {groups} groups" if groups else "")
    return f"the {group.width} channels"
