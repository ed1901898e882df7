"""Texts in every format, and a tokenizer of which a test knows every token."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from secateur.data import load_blocks
from secateur.files import InputError

BOS, EOS, WORDS = 1, 2, 400
SPECIAL = {"<unk>": 0, "<s>": BOS, "</s>": EOS}
VOCABULARY = len(SPECIAL) + WORDS
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def make_tokenizer(template=None):
    inner = Tokenizer(models.WordLevel(SPECIAL | {f"w{i}": len(SPECIAL) + i for i in range(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        inner.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def own_words(documents_count, length=20):
    """Documents of `length` words; document i says nothing but its own word i."""
    return [" ".join([f"w{i}"] * length) for i in range(documents_count)]


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({"id": i, column: t}) + "\n" for i, t in enumerate(texts)), encoding="utf-8")
    return str(path)


def parquet_bytes(texts, column="text"):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), sink)
    return sink.getvalue().to_pybytes()


def blocks_of(source, tokenizer, cache, **changes):
    settings = {"vocab_size": VOCABULARY, "seq_len": 16, "calibration_blocks": 8, "held_out_blocks": 3, "seed": 0}
    return load_blocks(source, tokenizer, cache=cache / "data.safetensors", **settings | changes)


def words_in(blocks_NT):
    return set(blocks_NT.flatten().tolist()) - {EOS}


def complaint(call):
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- reading
