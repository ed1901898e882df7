"""What makes the passes of learning faster and changes no number.

Serves learning (methods.py). Measured by benchmarks/step_cost.py.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""

NEVER, DEFAULT_TRIM = -1, 2**26
MAPPED_FROM, DEFAULT_MAPPED_FROM = 2**30, 2**25
"""Bytes. The defaults are what glibc's own thresholds grow to once large blocks have been freed."""


@contextmanager
def memory_kept() -> Iterator[None]:
    """Within the context, memory that is freed stays with the process, for the next step to use, and goes back after.

    glibc gives large blocks back at once, so that every step takes its logits and activations from the kernel anew, a
    page fault for each 4 kB. Elsewhere than on Linux with glibc nothing happens.
    """
    mallopt, malloc_trim = _glibc()
    if mallopt is None or malloc_trim is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
    mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, DEFAULT_MAPPED_FROM)
        mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM)
        malloc_trim(0)


def _glibc():  # type: ignore[no-untyped-def]
    if not sys.platform.startswith("linux"):
        return None, None
    library = ctypes.CDLL(None)
    return getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)


@contextmanager
def lowered(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, under autocast, frozen linear maps hold their weights in the dtype that they multiply in.

    Autocast makes that copy of frozen weights in every pass, and keeps it from the forward pass to the backward one.
    The products are the same. The output head is left alone (vocabulary.py), and so is what other modules share.
    """
    kind = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    dtype = torch.get_autocast_dtype(kind)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if type(m) is nn.Linear and m is not head]
    elsewhere = {id(p) for m in model.modules() if m not in linear for p in m.parameters(recurse=False)}
    own: dict[nn.Parameter, torch.Tensor] = {}
    for module in linear:
        for p in module.parameters(recurse=False):
            if not (p.requires_grad or p.is_meta) and p.dtype == torch.float32 and id(p) not in elsewhere:
                own[p] = p.data
                p.data = p.data.to(dtype)
    try:
        yield
    finally:
        for p, data in own.items():
            p.data = data
