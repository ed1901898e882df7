"""Proof that the export is the gated model: both run on real text, and their logits must agree.

Serves `secateur verify RUN`. In float32 the two differ by rounding only, which a badly damaged model can amplify: where
the difference is larger than it is as a rule, the gated model in float64 tells how much of it is rounding. In the
export's own dtype the folded weights are rounded, so there, too, the yardstick is the noise of the dtype itself.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.attach import writer
from secateur.slicing import fold, fold_norm
from secateur.units import Group, by_writer

FLOAT32_TOLERANCE = 1e-5
"""Largest difference of a float32 logit, relative to the largest logit where that is above 1."""

NOISE_FACTOR = 4.0
"""Mean difference allowed, in units of the dtype's own noise on the gated model, where that is the yardstick."""


@dataclass(frozen=True)
class Comparison:
    """Logits of the gated and of the exported model on the same tokens."""

    dtype: str
    max_difference: float
    mean_difference: float
    allowed: float
    """Bound on `max_difference` in float32, on `mean_difference` where noise is the yardstick."""
    same_top_token: float
    """Share of positions at which both models predict the same token."""
    tokens: int
    passed: bool


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids_NT: torch.Tensor) -> torch.Tensor:
    """Logits on the CPU, float32, shape (N, T, vocabulary)."""
    device = next(model.parameters()).device
    return torch.cat([model(row.to(device), use_cache=False).logits.float().cpu() for row in ids_NT.split(1)])


def compare(gated_NTV: torch.Tensor, exported_NTV: torch.Tensor, dtype: str, noise: float | None = None) -> Comparison:
    """Compares logits; `noise`: the mean difference that the dtype makes on the gated model, None: the fixed bound.

    Logits that are not finite in both never pass.
    """
    difference = (gated_NTV - exported_NTV).abs()
    largest, mean = difference.max().item(), difference.mean().item()
    allowed = FLOAT32_TOLERANCE * max(1.0, gated_NTV.abs().max().item()) if noise is None else NOISE_FACTOR * noise
    measured = largest if noise is None else mean
    same = (gated_NTV.argmax(-1) == exported_NTV.argmax(-1)).float().mean().item()
    passed = measured <= allowed < math.inf
    return Comparison(dtype, largest, mean, allowed, same, gated_NTV.shape[:2].numel(), passed)


def with_weights_in(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model, its weights cast in place. Buffers stay: rotary frequencies are float32 in a bfloat16 model, too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@contextmanager
def folded(
    model: nn.Module,
    groups: Sequence[Group],
    gates: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    biases: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[None]:
    """Within the context gates are folded into the writers' weights, rounded to `dtype` as the export rounds them.

    So are `biases` into the writers' biases.
    """
    behind = [(g, model.get_submodule(g.after)) for g in groups if g.is_sublayer and g.after]
    norms = [(g, own, p) for g, norm in behind for own, p in norm.named_parameters()]
    before_norms = [(p, p.data) for _, _, p in norms]
    for group, name, p in norms:
        p.data = fold_norm(p.data, group, name, gates[group.name], dtype).to(p.dtype)
    gates = by_writer(groups, gates)
    groups = [g for g in groups if g.name in gates]
    weights = {g.name: model.get_parameter(g.writer) for g in groups}
    saved = {name: weight.data for name, weight in weights.items()}
    own = {g.name: writer(model, g).bias for g in groups if not g.experts}
    try:
        for group in groups:
            weight, gate = saved[group.name], group.by_expert(gates[group.name])
            weights[group.name].data = fold(weight, group, gate, dtype).to(weight.dtype)
            if biases and group.name in biases:
                bias, before = biases[group.name].to(weight.device), own[group.name]
                bias = bias if before is None else before.detach().float() + bias
                writer(model, group).bias = nn.Parameter(bias.to(dtype).to(weight.dtype), requires_grad=False)
        yield
    finally:
        for p, data in before_norms:
            p.data = data
        for group in groups:
            weights[group.name].data = saved[group.name]
            if not group.experts:
                writer(model, group).bias = own[group.name]
