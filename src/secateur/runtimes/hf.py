"""transformers in float32: what other runtimes are compared with."""

from pathlib import Path

import torch
import transformers

from secateur.load import read_export
from secateur.runtimes import Continuation
from secateur.samples import continued


def version() -> str:
    """Name and version."""
    return f"transformers {transformers.__version__}"


@torch.no_grad()
def greedy(model: Path, prompts: list[list[int]], new_tokens: int) -> list[Continuation]:
    """The most likely tokens after each prompt, by the checkpoint in the folder `model`; ends of text do not stop it.

    On the CPU, prompt by prompt, with the cache that serving uses.
    """
    loaded = read_export(model, torch.float32)
    return [_greedy(loaded, prompt, new_tokens) for prompt in prompts]


def _greedy(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> Continuation:
    written = Continuation(list(prompt), [], [])
    ids_1T, cache = torch.tensor([prompt]), None
    for _ in range(new_tokens):
        logits_1TV, cache = continued(model, ids_1T, cache)
        best, token = logits_1TV[0, -1].float().log_softmax(-1).topk(2)
        written.tokens.append(int(token[0]))
        written.logprobs.append(float(best[0]))
        written.margins.append(float(best[0] - best[1]))
        ids_1T = token[None, :1]
    return written
