"""Losses and perplexities, by a stated protocol; serves `secateur eval RUN`.

Perplexity: the text is tokenised once as a whole, cut into windows of L tokens from its start (stride L, so they do not
overlap; what is left at the end is dropped), and the L − 1 tokens of a window after its first are predicted from those
before them in the window. Figure: exp of the mean negative log-likelihood over all predicted tokens.

Papers report WikiText-2 so (the protocol of GPTQ, arXiv 2210.17323): the rows of the raw test split are its lines with
their newline, blank ones are "", `"\n\n".join(rows)` is the text, L = 2048, all windows. Here: `--eval-data FILE
--eval-join lines --eval-windows 0 --eval-length 2048`, or the rows on the hub as `--eval-data` without `--eval-join`.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from secateur.attach import attached
from secateur.files import InputError
from secateur.ranks import ALONE, Ranks
from secateur.units import Group
from secateur.vocabulary import Vocabulary

TOKENS_AT_ONCE = 2048
"""Tokens of a forward pass of an evaluation, unless a row has more: enough to keep a processor busy."""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss, with what it was measured on."""

    perplexity: float
    loss: float
    """Mean negative log-likelihood, nats a predicted token."""
    windows: int
    length: int
    """Tokens a window, which is the stride as well; length − 1 of them are predicted."""
    tokens: int
    """Predicted tokens: windows × (length − 1)."""
    loss_stderr: float | None
    """Standard error of the loss over the windows; None of one window."""


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    ids_NT: torch.Tensor,
    groups: Sequence[Group] = (),
    gates: Mapping[str, torch.Tensor] | None = None,
    biases: Mapping[str, torch.Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> float:
    """Mean loss in nats a predicted token over rows of token ids, with gates (and writers' biases) where given."""
    rows = max(1, TOKENS_AT_ONCE // ids_NT.shape[1])
    vocabulary = Vocabulary(model)

    def summed(ids_BT: torch.Tensor) -> torch.Tensor:
        return torch.tensor(sum(_summed_losses(vocabulary, ids_BT)), dtype=torch.float64)

    with attached(model, groups, gates, biases) if gates is not None else nullcontext():
        total = sum(loss.item() for loss in ranks.in_turn(ids_NT.split(rows), summed))
    return total / (ids_NT.shape[0] * (ids_NT.shape[1] - 1))


def _summed_losses(vocabulary: Vocabulary, ids_BT: torch.Tensor) -> Iterator[float]:
    """Losses of one forward pass, nats, summed over each chunk of its predicted tokens."""
    head, device = vocabulary.head, next(vocabulary.model.parameters()).device
    ids_BT = ids_BT.to(device)
    hidden_RD, labels_R = vocabulary.hidden(ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
    for part in head.chunks(len(labels_R), device):
        yield F.cross_entropy(head.logits(hidden_RD[part]).float(), labels_R[part], reduction="sum").item()


def windows(tokens_T: torch.Tensor, count: int, length: int, name: str, bos: int | None = None) -> torch.Tensor:
    """The first `count` non-overlapping windows of a text (0: all), shape (≤ count, length). InputError if it has none.

    With `bos` every window begins with it, in the place of a token of text: just as many tokens are predicted.
    """
    if bos is not None:
        windows_NT = windows(tokens_T[tokens_T != bos], count, length - 1, name)
        return torch.cat([torch.full((len(windows_NT), 1), bos), windows_NT], dim=1)
    available = len(tokens_T) // length
    if available == 0:
        raise InputError(f"{name} has {len(tokens_T)} tokens; a window of perplexity needs {length} (--eval-length)")
    return tokens_T[: min(count or available, available) * length].view(-1, length)


def perplexity(model: PreTrainedModel, ids_NT: torch.Tensor) -> Perplexity:
    """Perplexity over windows of token ids of shape (windows, length)."""
    return perplexity_of(window_losses(model, ids_NT), ids_NT.shape[1])


@torch.no_grad()
def window_losses(model: PreTrainedModel, ids_NT: torch.Tensor) -> list[float]:
    """Loss of each window, nats a predicted token."""
    vocabulary = Vocabulary(model)
    return [sum(_summed_losses(vocabulary, ids_1T)) / (ids_NT.shape[1] - 1) for ids_1T in ids_NT.split(1)]


def perplexity_of(losses: Sequence[float], length: int) -> Perplexity:
    """Perplexity from the losses of windows of `length` tokens."""
    loss, count = sum(losses) / len(losses), len(losses)
    return Perplexity(math.exp(min(loss, 700.0)), loss, count, length, count * (length - 1), standard_error(losses))


def compared(dense: PreTrainedModel, pruned: PreTrainedModel, ids_NT: torch.Tensor) -> dict[str, Any]:
    """Perplexities of both models over the same windows, as eval.json has them, and the error of their difference."""
    losses = [window_losses(model, ids_NT) for model in (dense, pruned)]
    before, after = (asdict(perplexity_of(of_model, ids_NT.shape[1])) for of_model in losses)
    error = standard_error([b - a for a, b in zip(*losses, strict=True)])
    return {"dense": before, "pruned": after, "loss_change_stderr": error}


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of a mean; None of one value. Of two models' losses, taken window by window, it is that of their
    difference: far smaller than what each one's own suggests, as windows are hard or easy for both."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
