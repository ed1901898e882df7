"""Whether a model wants every sequence to begin with its BOS token, found by trying: no table of model names.

Some models (Gemma) are lost without it: SmolLM2 writes on from any token, Gemma 3 270M has a perplexity of 48 on text
that it gives 15 with BOS. Blocks and windows are cut from the middle of texts, where no tokenizer puts one.
"""

from typing import Any

import torch

from secateur.evaluate import mean_loss
from secateur.files import InputError

PROBE = (
    "A river carries more than water. Every spring it takes soil from the hills, and what it takes it lays down again "
    "where the land is flat and the current slows. Farmers who live beside it know both of its faces: the flood that "
    "covers their fields in some years, and the black earth that it leaves behind, in which almost anything will grow."
)
"""Plain text to try on, our own."""

GAIN = 0.2
"""Nats a token by which BOS has to lower the loss. Models that can do without it differ by a few hundredths."""

LEAST_WORDS = 30
"""Different tokens of the probe without which it says nothing: the tokenizer does not know English."""


def leading_bos(model: Any, tokenizer: Any, choice: str = "auto") -> int | None:
    """The id to begin every sequence with, or None. `choice`: `always`, `never`, or `auto`, which tries.

    Raises InputError for `always` where the tokenizer has none.
    """
    bos = tokenizer.bos_token_id
    if choice == "always" and bos is None:
        raise InputError("--bos always: this tokenizer has no BOS token; say --bos never, or leave it out")
    if choice == "never" or bos is None:
        return None
    if choice == "always":
        return int(bos)
    text_T = torch.tensor([i for i in tokenizer(PROBE)["input_ids"] if i != bos])
    if len(text_T.unique()) < LEAST_WORDS:
        return None
    without = mean_loss(model, text_T[None, 1:])
    with_bos = mean_loss(model, torch.cat([torch.tensor([bos]), text_T[2:]])[None])
    return int(bos) if with_bos < without - GAIN else None
