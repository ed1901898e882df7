"""Pruned checkpoints go through the tools that quantise models and train adapters; what docs/quantise.md says is run.

torchao and llm-compressor are no part of the development environment: `make test-quantise` has them.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from runs import complaint, small_tokenizer
from secateur.describe import describe
from secateur.export import export
from secateur.plan import Plan
from tiny import MIXTURE, dense_logits, load, random_plan, tiny, tokens

PAGE = (Path(__file__).parents[1] / "docs/quantise.md").read_text(encoding="utf-8")
CLOSED = ("layers.0.kv_groups", "layers.1.channels")
WIDE = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 128}
BIASES = {"attention_bias": True, "mlp_bias": True}
CASES: dict[str, dict[str, Any]] = {
    "llama, ragged": {},
    "llama, closed sublayers": {"close": CLOSED},
    "llama, closed sublayers with biases": {"close": CLOSED, **BIASES},
    "llama, uniform": {"shape": "uniform", **WIDE},
    "qwen2, closed sublayers": {"model_type": "qwen2", "close": CLOSED},
    "gemma, closed sublayers, tied": {"model_type": "gemma", "close": CLOSED, "tie_word_embeddings": True},
    "qwen3_moe, ragged, experts gone": {"model_type": "qwen3_moe", "close": CLOSED, "close_experts": (1,), **MIXTURE},
}
UNGROUPED = [name for name in CASES if "moe" not in name]
CLOSE = 0.25
"""Nats that int8 may move any log-probability of these models by; their logits spread over several."""


def pruned(
    folder: Path,
    model_type: str = "llama",
    close: tuple[str, ...] = (),
    shape: str = "ragged",
    multiple: int = 1,
    close_experts: tuple[int, ...] = (),
    **changes: Any,
) -> Path:
    """A tiny random model, pruned at random, channels rounded down to a multiple; its checkpoint."""
    model = tiny(model_type, **changes)
    description = describe(model)
    plan = random_plan(description, close=close, close_experts=close_experts, shape=shape)

    def rounded(group: Any) -> Tensor:
        index = plan.kept[group.name]
        return index if group.attends or group.experts else index[: len(index) // multiple * multiple]

    kept = {group.name: rounded(group) for group in description.groups}
    scales = {name: plan.scales[name][: len(index)] for name, index in kept.items()}
    export(model, None, description, Plan(kept, scales, shape), folder / "model")
    return folder / "model"


def log_probabilities(model: PreTrainedModel) -> Tensor:
    return dense_logits(model, tokens(4, 24)).log_softmax(-1)


def difference(model: PreTrainedModel, other: PreTrainedModel) -> float:
    return float((log_probabilities(model) - log_probabilities(other)).abs().max())


def check_close(quantised: PreTrainedModel, full: PreTrainedModel) -> None:
    """It differs, by no more than rounding may, and would write the same tokens at nearly every position."""
    assert 1e-4 < difference(quantised, full) < CLOSE
    same = log_probabilities(quantised).argmax(-1) == log_probabilities(full).argmax(-1)
    assert same.float().mean() > 0.9


def continued(model: PreTrainedModel, **options: Any) -> Tensor:
    return model.generate(tokens(), max_new_tokens=12, do_sample=False, eos_token_id=None, **options)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def stored(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_files(folder: Path, original: Path) -> None:
    """No pickles, and fewer bytes than before: at most 5 of 8 of a model with large embeddings and float32 weights."""
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".py", ".yaml"}
    size, before = ((f / "model.safetensors").stat().st_size for f in (folder, original))
    assert size < 0.75 * before


# --- torchao ---------------------------------------------------------------------------------------------------------


def int8(folder: Path, **options: Any) -> PreTrainedModel:
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return load(folder, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig()), **options)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torchao_makes_every_linear_map_int8(case: dict[str, Any], tmp_path: Path) -> None:
    folder = pruned(tmp_path, **case)
    full, quantised = load(folder), int8(folder)
    check_close(quantised, full)
    assert linears(quantised).keys() == linears(full).keys()
    for name, linear in linears(quantised).items():
        exact, weight = full.get_submodule(name).weight, linear.weight
        assert weight.qdata.dtype == torch.int8 and weight.qdata.shape == exact.shape
        step = exact.abs().amax(1, keepdim=True) / 127
        assert ((weight.dequantize() - exact).abs() <= 0.51 * step).all()
        full.get_submodule(name).weight.data = weight.dequantize().detach().clone()
    assert difference(quantised, full) < 1e-4, "it computes with what the integers stand for"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_int8_model_saved_by_torchao_loads_as_it_was(case: dict[str, Any], tmp_path: Path) -> None:
    folder = pruned(tmp_path, **case)
    quantised = int8(folder)
    quantised.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8")
    assert torch.equal(dense_logits(again, tokens()), dense_logits(quantised, tokens()))
    assert torch.equal(continued(again), continued(quantised, use_cache=False))
    integers = sum(
        t.numel() for n, t in stored(tmp_path / "int8").items() if n.endswith("qdata") and t.dtype == torch.int8
    )
    assert integers == sum(m.weight.numel() for m in linears(quantised).values()) > 0
    if case in [CASES[name] for name in UNGROUPED]:  # of a mixture, most weights are experts', which stay float32
        check_files(tmp_path / "int8", folder)


def test_torchao_makes_fused_experts_int8_where_they_are_named(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    folder = pruned(tmp_path, **CASES["qwen3_moe, ragged, experts gone"])
    names = torchao.FqnToConfig({r"re:.*experts\.(gate_up|down)_proj": torchao.Int8WeightOnlyConfig()})
    quantised = load(folder, quantization_config=TorchAoConfig(names), experts_implementation="eager")
    check_close(quantised, load(folder))
    quantised.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8", experts_implementation="eager")
    assert torch.equal(dense_logits(again, tokens()), dense_logits(quantised, tokens()))
    check_files(tmp_path / "int8", folder)
    experts = {n: p for n, p in load(folder).named_parameters() if "experts" in n}
    packed = {n: t for n, t in stored(tmp_path / "int8").items() if n.endswith("qdata")}
    assert {t.dtype for t in packed.values()} == {torch.int8} and len(packed) == len(experts)
    assert sum(t.numel() for t in packed.values()) == sum(p.numel() for p in experts.values())


def test_groups_of_torchao_take_aligned_widths_only(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    ragged = pruned(tmp_path / "ragged", **WIDE)
    aligned = pruned(tmp_path / "aligned", multiple=32, close=CLOSED, **WIDE)
    grouped = torchao.PerGroup(32)
    for config in (
        torchao.IntxWeightOnlyConfig(torch.int4, grouped),
        torchao.Int8WeightOnlyConfig(granularity=grouped),
    ):
        with pytest.raises(RuntimeError, match="conversion of the weights"):
            load(ragged, quantization_config=TorchAoConfig(config))
        quantised = load(aligned, quantization_config=TorchAoConfig(config))
        assert all(hasattr(m.weight, "qdata") for m in linears(quantised).values())
        assert difference(quantised, load(aligned)) < 1
        quantised.save_pretrained(tmp_path / "saved")
        assert torch.equal(dense_logits(load(tmp_path / "saved"), tokens()), dense_logits(quantised, tokens()))


def test_torchaos_int4_kernels_leave_widths_that_do_not_divide_without_a_word() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    linear = nn.Linear(83, 64)
    torchao.quantize_(linear, torchao.Int4WeightOnlyConfig(group_size=32))
    assert type(linear.weight.data) is Tensor and linear.weight.dtype == torch.float32


def test_a_quantised_model_is_refused_before_anything_is_learned(capsys, text, tmp_path) -> None:
    folder = pruned(tmp_path, shape="uniform", **WIDE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "torchao"}}))
    said = "the model is quantised (torchao); prune its full-precision checkpoint, then quantise"
    for command in (
        ["inspect", folder],
        ["prune", folder, "--sparsity", "0.5", "--data", text, "--out", tmp_path / "run"],
    ):
        assert said in complaint(capsys, *command)
    assert not (tmp_path / "run" / "gates.safetensors").exists()


# --- llm-compressor --------------------------------------------------------------------------------------------------


def compressed(folder: Path, out: Path, **arguments: Any) -> None:
    """Quantises the checkpoint with llm-compressor, weights only."""
    llmcompressor = pytest.importorskip("llmcompressor")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import QuantizationModifier

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    model = load(folder)
    recipe = QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head", "re:.*mlp.gate$"])
    llmcompressor.oneshot(model=model, recipe=recipe, trust_remote_code_model=True)
    model.save_pretrained(out, save_compressed=True)


@pytest.mark.parametrize("name", [*UNGROUPED, "qwen3_moe, uniform"])
def test_llm_compressor_packs_int8_and_it_loads(name: str, tmp_path: Path) -> None:
    case = CASES.get(name, {"model_type": "qwen3_moe", "shape": "uniform", **MIXTURE})
    folder = pruned(tmp_path, **case)
    compressed(folder, tmp_path / "int8", num_bits=8, strategy="channel")
    check_close(load(tmp_path / "int8"), load(folder))
    check_files(tmp_path / "int8", folder)
    names = {name.removesuffix(".weight_packed") for name in stored(tmp_path / "int8") if "packed" in name}
    assert names >= linears(load(folder)).keys()


def test_llm_compressor_calibrates_layer_by_layer(tmp_path: Path) -> None:
    llmcompressor = pytest.importorskip("llmcompressor")
    from datasets import Dataset
    from llmcompressor.modifiers.gptq import GPTQModifier

    folder = pruned(tmp_path, close=CLOSED)
    model = load(folder)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * 32} for row in tokens(8, 32)]
    llmcompressor.oneshot(
        model=model,
        tokenizer=small_tokenizer(),
        dataset=Dataset.from_list(rows),
        recipe=GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        max_seq_length=32,
        num_calibration_samples=len(rows),
        trust_remote_code_model=True,
    )
    model.save_pretrained(tmp_path / "gptq", save_compressed=True)
    check_close(load(tmp_path / "gptq"), load(folder))
    assert {t.dtype for n, t in stored(tmp_path / "gptq").items() if n.endswith("proj.weight")} == {torch.int8}


def test_groups_of_llm_compressor_take_aligned_widths_only(tmp_path: Path) -> None:
    group = {"num_bits": 4, "strategy": "group", "group_size": 32}
    aligned = pruned(tmp_path / "aligned", multiple=32, close=CLOSED, **WIDE)
    compressed(aligned, tmp_path / "int4", **group)
    assert 1e-3 < difference(load(tmp_path / "int4"), load(aligned)) < 1
    with pytest.raises(ValueError, match="not divisible by group_size"):
        compressed(pruned(tmp_path / "ragged", **WIDE), tmp_path / "no", **group)


# --- adapters --------------------------------------------------------------------------------------------------------

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model: PreTrainedModel, targets: Any = "all-linear", **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options))


def train(model: Any) -> list[float]:
    """Five steps on one batch; the loss at each."""
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        assert all(("lora_" in n) == (p.grad is not None) for n, p in model.named_parameters())
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("targets", ["all-linear", PROJECTIONS], ids=["all-linear", "by name"])
@pytest.mark.parametrize("base", ["float32", "int8"])
@pytest.mark.parametrize("name", [name for name in CASES if "biases" not in name])
def test_lora_trains_is_saved_and_merges(name: str, base: str, targets: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = pruned(tmp_path, **CASES[name])
    read = load if base == "float32" else int8
    model = adapted(read(folder), targets)
    found = {n.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
             for n, _ in model.named_parameters() if "lora_A" in n}  # fmt: skip
    assert found >= linears(load(folder)).keys()
    assert ("model.layers.2.mlp.experts" in found) == ("moe" in name), "experts, too"
    losses = train(model)
    assert losses == sorted(losses, reverse=True)
    model.eval()
    assert difference(model, read(folder)) > 0.5
    model.save_pretrained(tmp_path / "lora")
    assert {p.suffix for p in (tmp_path / "lora").iterdir()} == {".json", ".safetensors", ".md"}
    again = peft.PeftModel.from_pretrained(read(folder), tmp_path / "lora").eval()
    assert difference(again, model) < 1e-6
    merged = again.merge_and_unload()
    assert difference(merged, model) < (1e-4 if base == "float32" else CLOSE)
    merged.save_pretrained(tmp_path / "merged")
    assert difference(load(tmp_path / "merged"), merged) < 1e-6


def test_lora_on_a_layer_of_which_a_bias_is_left(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = pruned(tmp_path, close=CLOSED, **BIASES)
    with pytest.raises(ValueError, match=r"Constant\(\) is not supported"):
        adapted(load(folder), PROJECTIONS)
    left = ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
    for model in (adapted(load(folder), PROJECTIONS, exclude_modules=left), adapted(load(folder))):
        assert sum("lora_A" in n for n, _ in model.named_parameters()) == len(linears(load(folder)))
        losses = train(model)
        assert losses[-1] < losses[0]


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
def test_what_the_page_shows_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torchao", "llmcompressor", "peft"):
        if f"from {package}" in block:
            pytest.importorskip(package)
    pruned(tmp_path / "RUN", close=CLOSED)
    pruned(tmp_path / "MIXTURE_RUN", **CASES["qwen3_moe, ragged, experts gone"])
    pruned(tmp_path / "ALIGNED_RUN", multiple=32, **WIDE)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "quantise.md", "exec"), {})
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*RUN/*")}
    assert written >= set(re.findall(r'save_pretrained\("(.*?)"', block))
