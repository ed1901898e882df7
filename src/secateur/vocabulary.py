"""From hidden states to losses over the vocabulary, in chunks: no tensor of tokens × vocabulary is ever whole.

Serves everything that looks at next-token distributions: learning, recovery, sensitivity, evaluation. The base model
gives the hidden states that the output head reads, which are small. The head then goes through them some rows at a
time; of a chunk's logits and their softmax only the gradient by its hidden states is kept.

What turns hidden states into logits (caps, scales, biases) is the model's own `forward`, called with its base model
standing still: nothing here knows a family. A model whose head needs more than rows of hidden states is found out when
it is looked at first, and its logits are made at once, as ever.

Liger's kernels do not fit (read in their source). `fused_linear_jsd` holds a float32 tensor of tokens × vocabulary for
its loss and has no cross-entropy; the chunked distillation losses, which have both, always make a gradient of the
head's weights, here frozen, and leave out τ²; both take a linear map for the head, without caps or scales.
`fused_linear_cross_entropy` caps and heeds frozen weights but has no teacher: the head would be multiplied by twice.

Shape suffixes: B batch, T positions, R = B·T rows, D hidden size, V vocabulary.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

LOGITS_AT_ONCE = {"cpu": 2**28, "other": 2**29}
"""Bytes that the float32 logits of a chunk may take; a loss holds about three times as much: student's, teacher's and
gradient."""

ROWS_AT_ONCE = {"cpu": 128, "other": 1024}
"""Rows of a chunk, where that memory lets them be so many: with fewer the head's weights, read anew for every chunk,
take longer than the products with them, however many words there are."""

SAME_LOGITS = 0.01
"""Difference, of the largest logit, below which two ways to logits are one: far above rounding in any dtype or kernel,
far below what another row or a step left out would make."""


@dataclass(frozen=True)
class Head:
    """What turns rows of hidden states, shape (rows, D), into logits, shape (rows, V)."""

    words: int
    """V."""
    logits: Callable[[Tensor], Tensor]

    def chunks(self, rows: int, device: torch.device) -> Iterator[slice]:
        """Chunks of so many rows, of one size, within LOGITS_AT_ONCE and ROWS_AT_ONCE."""
        kind = "cpu" if device.type == "cpu" else "other"
        most = min(ROWS_AT_ONCE[kind], LOGITS_AT_ONCE[kind] // (4 * self.words))
        count = math.ceil(rows / max(1, most))
        size = math.ceil(rows / max(1, count))
        return (slice(start, start + size) for start in range(0, rows, size or 1))


def given(words: int) -> Head:
    """The head of those who have logits already."""
    return Head(words, lambda logits_RV: logits_RV)


class Vocabulary:
    """A causal LM, cut in two before its output head, which is frozen; good for as long as autocast stays as it is.

    Looking at a model takes two passes over three tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._weights: dict[str, Tensor] = {}
        self._output: type[ModelOutput] = ModelOutput
        ids_BT = torch.arange(3, device=next(model.parameters()).device)[None]
        with torch.no_grad():
            logits_BTV = model(ids_BT, use_cache=False).logits
            whole = self._reason(ids_BT, logits_BTV)
        words = self.words = logits_BTV.shape[-1]
        self.whole = whole
        """Why logits are made at once; None: they are made in chunks."""
        self.head = Head(words, self._logits) if whole is None else given(words)
        """What reads rows of `hidden`."""
        if whole is not None:
            warnings.warn(f"logits of all tokens of a batch are held at once: {whole}", stacklevel=2)

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """What the head reads, shape (B, T, D): hidden states or, where the model cannot be cut, its logits."""
        if self.whole is not None:
            logits_BTV: Tensor = self.model(ids_BT, use_cache=False).logits
            return logits_BTV
        hidden_BTD: Tensor = self.model.base_model(ids_BT, use_cache=False).last_hidden_state
        return hidden_BTD

    def _reason(self, ids_BT: Tensor, logits_BTV: Tensor) -> str | None:
        """Why the head cannot go through rows of hidden states in chunks; None if it can: tried on `ids_BT`."""
        name = type(self.model).__name__
        if self.model.base_model is self.model:
            return f"{name} is not a base model and a head"
        try:
            output = self.model.base_model(ids_BT, use_cache=False)
            self._output, self._weights = type(output), self._lowered()
            found_RV = torch.cat([self._logits(rows_RD) for rows_RD in output.last_hidden_state[0].split(2)])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"the head of {name} does not read its base model's last hidden states alone ({error})"
        expected_RV = logits_BTV[0]
        if found_RV.shape != expected_RV.shape:
            return f"the head of {name} does not give a row of logits for a row of hidden states"
        broken = not expected_RV.isfinite().all()  # which the loss will say
        if not broken and not (found_RV - expected_RV).norm() <= SAME_LOGITS * expected_RV.norm():
            return f"the head of {name} gives other logits for rows of hidden states alone than within the model"
        return None

    def _logits(self, hidden_RD: Tensor) -> Tensor:
        """The model's own way from hidden states to logits; of token ids it only sees how many they are."""
        output = self.model.get_output_embeddings()
        trained = output is not None and any(p.requires_grad for p in output.parameters())
        assert not (trained and hidden_RD.requires_grad), "no gradient reaches the head's weights"
        ids_BT = torch.zeros((1, len(hidden_RD)), dtype=torch.long, device=hidden_RD.device)
        with _standing_still(self.model.base_model, self._output(last_hidden_state=hidden_RD[None])):
            whole = functional_call(self.model, self._weights, (ids_BT,), {"use_cache": False}, tie_weights=False)
        logits_RV: Tensor = whole.logits[0]
        return logits_RV

    def _lowered(self) -> dict[str, Tensor]:
        """The head's weights, by name, as autocast would otherwise make them for every chunk anew; none without it."""
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or not torch.is_autocast_enabled(head.weight.device.type):
            return {}
        dtype = torch.get_autocast_dtype(head.weight.device.type)
        (name,) = (n for n, m in self.model.named_modules() if m is head)
        return {f"{name}.{n}": p.detach().to(dtype) for n, p in head.named_parameters()}


