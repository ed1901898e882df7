"""Proof that the export is the gated model: both run on real text, and their logits must agree.

Serves `secateur verify RUN`. In float32 the two differ by rounding only, which a badly damaged model can amplify: where
the difference is larger than it is as a rule, the gated model in float64 tells how much of it is rounding. In the
export's own dtype the folded weights are rounded, so there, too, the yardstick is the noise of the dtype itself.

Of each pass hidden states are kept; logits are made of them chunk by chunk, as they are compared (vocabulary.py).

Shape suffixes: N rows, T positions, R = N·T, D hidden size, V vocabulary, C rows of a chunk.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.attach import attached
from secateur.evaluate import TOKENS_AT_ONCE
from secateur.offloaded import Change, changed
from secateur.slicing import fold, fold_norm
from secateur.units import Group, by_writer
from secateur.vocabulary import Vocabulary

FLOAT32_TOLERANCE = 1e-5
"""Largest difference of a float32 logit, relative to the largest logit where that is above 1."""

Module = TypeVar("Module", bound=nn.Module)

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


def verified(
    model: PreTrainedModel,
    exported: PreTrainedModel,
    groups: Sequence[Group],
    gates: Mapping[str, torch.Tensor],
    biases: Mapping[str, torch.Tensor],
    own: torch.dtype,
    ids_NT: torch.Tensor,
) -> list[Comparison]:
    """Compares `model`, gated, with its export, whose own dtype is `own`: in that and in float32. Either's weights may
    be offloaded.

    `exported` was loaded in float32: what a model computes for itself when it is built (scales of embeddings) would be
    rounded otherwise, and in `model` it is not. `model` is as it was afterwards.
    """
    exact, before = own == torch.float32, next(model.parameters()).dtype
    dense, pruned = Vocabulary(model), Vocabulary(exported)
    found = []

    def gated_in(dtype: torch.dtype, folding: bool) -> Outputs:
        with_weights_in(model, dtype)
        with folded(model, groups, gates, own, biases) if folding else attached(model, groups, gates, biases):
            return outputs_of(dense, ids_NT)

    try:
        if not exact:
            wide, gated = gated_in(torch.float32, False), gated_in(own, False)
            with_weights_in(exported, own)
            chunks = side_by_side(gated, outputs_of(pruned, ids_NT), wide)
            found.append(compare(chunks, str(own).removeprefix("torch.")))
        # Where they are not exact, the export's weights are rounded after folding, and so must these be.
        gated = gated_in(torch.float32, not exact)
        with_weights_in(exported, torch.float32)
        in_export = outputs_of(pruned, ids_NT)
        comparison = compare(side_by_side(gated, in_export), "float32")
        if not comparison.passed and model.device.type != "mps":  # which has no float64
            comparison = compare(side_by_side(gated_in(torch.float64, not exact), in_export, gated), "float32")
        return [*found, comparison]
    finally:
        with_weights_in(model, before)


@dataclass(frozen=True)
class Outputs:
    """What a model gave for rows of tokens, up to its output head, and of any chunk of it the logits."""

    vocabulary: Vocabulary
    dtype: torch.dtype
    """Of the weights at that time, to which the head's are cast for its logits."""
    hidden_RD: torch.Tensor
    """On the CPU."""

    @torch.no_grad()
    def logits(self, part: slice) -> torch.Tensor:
        """Logits of the tokens of a chunk, shape (C, V), on the CPU, float32."""
        model = self.vocabulary.model
        if (head := model.get_output_embeddings()) is not None:
            with_weights_in(head, self.dtype)
        return self.vocabulary.head.logits(self.hidden_RD[part].to(next(model.parameters()).device)).float().cpu()


@torch.no_grad()
def outputs_of(vocabulary: Vocabulary, ids_NT: torch.Tensor) -> Outputs:
    """Runs a model over rows of tokens."""
    first, rows = next(vocabulary.model.parameters()), max(1, TOKENS_AT_ONCE // ids_NT.shape[1])
    hidden = [vocabulary.hidden(ids_BT.to(first.device)).flatten(0, 1).cpu() for ids_BT in ids_NT.split(rows)]
    return Outputs(vocabulary, first.dtype, torch.cat(hidden))


def side_by_side(*outputs: Outputs) -> Iterator[list[torch.Tensor]]:
    """Logits of the same tokens in several outputs, chunk by chunk."""
    first = outputs[0]
    for part in first.vocabulary.head.chunks(len(first.hidden_RD), next(first.vocabulary.model.parameters()).device):
        yield [output.logits(part) for output in outputs]


def compare(chunks: Iterable[Sequence[torch.Tensor]], dtype: str) -> Comparison:
    """Compares logits. A chunk is those of the gated model and of the exported one, shapes (..., V), and where noise is
    the yardstick once more of the gated one, in another dtype, from which they differ by that noise.

    Logits that are not finite in both never pass.
    """
    largest, top = torch.zeros(()), torch.zeros(())
    summed, noise = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    same = tokens = values = 0
    noisy = False
    for gated_CV, exported_CV, *again in chunks:
        difference_CV = (gated_CV - exported_CV).abs()
        largest, top = (torch.maximum(*pair) for pair in ((largest, difference_CV.max()), (top, gated_CV.abs().max())))
        summed += difference_CV.sum(dtype=torch.float64)
        same += int((gated_CV.argmax(-1) == exported_CV.argmax(-1)).sum())
        tokens, values = tokens + gated_CV[..., 0].numel(), values + gated_CV.numel()
        for again_CV in again:
            noise += (again_CV - gated_CV).abs().sum(dtype=torch.float64)
            noisy = True
    mean = summed.item() / values
    allowed = NOISE_FACTOR * noise.item() / values if noisy else FLOAT32_TOLERANCE * max(1.0, top.item())
    measured = mean if noisy else largest.item()
    passed = measured <= allowed < math.inf
    return Comparison(dtype, largest.item(), mean, allowed, same / tokens, tokens, passed)


def with_weights_in(model: Module, dtype: torch.dtype) -> Module:
    """The model, its weights cast in place, those that are offloaded as they come. Buffers stay: rotary frequencies are
    float32 in a bfloat16 model, too."""
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
    changes: dict[str, Change] = {}
    for g in groups:
        if g.is_sublayer and g.after:
            for own, _ in model.get_submodule(g.after).named_parameters():
                changes[f"{g.after}.{own}"] = partial(fold_norm, group=g, own=own, gate=gates[g.name], dtype=dtype)
    gates = by_writer(groups, gates)
    for g in (g for g in groups if g.name in gates):
        changes[g.writer] = partial(fold, group=g, scale=g.by_expert(gates[g.name]), dtype=dtype)
        if biases and g.name in biases:
            changes[f"{g.gate_at}.bias"] = partial(_raised, by_O=biases[g.name], dtype=dtype)
    with changed(model, changes):
        yield


def _raised(bias_O: torch.Tensor | None, by_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (by_O if bias_O is None else bias_O.float() + by_O.to(bias_O.device)).to(dtype)
