"""Text → blocks of tokens: a calibration part that gates are learned on, and a held-out part of other documents.

Serves `--data`: a file, a folder, a dataset on the hub, or `self`. Tokens are packed once and kept in the run folder:
a run that is resumed goes on with the tokens it started with, whatever has become of the source.

Local files are read through pyarrow, which comes with `datasets`, and not through `datasets` itself, which would copy
them into its own cache and lose the file name and line of an error. pyarrow's gzip and zstd streams also notice a file
that was cut short; the zstandard package returns the first part of one as if it were all.

Shape suffixes: N blocks, B sequences written at once, T tokens of a block or sequence, V vocabulary.
"""

import hashlib
import io
import json
import random
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from secateur.files import InputError, replacing

SELF = "self"
"""Value of `--data` for text that the model itself writes."""
DATA_FORMAT = 1
Stored = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Tensors of a cache file, and what they are made of."""
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
PIECE_CHARACTERS = 4_000
"""Plain text is cut into documents of about this length."""
POOL_DOCUMENTS, POOL_CHARACTERS = 10_000, 100_000_000
"""Documents are shuffled within a pool that holds no more than this: all of a small corpus, the start of a huge one."""
RELIABLE = 3e-5
"""Tokens less probable than this are not sampled (epsilon sampling, arXiv 2210.15191). Unlikely tokens derail a model
for good: text sampled from the full distribution of SmolLM2-135M rose from 3.4 to 4.2 nats a token within 250 tokens,
while it stayed at 3.2 with this cut-off; web text has 3.3."""


@dataclass(frozen=True)
class Blocks:
    """Tokens packed into blocks, int64. No document has tokens in both parts."""

    calibration_NT: torch.Tensor  # noqa: N815
    """In the order of use: blocks shuffled, anew in every epoch when the data is short and `epochs` allows repeats."""
    held_out_NT: torch.Tensor  # noqa: N815
    about: dict[str, Any]
    """Where they come from, JSON-able: data, documents, held_out_documents, tokens (distinct), held_out_tokens,
    fingerprint (hash of all tokens)."""


def documents(data: str, text_column: str = "text", whole: bool = False) -> Iterator[str]:
    """Documents of `data` in a fixed order, streamed; a row without a value is an empty document.

    `data` is a file, a folder (all readable files below it, sorted by path; hidden ones are left out), or a dataset on
    the hub as `name`, `name:config` or `name:config:split` (split `train` by default). Plain text has no marks between
    documents: it is cut into pieces at blank lines, else at lines, unless `whole`. Raises InputError that names the
    file, and the line where there is one.
    """
    files = local_files(data)
    if files is None:
        yield from _hub_documents(data, text_column)
    for path in files or ():
        yield from _file_documents(path, text_column, whole)


def evaluation_text(data: str, text_column: str = "text", characters: int | None = None) -> str:
    """One text for perplexities: documents joined by blank lines, text files as they are; the first `characters` of it.

    Empty documents count, so that rows of WikiText-2 give the text of the published protocol.
    """
    taken, length = [], 0
    for document in documents(data, text_column, whole=True):
        taken.append(document)
        length += len(document)
        if characters is not None and length >= characters:
            break
    text = "\n\n".join(taken)[:characters]
    if not text.strip():
        raise InputError(f"{data} holds no text to evaluate on; name another file")
    return text


def local_files(data: str) -> list[Path] | None:
    """The files that `data` stands for; None for the name of a dataset on the hub."""
    path = Path(data).expanduser()
    if data and path.is_dir():
        inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        files = sorted(p for p in inside if _suffix(p) in READERS and p.is_file())
        if not files:
            raise InputError(f"{data}: no file in this folder ends in {', '.join(READERS)} (or these with .gz, .zst)")
        return files
    if data and path.exists():
        return [path]
    if not data or _suffix(path) in READERS or data[0] in "./~" or data.count("/") > 1:
        raise InputError(f"{data!r}: no such file or folder; check the path given as data")
    return None


def _suffix(path: Path) -> str:
    """File type: the suffix before .gz or .zst, in lower case."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSION else path).suffix.lower()


def _file_documents(path: Path, column: str, whole: bool) -> Iterator[str]:
    if _suffix(path) not in READERS:
        raise InputError(f"{path}: unknown file type; files may end in {', '.join(READERS)} (or these with .gz, .zst)")
    try:
        yield from READERS[_suffix(path)](path, column, whole)
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; convert it, for instance with iconv") from None
    except (OSError, pa.ArrowException) as error:
        reason = f"{path} cannot be read ({_one_line(error)})"
        raise InputError(f"{reason}; check that it is complete and of the type its suffix says") from None


def _stream(path: Path) -> Any:
    return pa.input_stream(str(path), compression=COMPRESSION.get(path.suffix.lower()))


