"""A tiny model to learn gates on, as an object and as a checkpoint with a tokenizer, and text for it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.budget import Budget, make_budget
from secateur.cli import main
from secateur.describe import Description, describe

SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
WORDS = 61
SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
"""Many small units, so that a budget can be met closely, and large weights, so that they matter."""


def small_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval().requires_grad_(False)


def random_tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Token ids without the special ones, shape (rows, length)."""
    return torch.randint(3, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def described(model: LlamaForCausalLM, sparsity: float, scope: str = "model") -> tuple[Description, Budget]:
    description = describe(model)
    return description, make_budget(description.groups, description.shapes, sparsity, scope)


def small_tokenizer(words: int = WORDS) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel(SPECIAL | {f"w{i}": len(SPECIAL) + i for i in range(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def write_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    small_llama(**changes).to(dtype).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def write_texts(path: Path, documents: int = 40, words: int = 40) -> Path:
    texts = (" ".join(f"w{int(i) - 3}" for i in row) for row in random_tokens(documents, words))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prune_arguments(model: Path, data: Path, out: Path, **options: Any) -> list[str]:
    settings = {"sparsity": 0.3, "data": data, "out": out, "steps": 8, "batch_size": 2, "seq_len": 16,
                "held_out_tokens": 64, "checkpoint_every": 3} | options  # fmt: skip
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items())
    return ["prune", str(model), *(word for pair in pairs for word in pair)]


def secateur(*arguments: Any) -> int:
    """Runs the command line in this process; its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    return 0


def complaint(capsys, *arguments, code=2):
    """Runs a command that must fail; the one line it says."""
    capsys.readouterr()
    assert secateur(*arguments) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("\n") and "Traceback" not in said, said
    return said


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


def gates_of(folder):
    return load_file(folder / "gates.safetensors")


def same_gates(folder, other):
    first, second = gates_of(folder), gates_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
