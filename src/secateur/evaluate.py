"""Losses and perplexities, by a stated protocol; serves `secateur eval RUN`.

Perplexity: the text is tokenised once as a whole, cut into non-overlapping windows from its start, and each window's
tokens but its first are predicted from those before them in the window (the papers' WikiText-2 protocol).
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from secateur.attach import attached
from secateur.files import InputError
from secateur.units import Group

LOGITS_AT_ONCE = 2**28
"""Bytes of float32 logits that a forward pass of an evaluation may make (256 MiB)."""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss, with what it was measured on."""

    perplexity: float
    loss: float
    """Mean negative log-likelihood, nats a predicted token."""
    windows: int
    length: int
    """Tokens a window; length − 1 of them are predicted."""


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    ids_NT: torch.Tensor,
    groups: Sequence[Group] = (),
    gates: Mapping[str, torch.Tensor] | None = None,
    biases: Mapping[str, torch.Tensor] | None = None,
) -> float:
    """Mean loss in nats a predicted token over rows of token ids, with gates (and writers' biases) where given."""
    device = next(model.parameters()).device
    rows = max(1, LOGITS_AT_ONCE // (4 * ids_NT.shape[1] * model.config.vocab_size))
    total = 0.0
    with attached(model, groups, gates, biases) if gates is not None else nullcontext():
        for ids_BT in ids_NT.split(rows):
            ids_BT = ids_BT.to(device)
            logits_BTV = model(ids_BT, use_cache=False).logits
            losses = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="sum")
            total += losses.item()
    return total / (ids_NT.shape[0] * (ids_NT.shape[1] - 1))


def windows(tokens_T: torch.Tensor, count: int, length: int, name: str, bos: int | None = None) -> torch.Tensor:
    """The first `count` non-overlapping windows of a text, shape (≤ count, length). InputError if it has none.

    With `bos` every window begins with it, in the place of a token of text: just as many tokens are predicted.
    """
    if bos is not None:
        windows_NT = windows(tokens_T[tokens_T != bos], count, length - 1, name)
        return torch.cat([torch.full((len(windows_NT), 1), bos), windows_NT], dim=1)
    available = len(tokens_T) // length
    if available == 0:
        raise InputError(f"{name} has {len(tokens_T)} tokens; a window of perplexity needs {length} (--eval-length)")
    return tokens_T[: min(count, available) * length].view(-1, length)


def perplexity(model: PreTrainedModel, ids_NT: torch.Tensor) -> Perplexity:
    """Perplexity over windows of token ids of shape (windows, length)."""
    loss = mean_loss(model, ids_NT)
    return Perplexity(math.exp(min(loss, 700.0)), loss, ids_NT.shape[0], ids_NT.shape[1])