def _text_documents(path: Path, column: str, whole: bool) -> Iterator[str]:
    with io.TextIOWrapper(_stream(path), encoding="utf-8-sig") as file:
        if whole:
            yield file.read()
            return
        piece = ""
        for line in iter(lambda: file.readline(2 * PIECE_CHARACTERS), ""):
            piece += line
            if len(piece) >= (2 if line.strip() else 1) * PIECE_CHARACTERS:
                yield piece.strip("\n")
                piece = ""
        yield piece.strip("\n")


def _jsonl_documents(path: Path, column: str, whole: bool) -> Iterator[str]:
    with io.TextIOWrapper(_stream(path), encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = None
                with suppress(ValueError):
                    row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number} is not a JSON object; a JSON Lines file has one a line")
                yield _text_of(row, column, f"{path}, line {number}")


def _parquet_documents(path: Path, column: str, whole: bool) -> Iterator[str]:
    with _stream(path) as stream:
        file = pq.ParquetFile(pa.BufferReader(stream.read()) if path.suffix.lower() in COMPRESSION else stream)
        _text_of(dict.fromkeys(file.schema_arrow.names), column, str(path))
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            for row in batch.to_pylist():
                yield _text_of(row, column, str(path))


READERS: dict[str, Callable[[Path, str, bool], Iterator[str]]] = {
    **dict.fromkeys((".txt", ".text", ".md"), _text_documents),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _jsonl_documents),
    ".parquet": _parquet_documents,
}


