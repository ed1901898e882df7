"""What a model holds that can be pruned, as tables: `secateur inspect MODEL`, from the configuration alone; and how a
mixture routes a text, for which it must be loaded.

Shape suffixes: N rows of tokens, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from transformers import PreTrainedConfig

from secateur.budget import figures
from secateur.describe import Description, experts_a_token
from secateur.evaluate import windows
from secateur.files import InputError
from secateur.importance_experts import read, watching_experts
from secateur.load import load
from secateur.text import evaluation_text, local_files
from secateur.units import unit_params

COLUMNS = ("units", "layers", "units a layer", "parameters a unit", "parameters", "share of model")
WINDOWS, LENGTH = 16, 512
"""Text that routing is counted on, windows × tokens; fewer where the text is shorter."""


def units_table(name: str, description: Description, config: PreTrainedConfig) -> Table:
    """A row for all groups that are alike."""
    table = Table(title=title(name, description, config), title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("units", "layers") else "right")
    for row in unit_rows(description):
        table.add_row(*row)
    return table


def title(name: str, description: Description, config: PreTrainedConfig) -> str:
    """What a model is, in a line."""
    sizes = figures(description, None, 1)
    said = f"{name}: {config.model_type}, {config.num_hidden_layers} layers, {sizes.parameters:,} parameters"
    if sizes.active_parameters != sizes.parameters:
        said += f", {sizes.active_parameters:,} active a token ({experts_a_token(config)} experts a layer, evenly used)"
    return said


def unit_rows(description: Description) -> list[tuple[str, ...]]:
    """A row for all groups that are alike, of COLUMNS."""
    total = figures(description, None, 1).parameters
    found: list[tuple[str, ...]] = []
    rows: dict[tuple[str, int, int, int], list[int]] = {}
    for g in description.groups:
        rows.setdefault((g.kind, g.experts, g.width, unit_params(g, description.shapes)), []).append(g.layer)
    for (kind, experts, width, params), layers in rows.items():
        count = len(layers) * (experts or 1) * width * params
        units = f"{experts} × {width:,}" if experts else f"{width:,}"
        found.append((kind, _ranges(layers), units, f"{params:,}", f"{count:,}", f"{count / total:.1%}"))
    return found


def refusals(description: Description) -> list[str]:
    """A line for each reason for which something stays whole."""
    reasons: dict[str, list[str]] = {}
    for refusal in description.refusals:
        reasons.setdefault(refusal.reason, []).append(refusal.where)
    more = {reason: f" and {len(places) - 1} more" if len(places) > 1 else "" for reason, places in reasons.items()}
    return [f"stays whole: {places[0]}{more[reason]}: {reason}" for reason, places in reasons.items()]


@dataclass(frozen=True)
class Routing:
    """How a layer's router spread a text over its experts."""

    layer: int
    share_E: tuple[float, ...]
    """Share of the tokens' choices that fell on each expert."""

    @property
    def effective(self) -> float:
        """exp of the entropy of the shares: the number of experts if all were used alike."""
        share_E = torch.tensor(self.share_E)
        return float(torch.exp(-torch.special.xlogy(share_E, share_E).sum()))


def routing(name: str, data: str, device: str = "auto", trust_remote_code: bool = False) -> tuple[list[Routing], int]:
    """Routing of the first windows of a text, by layer, and how many tokens that were. InputError without experts."""
    local_files(data)  # a wrong path shows before a large model is loaded
    loaded = load(name, device, "auto", trust_remote_code)
    groups = tuple(g for g in loaded.description.groups if g.experts)
    if not groups:
        raise InputError(f"{name} has no fused experts, so there is no routing to count; leave --data out")
    text = evaluation_text(data, characters=WINDOWS * LENGTH * 12)
    tokens_T = loaded.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    ids_NT = windows(tokens_T, WINDOWS, min(LENGTH, len(tokens_T)), data).to(loaded.model.device)
    with watching_experts(loaded.model, groups) as usage:
        read(loaded.model, ids_NT)
    shares = {g.layer: usage[g.name].tokens_E / usage[g.name].tokens_E.sum() for g in groups}
    return [Routing(layer, tuple(share_E.tolist())) for layer, share_E in shares.items()], ids_NT.numel()


def routing_table(found: Sequence[Routing], tokens: int, data: str) -> Table:
    """A row a layer."""
    table = Table(title=f"routing of {tokens:,} tokens of {data}", title_justify="left")
    for column in ("layer", "experts", "busiest", "idlest", "never chosen", "used as if"):
        table.add_column(column, justify="right")
    for r in found:
        count, unused = len(r.share_E), sum(share == 0 for share in r.share_E)
        busiest, idlest = (f"{pick(r.share_E) * count:.2f} ×" for pick in (max, min))
        table.add_row(str(r.layer), str(count), busiest, idlest, str(unused), f"{r.effective:.1f}")
    table.caption = "busiest, idlest: times an even share; used as if: as many evenly used experts (entropy)"
    return table


def _ranges(layers: Sequence[int]) -> str:
    """[0, 1, 2, 5] → `0–2, 5`."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    return ", ".join(f"{s[0]}–{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)