@contextmanager
def _standing_still(module: nn.Module, output: ModelOutput) -> Iterator[None]:
    """Within the context the module gives `output`, whatever it is called with."""
    attributes = vars(module)
    own = attributes.get("forward")  # accelerate and the like put theirs here
    attributes["forward"] = lambda *_args, **_options: output
    try:
        yield
    finally:
        del attributes["forward"]
        if own is not None:
            attributes["forward"] = own


Work = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Logits of a chunk and which rows they are → values to be summed over chunks, shape (K,), and the gradient of the
first of them by the logits, in their dtype."""


class _InChunks(torch.autograd.Function):
    """The gradient is formed in the forward pass, while a chunk's logits are there; it is all that is kept of them."""

    @staticmethod
    def forward(ctx, hidden_RD, head, work):  # type: ignore[no-untyped-def]
        grad_RD = torch.empty_like(hidden_RD)
        values = []
        for part in head.chunks(len(hidden_RD), hidden_RD.device):
            value_K, grad_RD[part] = _of_chunk(hidden_RD[part], head, work, part)
            values.append(value_K)
        ctx.save_for_backward(grad_RD)
        return torch.stack(values).sum(0)

    @staticmethod
    def backward(ctx, grad_K):  # type: ignore[no-untyped-def]
        (grad_RD,) = ctx.saved_tensors
        return grad_RD.mul_(grad_K[0]), None, None


def _of_chunk(hidden_RD: Tensor, head: Head, work: Work, part: slice) -> tuple[Tensor, Tensor]:
    """Values of a chunk, and the gradient of the first: when this returns, its logits are gone."""
    with torch.enable_grad():
        own_RD = hidden_RD.detach().requires_grad_()
        logits_RV = head.logits(own_RD)
    value_K, by_logits_RV = work(logits_RV.detach(), part)
    (grad_RD,) = torch.autograd.grad(logits_RV, own_RD, by_logits_RV)
    return value_K, grad_RD


def in_chunks(hidden_RD: Tensor, head: Head, work: Work) -> Tensor:
    """Sums over all rows of what `work` makes of their logits, shape (K,).

    Only the first of them carries a gradient, once, and only to `hidden_RD`.
    """
    values_K: Tensor = _InChunks.apply(hidden_RD, head, work)
    return values_K