def _hub_documents(data: str, column: str) -> Iterator[str]:
    name, config, split = (*data.split(":", 2), "", "")[:3]
    try:
        import datasets

        for row in datasets.load_dataset(name, config or None, split=split or "train", streaming=True):
            yield _text_of(row, column, data)
    except InputError:
        raise
    except Exception as error:  # datasets raises whatever its network, file and parsing libraries raise
        reason = f"{data} is no file or folder here, and cannot be read as a dataset from the hub"
        raise InputError(f"{reason} ({_one_line(error)}); check the name, or give a local file") from None


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        found = ", ".join(map(str, row)) or "none"
        raise InputError(f'{where} has no column "{column}" (columns: {found}); name the text by --text-column')
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        reason = f'{where}: column "{column}" holds a value of type {type(value).__name__}, not text'
        raise InputError(f"{reason}; name another one by --text-column")
    return value.encode("utf-8", "replace").decode()  # JSON may hold halves of surrogate pairs; tokenizers fail on them


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 300)


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
    written: Iterable[Sequence[int]] | None = None,
) -> Blocks:
    """Blocks of `seq_len` tokens from `data`, out of the file `cache` when it was made with the same settings.

    Documents are shuffled by `seed`, each ends in EOS, and copies are left out. The first ones fill the held-out part,
    the next ones the calibration part; no more are tokenised than fill both. Short data is used up to `epochs` times.
    `written` are the documents of `--data self` (self_written), which are asked for only as far as `epochs` requires.
    Raises InputError for too few tokens, and for a tokenizer with ids outside of the model's `vocab_size`.
    """
    settings = {
        "format": DATA_FORMAT, "data": data, "text_column": text_column, "tokenizer": _tokenizer_fingerprint(tokenizer),
        "vocab_size": vocab_size, "seq_len": seq_len, "calibration_blocks": calibration_blocks,
        "held_out_blocks": held_out_blocks, "seed": seed, "epochs": epochs,
    }  # fmt: skip
    if (stored := _load(cache, settings)) is None:
        least = -(-calibration_blocks // epochs)
        if data != SELF:
            written = _tokenised(_shuffled(filter(str.strip, documents(data, text_column)), seed), tokenizer)
        assert written is not None, "--data self needs the documents that self_written yields"
        ids = _distinct(written, tokenizer.eos_token_id, vocab_size)
        held_out_NT, found, held_out_documents = _pack(ids, held_out_blocks, seq_len)
        if len(held_out_NT) < held_out_blocks:
            remedy = "give more text, or lower --held-out-tokens or --seq-len"
            raise _too_short(data, "held-out", held_out_blocks, seq_len, found, remedy)
        calibration_NT, found, used = _pack(ids, least if data == SELF else calibration_blocks, seq_len)
        if len(calibration_NT) < least:
            remedy = f"give more text (beside the {held_out_documents:,} documents held out) or take fewer steps"
            if len(calibration_NT):
                remedy += f", or repeat it with --epochs {-(-calibration_blocks // len(calibration_NT))}"
            raise _too_short(data, "calibration", least, seq_len, found, remedy)
        tensors = {"calibration": calibration_NT, "held_out": held_out_NT}
        about = {
            "data": data, "documents": used, "held_out_documents": held_out_documents, "tokens": calibration_NT.numel(),
            "held_out_tokens": held_out_NT.numel(), "fingerprint": _fingerprint(*tensors.values()),
        }  # fmt: skip
        stored = _store(cache, tensors, settings, about)
    tensors, about = stored
    return Blocks(_in_order(tensors["calibration"].long(), calibration_blocks, seed), tensors["held_out"].long(), about)


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
        if (key := _fingerprint(ids_T)) not in seen:
            seen.add(key)
            yield ids_T


def _pack(ids: Iterator[torch.Tensor], blocks: int, seq_len: int) -> tuple[torch.Tensor, int, int]:
    """Takes just as many documents as fill `blocks` blocks; the blocks (N, T), tokens found, documents taken."""
    taken, found = [], 0
    while found < blocks * seq_len and (ids_T := next(ids, None)) is not None:
        taken.append(ids_T)
        found += len(ids_T)
    full = min(blocks, found // seq_len) * seq_len
    return torch.cat([torch.empty(0, dtype=torch.int32), *taken])[:full].view(-1, seq_len), found, len(taken)


def self_written(
    model: Any,
    tokenizer: Any,
    *,
    seed: int,
    parts: Path,
    batch_size: int = 64,
    length: int = 512,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Iterator[list[int]]:
    """Documents that the model writes, as token ids without EOS: endless, the reader stops when it has enough.

    Each begins with BOS if the tokenizer adds one to texts; then a token drawn uniformly from the vocabulary makes
    openings diverse, and the model samples the rest, to EOS or `length` tokens (LLM-QAT, arXiv 2305.17888). Batch i
    follows from model, seed and i alone and is kept in the folder `parts`, so that an interrupted run goes on where it
    was. `on_progress` is told of every lot of tokens. The global random state is not touched.
    """
    bos = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id][:1]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    embedded = range(model.get_input_embeddings().num_embeddings)  # may have fewer or more rows than the vocabulary
    ordinary_V = torch.tensor(sorted({*tokenizer.get_vocab().values()}.intersection(embedded) - special))
    settings = {
        "format": DATA_FORMAT, "tokenizer": _tokenizer_fingerprint(tokenizer), "reliable": RELIABLE, "seed": seed,
        "model": _fingerprint(*(p.detach().flatten()[:16].float().cpu() for p in model.parameters())),
        "batch_size": batch_size, "length": length,
    }  # fmt: skip
    for batch in count():
        path = parts / f"{batch:05d}.safetensors"
        if (stored := _load(path, settings)) is None:
            generator = torch.Generator(model.device)
            generator.manual_seed(random.Random(f"{seed}/{batch}").getrandbits(63))
            first_B = torch.randint(len(ordinary_V), (batch_size,), generator=generator, device=model.device).cpu()
            opening_BT = torch.cat([torch.tensor([bos] * batch_size).long(), ordinary_V[first_B, None]], dim=1)
            ids_BT = _sample(model, opening_BT.to(model.device), length, tokenizer.eos_token_id, generator, on_progress)
            stored = _store(path, {"ids": ids_BT.int().cpu()}, settings, {})
        for ids in stored[0]["ids"].tolist():
            end = next((i for i in range(len(bos) + 1, len(ids)) if ids[i] == tokenizer.eos_token_id), len(ids))
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
        output = model(ids_BT if cache is None else ids_BT[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probability_BV = output.logits[:, -1].float().softmax(dim=-1)
        unlikely_BV = probability_BV < probability_BV.amax(dim=-1, keepdim=True).clamp(max=RELIABLE)
        next_BT = torch.multinomial(probability_BV.masked_fill_(unlikely_BV, 0), 1, generator=generator)
        ids_BT = torch.cat([ids_BT, next_BT], dim=1)
        ended_B |= next_BT[:, 0] == (-1 if eos is None else eos)
        on_progress(len(ids_BT))
    return ids_BT


def _fingerprint(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    content = [sorted(tokenizer.get_vocab().items()), tokenizer("A text, 1 2 3.")["input_ids"], tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _store(path: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any], about: dict[str, Any]) -> Stored:
    with replacing(path) as temporary:
        metadata = {"format": "pt", "secateur": json.dumps({"settings": settings, "about": about})}
        save_file(tensors, temporary, metadata=metadata)
    return tensors, about


def _load(path: Path, settings: dict[str, Any]) -> Stored | None:
    """Tensors and `about` of a file that `_store` wrote with the same settings; None if missing, other or broken."""
    with suppress(OSError, SafetensorError, KeyError, TypeError, ValueError), safe_open(path, framework="pt") as file:
        stored = json.loads(file.metadata()["secateur"])
        if stored["settings"] == settings:
            return {name: file.get_tensor(name) for name in file.keys()}, stored["about"]  # noqa: SIM118
    return None
