"""What the dense and the pruned model write after the same words, to read beside the figures of `secateur eval RUN`.

Prompts are the beginnings of windows of the evaluation text, so that the language is that of the figures, and the text
itself goes on beside them. Greedy: always the most likely token.

Shape suffixes: N prompts (windows of the text), T tokens, V vocabulary.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 4
"""Windows, evenly spread over the text."""

PROMPT_TOKENS, NEW_TOKENS = 32, 32
"""At most; where windows are short, a prompt is half of one, and as many tokens follow."""


def samples(
    dense: PreTrainedModel, pruned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids_NT: Tensor
) -> list[dict[str, str]]:
    """What both models write after the beginning of some windows of token ids: prompt, dense, pruned, text itself."""
    rows = torch.linspace(0, len(ids_NT) - 1, min(SAMPLES, len(ids_NT))).round().long()
    length = ids_NT.shape[1]
    begin = min(PROMPT_TOKENS, length // 2)
    new = min(NEW_TOKENS, length - begin)
    prompts_NT, rest_NT = ids_NT[rows, :begin], ids_NT[rows, begin : begin + new]
    written = {"dense": greedy(dense, prompts_NT, new), "pruned": greedy(pruned, prompts_NT, new), "text": rest_NT}
    return [
        {"prompt": tokenizer.decode(prompt_T, skip_special_tokens=True)}
        | {name: _after(tokenizer, prompt_T, rows_NT[i]) for name, rows_NT in written.items()}
        for i, prompt_T in enumerate(prompts_NT)
    ]


@torch.no_grad()
def greedy(model: PreTrainedModel, prompts_NT: Tensor, new_tokens: int) -> Tensor:
    """The most likely tokens after prompts of one length, shape (N, new_tokens), with the cache that serving uses."""
    ids_NT, cache, written = prompts_NT.to(next(model.parameters()).device), None, []
    for _ in range(new_tokens):
        logits_NTV, cache = continued(model, ids_NT, cache)
        ids_NT = logits_NTV[:, -1].argmax(-1, keepdim=True)
        written.append(ids_NT.cpu())
    return torch.cat(written, dim=1)


def continued(model: torch.nn.Module, ids_NT: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits of tokens after those in the cache (None: there are none yet), shape (N, T, V), and the cache with them.

    What transformers 5.19 calls `past_key_values` is `cache` in 5.24.
    """
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    output = model(ids_NT, use_cache=True, **{name: cache})
    return output.logits, getattr(output, name)


def _after(tokenizer: PreTrainedTokenizerBase, prompt_T: Tensor, tokens_T: Tensor) -> str:
    """Tokens as text, up to an end of text; decoded behind their prompt, as some tokenizers drop a first space."""
    ends = (tokens_T == tokenizer.eos_token_id).nonzero() if tokenizer.eos_token_id is not None else []
    tokens_T = tokens_T[: int(ends[0])] if len(ends) else tokens_T
    prompt, whole = (
        tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt_T, torch.cat([prompt_T, tokens_T]))
    )
    return (
        whole.removeprefix(prompt) if whole.startswith(prompt) else tokenizer.decode(tokens_T, skip_special_tokens=True)
    )
