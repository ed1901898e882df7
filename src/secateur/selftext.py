"""Text that the model itself writes, for `--data self`: pruning needs no data set at all.

Shape suffixes: B sequences written at once, T tokens of a sequence, V vocabulary.
"""

import random
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch

from secateur.data import DATA_FORMAT, fingerprint, load_stored, store, tokenizer_fingerprint
from secateur.samples import continued

RELIABLE = 3e-5
"""Tokens less probable than this are not sampled (epsilon sampling, arXiv 2210.15191). Unlikely tokens derail a model
for good: text sampled from the full distribution of SmolLM2-135M rose from 3.4 to 4.2 nats a token within 250 tokens,
while it stayed at 3.2 with this cut-off; web text has 3.3."""


def self_written(
    model: Any,
    tokenizer: Any,
    *,
    seed: int,
    parts: Path,
    bos: int | None = None,
    batch_size: int = 64,
    length: int = 512,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Iterator[list[int]]:
    """Documents that the model writes, as token ids without EOS: endless, the reader stops when it has enough.

    Each begins with BOS if the model wants it (`bos`) or the tokenizer adds one to texts; then a token drawn uniformly
    from the vocabulary makes openings diverse, and the model samples the rest, to EOS or `length` tokens (LLM-QAT,
    arXiv 2305.17888). Batch i follows from model, seed and i alone and is kept in the folder `parts`, so that an
    interrupted run goes on where it was. `on_progress` is told of every lot of tokens. The global random state is not
    touched.
    """
    opening = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id][:1] if bos is None else [bos]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    embedded = range(model.get_input_embeddings().num_embeddings)  # may have fewer or more rows than the vocabulary
    ordinary_V = torch.tensor(sorted({*tokenizer.get_vocab().values()}.intersection(embedded) - special))
    settings = {
        "format": DATA_FORMAT, "tokenizer": tokenizer_fingerprint(tokenizer), "reliable": RELIABLE, "seed": seed,
        "model": fingerprint(*(p.detach().flatten()[:16].float().cpu() for p in model.parameters())),
        "batch_size": batch_size, "length": length, "opening": opening,
    }  # fmt: skip
    for batch in count():
        path = parts / f"{batch:05d}.safetensors"
        if (stored := load_stored(path, settings, embedded.stop, ("ids",))) is None:
            generator = torch.Generator(model.device)
            generator.manual_seed(random.Random(f"{seed}/{batch}").getrandbits(63))
            first_B = torch.randint(len(ordinary_V), (batch_size,), generator=generator, device=model.device).cpu()
            opening_BT = torch.cat([torch.tensor([opening] * batch_size).long(), ordinary_V[first_B, None]], dim=1)
            ids_BT = _sample(model, opening_BT.to(model.device), length, tokenizer.eos_token_id, generator, on_progress)
            stored = store(path, {"ids": ids_BT.int().cpu()}, settings, {})
        for ids in stored[0]["ids"].tolist():
            end = next((i for i in range(len(opening) + 1, len(ids)) if ids[i] == tokenizer.eos_token_id), len(ids))
            yield ids[:end]


@torch.no_grad()
def _sample(
    model: Any, ids_BT: torch.Tensor, length: int, eos: int | None, generator: Any, on_progress: Callable[[int], None]
) -> torch.Tensor:
    """Continues the sequences to `length` tokens or until all have an EOS; what follows an EOS is of no use.

    A loop of our own rather than model.generate: rows of one length need no padding, the generator is our own, and
    nothing in the checkpoint's generation_config changes what is sampled.
    """
    cache, ended_B = None, torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
    while ids_BT.shape[1] < length and not ended_B.all():
        logits_BTV, cache = continued(model, ids_BT if cache is None else ids_BT[:, -1:], cache)
        probability_BV = logits_BTV[:, -1].float().softmax(dim=-1)
        unlikely_BV = probability_BV < probability_BV.amax(dim=-1, keepdim=True).clamp(max=RELIABLE)
        next_BT = torch.multinomial(probability_BV.masked_fill_(unlikely_BV, 0), 1, generator=generator)
        ids_BT = torch.cat([ids_BT, next_BT], dim=1)
        ended_B |= next_BT[:, 0] == (-1 if eos is None else eos)
        on_progress(len(ids_BT))
    return ids_BT
