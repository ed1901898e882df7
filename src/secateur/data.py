"""Text → blocks of tokens: a calibration part that gates are learned on, and a held-out part of other documents.

Serves `--data`. Tokens are packed once and kept in the run folder: a run that is resumed goes on with the tokens it
started with, whatever has become of the source.

Shape suffixes: N blocks, T tokens of a block or sequence.
"""

import hashlib
import json
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from secateur.files import InputError, replacing
from secateur.text import documents
from secateur.untrusted import read_tensors

SELF = "self"
"""Value of `--data` for text that the model itself writes."""
DATA_FORMAT = 1
Stored = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Tensors of a cache file, and what they are made of."""
POOL_DOCUMENTS, POOL_CHARACTERS = 10_000, 100_000_000
"""Documents are shuffled within a pool that holds no more than this: all of a small corpus, the start of a huge one."""
RELIABLE = 3e-5
"""Tokens less probable than this are not sampled (epsilon sampling, arXiv 2210.15191). Unlikely tokens derail a model
for good: text sampled from the full distribution of SmolLM2-135M rose from 3.4 to 4.2 nats a token within 250 tokens,
while it stayed at 3.2 with this cut-off; web text has 3.3."""


@dataclass(frozen=True)
class Blocks:
    """Tokens packed into blocks, int64. No document has tokens in both parts."""

    calibration_NT: torch.Tensor
    """In the order of use: blocks shuffled, anew in every epoch when the data is short and `epochs` allows repeats."""
    held_out_NT: torch.Tensor
    about: dict[str, Any]
    """Where they come from, JSON-able: data, documents, held_out_documents, tokens (distinct), held_out_tokens,
    fingerprint (hash of all tokens)."""

    def after(self, rows: int) -> "Blocks":
        """The same without the first calibration blocks."""
        return replace(self, calibration_NT=self.calibration_NT[rows:])


def load_blocks(
    data: str,
    tokenizer: Any,
    *,
    vocab_size: int,
    seq_len: int,
    calibration_blocks: int,
    held_out_blocks: int,
    seed: int,
    cache: Path,
    epochs: int = 1,
    text_column: str = "text",
    bos: int | None = None,
    written: Iterable[Sequence[int]] | None = None,
) -> Blocks:
    """Blocks of `seq_len` tokens from `data`, out of the file `cache` when it was made with the same settings.

    Documents are shuffled by `seed`, each ends in EOS, and copies are left out. The first ones fill the held-out part,
    the next ones the calibration part; no more are tokenised than fill both. Short data is used up to `epochs` times.
    With `bos` every block begins with it.
    `written` are the documents of `--data self` (self_written), which are asked for only as far as `epochs` requires.
    Raises InputError for too few tokens, and for a tokenizer with ids outside of the model's `vocab_size`.
    """
    settings = {
        "format": DATA_FORMAT, "data": data, "text_column": text_column, "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocab_size": vocab_size, "seq_len": seq_len, "calibration_blocks": calibration_blocks,
        "held_out_blocks": held_out_blocks, "seed": seed, "epochs": epochs, "bos": bos,
    }  # fmt: skip
    stored = load_stored(cache, settings, vocab_size, ("calibration", "held_out"))
    if stored is None or not _fit(stored, seq_len, held_out_blocks):
        least = -(-calibration_blocks // epochs)
        if data != SELF:
            written = _tokenised(_shuffled(filter(str.strip, documents(data, text_column)), seed), tokenizer)
        assert written is not None, "--data self needs the documents that self_written yields"
        ids = _distinct(written, tokenizer.eos_token_id, vocab_size)
        held_out_NT, found, held_out_documents = _pack(ids, held_out_blocks, seq_len, bos)
        if len(held_out_NT) < held_out_blocks:
            remedy = "give more text, or lower --held-out-tokens or --seq-len"
            raise _too_short(data, "held-out", held_out_blocks, seq_len, found, remedy)
        calibration_NT, found, used = _pack(ids, least if data == SELF else calibration_blocks, seq_len, bos)
        if len(calibration_NT) < least:
            remedy = f"give more text (beside the {held_out_documents:,} documents held out) or take fewer steps"
            if len(calibration_NT):
                remedy += f", or repeat it with --epochs {-(-calibration_blocks // len(calibration_NT))}"
            raise _too_short(data, "calibration", least, seq_len, found, remedy)
        tensors = {"calibration": calibration_NT, "held_out": held_out_NT}
        about = {
            "data": data, "documents": used, "held_out_documents": held_out_documents, "tokens": calibration_NT.numel(),
            "held_out_tokens": held_out_NT.numel(), "fingerprint": fingerprint(*tensors.values()),
        }  # fmt: skip
        stored = store(cache, tensors, settings, about)
    tensors, about = stored
    return Blocks(_in_order(tensors["calibration"].long(), calibration_blocks, seed), tensors["held_out"].long(), about)


def _fit(stored: Stored, seq_len: int, held_out_blocks: int) -> bool:
    """Whether stored blocks are those that they say, and of the right size."""
    blocks, about = stored
    sizes = all(rows_NT.shape[1] == seq_len for rows_NT in blocks.values())
    whole = fingerprint(blocks["calibration"], blocks["held_out"]) == about.get("fingerprint")
    return sizes and whole and len(blocks["held_out"]) == held_out_blocks


def _too_short(data: str, part: str, blocks: int, seq_len: int, found: int, remedy: str) -> InputError:
    needed = f"{blocks} {part} blocks of {seq_len} tokens need {blocks * seq_len:,} tokens"
    return InputError(f"{data} is too short: {needed}, {found:,} were found; {remedy}")


def _in_order(blocks_NT: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """The first `count` of all blocks in a random order, then all in another one, …; neighbours share documents."""
    generator = torch.Generator().manual_seed(seed)
    passes = range(0, count, len(blocks_NT) or 1)
    orders = (blocks_NT[torch.randperm(len(blocks_NT), generator=generator)] for _ in passes)
    return torch.cat([blocks_NT[:0], *orders])[:count]


def _shuffled(texts: Iterable[str], seed: int) -> Iterator[str]:
    """Documents shuffled within the pool."""
    rng, pool, characters = random.Random(seed), [], 0
    for text in texts:
        pool.append(text)
        characters += len(text)
        while len(pool) > POOL_DOCUMENTS or characters > POOL_CHARACTERS:
            i = rng.randrange(len(pool))
            pool[i], pool[-1] = pool[-1], pool[i]
            characters -= len(pool[-1])
            yield pool.pop()
    rng.shuffle(pool)
    yield from pool


def _tokenised(texts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    for batch in iter(lambda: list(islice(texts, 64)), []):
        yield from tokenizer(batch, verbose=False)["input_ids"]  # verbose warns of texts beyond the model's context


def _distinct(written: Iterable[Sequence[int]], eos: int | None, vocab_size: int) -> Iterator[torch.Tensor]:
    """Documents as int32 tensors that end in EOS, each one once: a copy might end up in the other part."""
    seen = set()
    for ids in written:
        if eos is not None and (not ids or ids[-1] != eos):
            ids = [*ids, eos]
        if max(ids, default=0) >= vocab_size:
            reason = f"the tokenizer gives token {max(ids)}, but the model's embedding has {vocab_size} rows"
            raise InputError(f"{reason}; use the model's own tokenizer")
        ids_T = torch.tensor(ids, dtype=torch.int32)
        if (key := fingerprint(ids_T)) not in seen:
            seen.add(key)
            yield ids_T


def _pack(
    ids: Iterator[torch.Tensor], blocks: int, seq_len: int, bos: int | None = None
) -> tuple[torch.Tensor, int, int]:
    """Takes just as many documents as fill `blocks` blocks; the blocks (N, T), tokens found, documents taken."""
    if bos is not None:
        without = ((ids_T[1:] if ids_T[0] == bos else ids_T) for ids_T in ids)
        text_NT, found, documents_taken = _pack(without, blocks, seq_len - 1)
        return torch.cat([text_NT.new_full((len(text_NT), 1), bos), text_NT], dim=1), found, documents_taken
    taken, found = [], 0
    while found < blocks * seq_len and (ids_T := next(ids, None)) is not None:
        taken.append(ids_T)
        found += len(ids_T)
    full = min(blocks, found // seq_len) * seq_len
    return torch.cat([torch.empty(0, dtype=torch.int32), *taken])[:full].view(-1, seq_len), found, len(taken)


def fingerprint(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    content = [sorted(tokenizer.get_vocab().items()), tokenizer("A text, 1 2 3.")["input_ids"], tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def store(path: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any], about: dict[str, Any]) -> Stored:
    # One entry only: safetensors writes several in a random order, and equal tokens should be equal files.
    metadata = {"secateur": json.dumps({"settings": settings, "about": about})}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return tensors, about


def load_stored(path: Path, settings: dict[str, Any], vocab_size: int, names: Collection[str]) -> Stored | None:
    """Tensors and `about` of a file that `store` wrote with the same settings; None if missing, other or broken."""
    with suppress(OSError, ValueError):
        tensors, said = stored_tokens(path, vocab_size)
        if said["settings"] == settings and tensors.keys() == set(names):
            return tensors, said["about"]
    return None


def stored_tokens(path: Path, vocab_size: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of a file of tokens, and what it says of itself. Raises ValueError for what is none."""
    tensors, said = read_tensors(path)
    if not isinstance(said, dict) or not all(isinstance(said.get(name), dict) for name in ("settings", "about")):
        raise ValueError("it is not a file of tokens")
    for name, ids_NT in tensors.items():
        rows = ids_NT.dtype == torch.int32 and ids_NT.ndim == 2
        if not rows or not ((ids_NT >= 0) & (ids_NT < vocab_size)).all():
            raise ValueError(f"{name} is not rows of tokens below {vocab_size}")
    return tensors, said
