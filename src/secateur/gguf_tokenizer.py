"""A tokenizer of transformers → the metadata by which llama.cpp splits text alike. Serves `gguf_file.py`.

llama.cpp knows two kinds. BPE over bytes: vocabulary, merges, and the name of one of its own ways to cut text into
words; which one it is, is read off the tokenizer's own rules, never off a model's name. And SentencePiece's BPE with
bytes to fall back on, which has scores in the place of merges: they are the merges' order.
"""

import json
import re
from typing import Any

from secateur.files import InputError

GPT2 = "bytes, in GPT-2's words"
DIGITS = "digits one by one"
BYTES = "bytes"
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

WORDS = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((QWEN2_WORDS, BYTES), False): "qwen2",
    ((LLAMA3_WORDS, BYTES), True): "llama-bpe",
    ((LLAMA3_WORDS, BYTES), False): "smaug-bpe",
}
"""The rules by which text is cut, and whether whole words of the vocabulary pass by the merges → llama.cpp's name."""

PIECE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's sign for a space."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's types of tokens."""


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Writes the tokenizer into a GGUF file of a model with `size` embeddings.

    Raises InputError with one line where llama.cpp has no such tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"the tokenizer ({type(tokenizer).__name__}) has no tokenizer.json, which GGUF is made from")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise InputError(f"the tokenizer is of type {model['type']}; only BPE is written as GGUF")
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if odd:
        raise InputError(f"the tokenizer has a {odd[0]}, which llama.cpp does not know")
    tokens, types = _tokens(rules, size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_space_first(rules))
        writer.add_token_scores(_scores(rules, tokens))
        types = [BYTE if t == NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", s) else t
                 for s, t in zip(tokens, types, strict=True)]  # fmt: skip
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_words(rules))
        writer.add_token_merges([" ".join(pair) for pair in _pairs(model)])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id,
               "unk": tokenizer.unk_token_id}  # fmt: skip
    for name, token in special.items():
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    first, last = _around(tokenizer)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def add_numbers(writer: Any, size: int) -> None:
    """Writes a vocabulary in which no token means anything or ends a text, for work on token ids alone."""
    writer.add_tokenizer_model("rwkv")  # the one kind that names no end of text unless it is told
    writer.add_token_list([f"t{number}" for number in range(size)])
    writer.add_token_types([NORMAL] * size)


def _tokens(rules: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Token and type of every embedding."""
    named: dict[int, tuple[str, int]] = {number: (token, NORMAL) for token, number in rules["model"]["vocab"].items()}
    for added in rules["added_tokens"]:
        named[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
        if added["content"] == rules["model"].get("unk_token"):
            named[added["id"]] = added["content"], UNKNOWN
    if named and max(named) >= size:
        raise InputError(f"the tokenizer has token {max(named)}, the model only {size} embeddings")
    every = [named.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    return [token for token, _type in every], [type_ for _token, type_ in every]


def _pairs(model: dict[str, Any]) -> list[list[str]]:
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]


def _steps(part: dict[str, Any] | None, many: str) -> list[dict[str, Any]]:
    """A rule, or the rules of a sequence."""
    if part is None:
        return []
    return list(part[many]) if part["type"] == "Sequence" else [part]


def _words(rules: dict[str, Any]) -> str:
    """llama.cpp's name for the way that a tokenizer over bytes cuts text."""
    normalizers = [step["type"] for step in _steps(rules["normalizer"], "normalizers")]
    said: list[str] = []
    for step in _steps(rules["pre_tokenizer"], "pretokenizers"):
        pattern = step.get("pattern", {}).get("Regex") if isinstance(step.get("pattern"), dict) else None
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            said.append(GPT2 if step["use_regex"] else BYTES)
        elif step["type"] == "Digits" and step["individual_digits"]:
            said.append(DIGITS)
        elif step["type"] == "Split" and pattern and step["behavior"] == "Isolated" and not step["invert"]:
            said.append(pattern)
        else:
            said.append(json.dumps(step, ensure_ascii=False))
    name = WORDS.get((tuple(said), bool(rules["model"].get("ignore_merges"))))
    # llama.cpp normalises nothing; of these, only Qwen's has a normal form of Unicode before it.
    if name is None or normalizers not in ([], ["NFC"]):
        found = " + ".join([*normalizers, *said]) or "none"
        known = ", ".join(WORDS.values())
        raise InputError(
            f"the tokenizer cuts text in a way that is not known to be one of llama.cpp's ({found}); those of "
            f"{known} are"
        )
    return name


def _space_first(rules: dict[str, Any]) -> bool:
    """Whether text gets a space before it, where a tokenizer is SentencePiece's."""
    steps = _steps(rules["normalizer"], "normalizers") + _steps(rules["pre_tokenizer"], "pretokenizers")
    first = False
    for step in steps:
        metaspace = step["type"] == "Metaspace" and step["replacement"] == PIECE and not step.get("split", True)
        spaces = step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == PIECE
        prefix = step["type"] == "Prepend" and step["prepend"] == PIECE
        if not (metaspace or spaces or prefix):
            raise InputError(f"the tokenizer changes text in a way that llama.cpp does not: {step['type']}")
        first = first or prefix or (metaspace and step.get("prepend_scheme", "always") != "never")
    return first


def _scores(rules: dict[str, Any], tokens: list[str]) -> list[float]:
    """Scores by which llama.cpp merges in the order of the merges.

    It knows no merges: of all neighbours that make a token together, it joins those with the best token. So the merges
    must be all that make tokens, and those that make the same one must follow each other. SentencePiece's are.
    """
    vocab, pairs = rules["model"]["vocab"], _pairs(rules["model"])
    first: dict[str, int] = {}
    last = ""
    for rank, (left, right) in enumerate(pairs):
        token = left + right
        if token in first and token != last:
            raise InputError("the tokenizer's merges are not in an order that scores of tokens can say")
        first.setdefault(token, rank)
        last = token
    known = {tuple(pair) for pair in pairs}
    for token in vocab.keys() - {added["content"] for added in rules["added_tokens"]}:
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if any(left in vocab and right in vocab and (left, right) not in known for left, right in halves):
            raise InputError(f"the tokenizer has no merge for halves of {token!r}; llama.cpp would join them")
    return [-float(first.get(token, len(pairs))) for token in tokens]


def _around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether BOS is put before a text, and EOS behind it."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    first = whole[:1] == [tokenizer.bos_token_id] and whole != bare
    last = whole[-1:] == [tokenizer.eos_token_id] and whole != bare
    own = [tokenizer.bos_token_id] * first + bare + [tokenizer.eos_token_id] * last
    if own != whole:
        raise InputError("the tokenizer puts more around a text than BOS and EOS, which llama.cpp does not")
    return first, last
