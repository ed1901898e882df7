"""The whole job on the real model that `make model` fetches: SmolLM2-135M-Instruct. Few steps."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.cli import main
from vocabularies import LINES, split_by_llamacpp

MODEL = Path(__file__).parents[1] / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned real model, from text that ships with Python."""
    assert MODEL.is_file(), f"{MODEL} is missing; `make model` fetches it"
    folder = tmp_path_factory.mktemp("real")
    (folder / "text").mkdir()
    for name, text in topics.items():
        (folder / "text" / f"{name.replace('/', '_')}.txt").write_text(text, encoding="utf-8")
    main([
        "prune", str(MODEL), "--sparsity", "0.2", "--data", str(folder / "text"), "--out", str(folder / "run"),
        "--steps", "6", "--seq-len", "128", "--batch-size", "1", "--held-out-tokens", "1024",
    ])  # fmt: skip
    return folder / "run"


def test_exported_logits_equal_gated_logits_in_float32(run: Path) -> None:
    verified = json.loads((run / "verify.json").read_text())
    (comparison,) = verified["comparisons"]
    assert verified["passed"] and comparison["dtype"] == "float32"
    assert comparison["max_difference"] < 1e-3 and comparison["same_top_token"] == 1.0


def test_the_budget_is_met_from_below_within_a_unit(run: Path) -> None:
    results = json.loads((run / "eval.json").read_text())
    removed = results["dense"]["block_parameters"] - results["pruned"]["block_parameters"]
    share = removed / results["dense"]["block_parameters"]
    channel = 3 * 576 / results["dense"]["block_parameters"]
    assert 0.2 <= share < 0.2 + channel
    with safe_open(run / "model" / "model.safetensors", framework="pt") as file:
        counted = sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    assert counted == results["pruned"]["parameters"] == results["dense"]["parameters"] - removed


def test_pruning_a_real_model_a_little_keeps_it_a_language_model(run: Path) -> None:
    results = json.loads((run / "eval.json").read_text())
    assert results["pruned"]["perplexity"] < 4 * results["dense"]["perplexity"]


def test_the_export_generates_in_left_padded_batches_as_it_does_alone(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "model", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(run / "model", trust_remote_code=True, dtype=torch.float32)
    prompts = ["The capital of France is", "Water boils when it is heated because"]
    alone = [
        model.generate(**tokenizer(p, return_tensors="pt"), max_new_tokens=8, do_sample=False)[0, -8:] for p in prompts
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, -8:]
    assert torch.equal(together, torch.stack(alone))
    assert tokenizer.chat_template


def test_llamacpp_splits_and_continues_text_as_transformers_does(run: Path) -> None:
    main(["export", str(run), "--format", "gguf", "--gguf-type", "q8_0"])
    tokenizer = AutoTokenizer.from_pretrained(run / "model", trust_remote_code=True)
    lines = [*LINES, *next(iter(topics.values())).splitlines()]
    for line, ids in zip(lines, split_by_llamacpp(run / "model-q8_0.gguf", lines), strict=True):
        assert ids == tokenizer(line)["input_ids"], line
    main(["verify", str(run), "--runtime", "llamacpp", "--prompts", "3", "--new-tokens", "16"])
    found = json.loads((run / "verify-llamacpp.json").read_text())
    assert all(a["equal"] and a["difference"] < 2e-3 for a in found["pruned"] + found["dense"])
