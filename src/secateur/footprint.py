"""Memory of a learning step, found by going through it with tensors that have shapes and no values.

The model is built without weights, so this takes neither a download nor the memory that it speaks of. What is counted
is what the operations themselves ask for, whatever the architecture; only the output head, which goes through rows in
chunks (vocabulary.py), and experts, whose tokens depend on values, are reckoned.

Shape suffixes: B batch, T positions, D hidden size, R routed tokens, H hidden size, K experts a token.
"""

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from secateur import experts
from secateur.attach import attached
from secateur.families import build
from secateur.gates import by_group
from secateur.passes import recomputing
from secateur.speed import lowered
from secateur.units import Group
from secateur.vocabulary import Head

EVENLY = "secateur_evenly"


class Ledger(TorchDispatchMode):
    """Bytes of the tensors that operations within make, as they come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def add(self, count: int) -> None:
        """Takes in that so many bytes came, or went."""
        self.live += count
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given | self._known:
                    self._known.add(storage._cdata)
                    self.add(storage.nbytes())
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, storage: int, count: int) -> None:
        self._known.discard(storage)
        self.live -= count


@dataclass(frozen=True)
class Footprint:
    """Bytes that a learning step takes beside weights, gates and their optimiser."""

    activations: int
    """What the student's layers keep for the backward pass, with the teacher's hidden states and, under autocast, the
    weights in the dtype of the products."""
    logits: int
    """A chunk of logits: student's, teacher's and gradient, and the head's weights in the dtype of the products."""
    passing: int
    """What comes and goes beyond these, at the most."""
    layer: int
    """What a layer keeps for its own backward pass."""

    @property
    def total(self) -> int:
        """The most at any time."""
        return self.activations + self.logits + self.passing


def footprint(
    config: PreTrainedConfig,
    groups: Sequence[Group],
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    products: torch.dtype,
    checkpointing: bool,
    kind: str = "cpu",
    trust_remote_code: bool = False,
    spread: bool = False,
) -> Footprint:
    """The memory of a step over `batch` × `tokens` tokens, with weights in `dtype` that are multiplied in `products`;
    `kind` of device: "cpu" or "other". Weights that are `spread` over ranks are not lowered beforehand (methods.py)."""
    ALL_EXPERTS_FUNCTIONS.register(EVENLY, _evenly)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model = build(config, trust_remote_code).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        ids_BT = torch.zeros((batch, tokens), dtype=torch.long)
        z_N = torch.zeros(sum(g.units for g in groups), requires_grad=True)
        ledger = Ledger()
        context = torch.autocast("cpu", products, enabled=products != dtype, cache_enabled=False)
        before = experts.forward
        with ledger, context, nullcontext() if spread else lowered(model):
            ALL_EXPERTS_FUNCTIONS[experts.IMPLEMENTATION] = _evenly
            try:
                return _step(model, groups, ids_BT, z_N, ledger, products, checkpointing, kind)
            finally:
                ALL_EXPERTS_FUNCTIONS[experts.IMPLEMENTATION] = before


def _step(
    model: Any, groups: Sequence[Group], ids_BT: Tensor, z_N: Tensor, ledger: Ledger, products: torch.dtype,
    checkpointing: bool, kind: str,
) -> Footprint:  # fmt: skip
    """Teacher, student, head, backward pass, as passes.py has them."""
    with torch.no_grad(), attached(model, groups, by_group(torch.ones_like(z_N), groups)):
        teacher_BTD = model.base_model(ids_BT, use_cache=False).last_hidden_state
    with attached(model, groups, by_group(z_N.relu(), groups)):
        with recomputing(model, checkpointing):
            student_BTD = model.base_model(ids_BT, use_cache=False).last_hidden_state
        kept = ledger.live
        words = model.get_output_embeddings().weight.shape[0]
        part = next(iter(Head(words, lambda rows: rows).chunks(ids_BT.numel(), torch.device(_device_type(kind)))))
        logits = 3 * (part.stop - part.start) * words * products.itemsize
        if products != model.dtype:
            logits += words * student_BTD.shape[-1] * products.itemsize
        ledger.add(logits)
        ledger.add(-logits)
        most, ledger.peak = ledger.peak, ledger.live
        grad_BTD = torch.empty_like(student_BTD)
        torch.autograd.grad(student_BTD, z_N, grad_BTD)
    layer = ledger.peak - kept if checkpointing else kept // model.config.num_hidden_layers
    del teacher_BTD
    return Footprint(kept, logits, max(0, most - kept - logits, ledger.peak - kept - logits), layer)


def _device_type(kind: str) -> str:
    return "cpu" if kind == "cpu" else "meta"


def _evenly(module: Any, hidden_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
    """What experts take, whichever tokens they are sent: as many rows through one of them as through all."""
    up, routed = experts.reader(module), index_RK.numel()
    x = hidden_RH.repeat_interleave(index_RK.shape[1], 0)
    x = experts._linear(module, x, getattr(module, up)[0], f"{up}_bias", 0)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    inside = getattr(module, "_secateur_inside", None)
    if inside is not None:
        x = inside(0, x, weight_RK)
    y = experts._linear(module, x, module.down_proj[0], "down_proj_bias", 0) * weight_RK.reshape(routed, 1)
    return torch.zeros_like(hidden_RH).index_add(0, torch.zeros(routed, dtype=torch.long), y.to(hidden_RH.dtype))
