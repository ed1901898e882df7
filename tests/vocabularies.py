"""Tokenizers of the kinds that llama.cpp knows, trained on a page of text, and lines on which they can go wrong."""

import json
import urllib.request
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from secateur.gguf_tokenizer import LLAMA3_WORDS, PIECE, QWEN2_WORDS

LINES = [
    "Hello world", " leading space", "trailing space ", "  two  spaces  ", "tab\tand\nnewline\n\n\nthree", "",
    " ", "\n", "It's we'll they're I'd I'VE don't", "HELLO World hELLO", "3.14159 and 1,000,000",
    "In 2024, 12345 + 67890 = 80235", "0x1F 1e-9 v2.0.1", "x²+y³=½ ⅷ ٣٤", "price: $5.00 (€4,50)!",
    "Äpfel, Öl und Übermut", "naïve café déjà vu", "Привет, мир!", "你好，世界。", "こんにちは世界", "안녕하세요 세계",
    "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก", "emoji 😀👍🏽 👩‍👩‍👧 🇩🇪",
    "zero\u200bwidth\u00a0nbsp\u3000wide", "def f(x):\n    return x**2 # square\n",
    "for (int i = 0; i < n; ++i) { a[i] += 1; }", "SELECT * FROM t WHERE a='b';",
    "<html><body>&nbsp;</body></html>", "https://example.org/path?q=1&r=a%20b#frag", "a@b.co C:\\dir\\file.txt",
    "...!!!???---___===", "“quotes” ‘single’ —", "the cat sat on the mat and the dog ate 12 fish",
    "thecatsatonthemat", "\r\nwindows\r\nlines", "a" * 40, "\u0301combining",
]  # fmt: skip

PAGE = [*LINES, "the cat sat on the mat and the dog ate 12 fish in 1984, it's said, and they'll say so again"] * 3

SPECIAL = ["<unk>", "<s>", "</s>"]

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
ONLY_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

CUTS: dict[str, Any] = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"), ONLY_BYTES]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"), ONLY_BYTES]),
    "smaug-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"), ONLY_BYTES]),
}
"""llama.cpp's names → rules by which text is cut into words."""


def byte_tokenizer(cut: Any = "smollm", size: int = 500, **kwargs: Any) -> PreTrainedTokenizerFast:
    """BPE over bytes, as GPT-2's; `cut`: one of CUTS, or the rules themselves."""
    inner = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe"))
    inner.pre_tokenizer = CUTS.get(cut, cut) if isinstance(cut, str) else cut
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(PAGE, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet,
                                                        special_tokens=SPECIAL, show_progress=False))  # fmt: skip
    return wrapped(inner, **kwargs)


def piece_tokenizer(space_first: bool = True, size: int = 700) -> PreTrainedTokenizerFast:
    """BPE over characters with bytes to fall back on, as SentencePiece's in Llama 2; some characters are not known."""
    steps = [normalizers.Prepend(PIECE)] if space_first else []
    bare = Tokenizer(models.BPE())
    bare.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", PIECE)])
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    plain = [line for line in PAGE if line.isascii()]
    bare.train_from_iterator(plain, trainers.BpeTrainer(vocab_size=size, special_tokens=tokens, show_progress=False))
    vocab = bare.get_vocab()
    # All pairs that make a token are merges, in the order of the tokens: so SentencePiece's are, once converted.
    merges = [
        (token[:cut], token[cut:])
        for token, number in sorted(vocab.items(), key=lambda item: item[1])
        for cut in range(1, len(token))
        if number >= len(tokens) and token[:cut] in vocab and token[cut:] in vocab
    ]
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = bare.normalizer
    inner.add_special_tokens(SPECIAL)
    return wrapped(inner)


def wrapped(inner: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerFast:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def split_by_llamacpp(path: Path, lines: list[str]) -> list[list[int]]:
    """Token ids of each line, by the tokenizer in a GGUF file."""
    from secateur.runtimes import llamacpp

    server = llamacpp.serve(path, 64)
    found = []
    for line in lines:
        body = json.dumps({"content": line, "add_special": True}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body)
        with urllib.request.urlopen(request) as answer:
            found.append(json.load(answer)["tokens"])
    return found
