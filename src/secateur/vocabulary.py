"""From hidden states to losses over the vocabulary, in chunks: no tensor of tokens × vocabulary is ever whole.

Serves everything that looks at next-token distributions: learning, recovery, sensitivity, evaluation. A model runs to
the hidden states that its output head reads (`Vocabulary.hidden`), which are small. The head then goes through them
some rows at a time; of a chunk's logits and their softmax only the gradient by its hidden states is kept.

What turns hidden states into logits (caps, scales, biases) is the model's own `forward`, called with its base model
standing still: nothing here knows a family. A model whose head sees more than one row of hidden states at a time is
found out when it is looked at first, and its logits are made at once, as ever.

Liger's kernels do not fit (read in their source, 2025): the fused distillation loss for CUDA holds a float32 tensor of
tokens × vocabulary for the loss itself; the chunked one makes a gradient of the head's weights, here frozen; both leave
out τ² and take a linear map for the head, without caps or scales.

Shape suffixes: B batch, T positions, R = B·T rows, D hidden size, V vocabulary.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

LOGITS_AT_ONCE = {"cpu": 2**28, "other": 2**29}
"""Bytes that the float32 logits of a chunk may take; a loss holds about three times as much: student's, teacher's and
gradient."""

ROWS_AT_ONCE = {"cpu": 256, "other": 1024}
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

    Looking at a model takes one pass over three tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.words = 0
        self.whole: str | None = None
        """Why logits are made at once; None: they are made in chunks."""
        self._output: type[ModelOutput] | None = None
        self._weights: dict[str, Tensor] = {}
        self.whole = self._reason()
        if self.whole is None:
            self._weights = self._lowered()
        if self.whole is not None:
            warnings.warn(f"logits of all tokens of a batch are held at once: {self.whole}", stacklevel=2)

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """What the head reads, shape (B, T, D), from the model as it is called: hooks, gates and all."""
        if self.whole is not None:
            logits_BTV: Tensor = self.model(ids_BT, use_cache=False).logits
            return logits_BTV
        return self._run(ids_BT)

    def head(self) -> Head:
        """The head."""
        if self.whole is not None:
            return given(self.words)
        output = self.model.get_output_embeddings()
        trained = output is not None and any(p.requires_grad for p in output.parameters())

        def logits(hidden_RD: Tensor) -> Tensor:
            assert not (trained and hidden_RD.requires_grad), "no gradient reaches the head's weights"
            return self._logits(hidden_RD[None])[0]

        return Head(self.words, logits)

    @torch.no_grad()
    def _reason(self) -> str | None:
        """Looks at the model; why its head cannot go through rows of hidden states in chunks, None if it can."""
        ids_BT = torch.arange(3, device=next(self.model.parameters()).device)[None]
        logits_BTV = self.model(ids_BT, use_cache=False).logits
        self.words = logits_BTV.shape[-1]
        name = type(self.model).__name__
        if self.model.base_model is self.model:
            return f"{name} is not a base model and a head"
        try:
            hidden_BTD = self._run(ids_BT)
            apart = [self._logits(hidden_BTD[:, part]) for part in (slice(0, 2), slice(2, 3))]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"the head of {name} does not read its base model's last hidden states alone ({error})"
        found_BTV = torch.cat(apart, dim=1) if apart[0].shape[-1] == self.words else apart[0]
        if found_BTV.shape != logits_BTV.shape:
            return f"the head of {name} does not give a row of logits for a row of hidden states"
        if not (found_BTV - logits_BTV).abs().max() <= SAME_LOGITS * logits_BTV.abs().max():
            return f"the head of {name} gives other logits for a row of hidden states alone than among others"
        return None

    def _run(self, ids_BT: Tensor) -> Tensor:
        """Hidden states of all positions, from the whole model with a head that only sees one of them."""
        found: list[ModelOutput] = []

        def cut(_module: nn.Module, _args: Any, output: ModelOutput) -> ModelOutput:
            found.append(output)
            one_11D = output["last_hidden_state"][0, 0][None, None]  # with strides that F.linear takes without a copy
            return type(output)(**{**output, "last_hidden_state": one_11D})

        hook = self.model.base_model.register_forward_hook(cut)
        try:
            self._call(ids_BT)
        finally:
            hook.remove()
        if len(found) != 1:
            raise ValueError(f"the base model runs {len(found)} times")
        self._output = type(found[0])
        hidden_BTD: Tensor = found[0]["last_hidden_state"]
        return hidden_BTD

    def _logits(self, hidden_BTD: Tensor) -> Tensor:
        """The model's own way from hidden states to logits; of token ids it only sees the shape."""
        assert self._output is not None
        ids_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.long, device=hidden_BTD.device)
        with _standing_still(self.model.base_model, self._output(last_hidden_state=hidden_BTD)):
            return self._call(ids_BT)

    def _call(self, ids_BT: Tensor) -> Tensor:
        output = functional_call(self.model, self._weights, (ids_BT,), {"use_cache": False}, tie_weights=False)
        logits_BTV: Tensor = output.logits
        return logits_BTV

    def _lowered(self) -> dict[str, Tensor]:
        """The head's weights, by name, as autocast would otherwise make them for every call anew; none without it."""
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
            with torch.enable_grad():
                own_RD = hidden_RD[part].detach().requires_grad_()
                logits_RV = head.logits(own_RD)
            value_K, by_logits_RV = work(logits_RV.detach(), part)
            values.append(value_K)
            (grad_RD[part],) = torch.autograd.grad(logits_RV, own_RD, by_logits_RV)
        ctx.save_for_backward(grad_RD)
        return torch.stack(values).sum(0)

    @staticmethod
    def backward(ctx, grad_K):  # type: ignore[no-untyped-def]
        (grad_RD,) = ctx.saved_tensors
        return grad_RD.mul_(grad_K[0]), None, None


def in_chunks(hidden_RD: Tensor, head: Head, work: Work) -> Tensor:
    """Sums over all rows of what `work` makes of their logits, shape (K,).

    Only the first of them carries a gradient, once, and only to `hidden_RD`.
    """
    values_K: Tensor = _InChunks.apply(hidden_RD, head, work)
    return values_K
