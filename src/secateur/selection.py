"""Which units a run prunes, as its options say it: `--units`, `--attention-unit`, `--keep`. Read without a model, for
`secateur prune`; what a model has of them, `describe` says.
"""

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from secateur.files import InputError
from secateur.policy import policy_of
from secateur.wanted import read_pick, read_sweep

if TYPE_CHECKING:
    from secateur.config import Config

Kind = Literal["heads", "channels", "expert_channels", "shared_channels", "attention", "mlp"]

Depth = Literal["off", "joint", "alone"]

SPOKEN: dict[str, tuple[str, ...]] = {
    "attention": ("heads",),
    "mlp": ("channels", "expert_channels", "shared_channels"),
}
"""Words for several kinds of units, or for those of attention whatever they are."""

AttentionUnit = Literal["kv-groups", "heads", "nested"]
"""What attention is divided into."""


def kept_words(keep: Collection[str]) -> tuple[str, ...]:
    """The layers and sublayers that `--keep` names. Raises InputError for what names none."""
    words = tuple(word for said in keep for word in said.replace(",", " ").split())
    for word in words:
        if not re.fullmatch(r"layers\.-?[0-9]{1,6}(\.(attention|mlp))?", word):
            raise InputError(
                f"--keep {word}: say layers.0, layers.-1 for the last one, layers.3.attention or layers.3.mlp"
            )
    return words


def _check_sources(c: "Config", scored_once: bool) -> None:
    """Raises InputError where gates cannot come from what is said, or not at the sizes."""
    if c.gates is not None and c.method != "deterministic":
        raise InputError(f"--gates are tuned as those of deterministic, so --method {c.method} contradicts it")
    if c.steps == 0 and (c.refit or c.recover):
        raise InputError("--refit and --recover need calibration text, of which --steps 0 reads none")
    if c.sweep is None:
        if c.pick is not None:
            raise InputError(f"--pick {c.pick} chooses among the sizes of a --sweep: say which, e.g. --sweep 0.1:0.6")
        return
    if c.pick is not None:
        read_pick(c.pick)
    if c.gates is not None:
        raise InputError("--sweep learns from the unpruned model, so --gates contradicts it")
    if scored_once or c.method == "grasprune":
        raise InputError(
            f"--method {c.method} ranks all units once, so it has no --sweep: say --sparsity, and then "
            "`secateur export RUN --sparsity` gives other sizes"
        )
    if c.steps <= len(sizes := read_sweep(c.sweep)):
        raise InputError(f"--steps {c.steps} are too few for {len(sizes)} sizes: each wants steps of its own")


def _check_depth(c: "Config", scored_once: bool) -> None:
    """Raises InputError for what contradicts sublayers that go whole."""
    if c.depth == "off":
        return
    policy = policy_of(c.shape)
    if policy.uniform or c.per in ("layer", "expert"):
        equal = f"--shape {policy}" if policy.uniform else f"--per {c.per}"
        raise InputError(
            f"--depth {c.depth} closes whole sublayers of some layers, and {equal} wants all equally wide; leave one "
            "of them out"
        )
    if c.depth == "alone" and c.attention_unit is not None:
        raise InputError(
            f"--depth alone leaves widths whole, so --attention-unit {c.attention_unit} contradicts it; leave it out, "
            "or use --depth joint"
        )
    unit_scores = c.method == "grasprune" or (scored_once and c.method != "sensitivity")
    if c.method == "flap" or (c.depth == "joint" and unit_scores):
        other = "deterministic or sensitivity" + (", or --depth alone" if c.method != "flap" else "")
        raise InputError(
            f"--method {c.method} has no scores for whole sublayers beside those of their units; use {other}"
        )


def check_selection(c: "Config", scored_once: bool) -> None:
    """Raises InputError for choices that contradict each other, or the shape, budget and method."""
    policy = policy_of(c.shape)
    _check_sources(c, scored_once)
    if c.keep and policy.uniform:
        raise InputError(f"--keep leaves layers wider than others, so --shape {policy} contradicts it")
    _check_depth(c, scored_once)
    if c.attention_unit is None:
        return
    if c.units and not {"heads", "attention"} & set(c.units):
        raise InputError(
            f"--units {' '.join(c.units)} leaves attention whole, so --attention-unit {c.attention_unit} contradicts "
            "it; leave one of them out"
        )
    if c.attention_unit != "nested":
        return
    if policy.uniform or c.per in ("layer", "expert"):
        equal = f"--shape {policy}" if policy.uniform else f"--per {c.per}"
        raise InputError(
            f"--attention-unit nested finds for each layer how many KV heads it needs, and {equal} wants equal widths; "
            "use kv-groups or heads"
        )
    if scored_once and c.method != "sensitivity":
        raise InputError(
            f"--method {c.method} scores units one by one, and those of --attention-unit nested lie inside each other; "
            "use kv-groups or heads"
        )
