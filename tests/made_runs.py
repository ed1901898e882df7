"""Run folders that were never run: files as the stages write them, of any size, for the tests of the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from secateur.config import Config
from secateur.config_file import save_config

STEPS = 60


def make_run(
    folder: Path,
    *,
    layers: int = 6,
    heads: int = 8,
    channels: int = 96,
    experts: int = 0,
    seed: int = 0,
    until: str = "bench",
    tasks: int = 3,
    **settings: Any,
) -> Path:
    """A run that came as far as the stage `until`: start, learn, plan, verify, eval, bench."""
    generator = np.random.default_rng(seed)
    values: dict[str, Any] = {"model": "org/Small-1B", "sparsity": 0.4, "data": "texts/", "steps": STEPS} | settings
    config = Config(**values, seed=seed).resolved()
    save_config(config, folder / "config.yaml")
    reached = ("start", "learn", "plan", "verify", "eval", "bench").index(until)
    if reached < 1:
        return folder
    _metrics(folder, config, generator)
    groups = _gates(folder, config, generator, layers, heads, channels, experts)
    if reached >= 2:
        _plan(folder, groups)
    if reached >= 3:
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text(json.dumps({"transformers_version": "5.19.0"}))
        comparison = {"dtype": "float32", "max_difference": 6.6e-5, "mean_difference": 5.4e-6, "allowed": 3.9e-4,
                      "same_top_token": 1.0, "tokens": 1024, "passed": True}  # fmt: skip
        _write(folder / "verify.json", {"passed": True, "comparisons": [comparison]})
    if reached >= 4:
        _write(folder / "eval.json", evaluation(generator, 1 - config.sparsity, tasks))
        _write(folder / "timings.json", {"load": 17.5, "data": 64.7, "learn": 90.3, "plan": 6.9, "eval": 34.3})
    if reached >= 5:
        _write(folder / "bench-vllm.json", made_bench(config.sparsity))
        agreement = {"equal": True, "same": 32, "difference": 2e-5, "tokens": None, "logprobs": None, "margin": 0.0}
        _write(folder / "verify-vllm.json", {"runtime": "vLLM 0.32.0", "reference": "transformers 5.19.0",
               "passed": True, "tolerance": 8e-4, "new_tokens": 32, "updates": [], "pruned": [agreement] * 4,
               "dense": [agreement] * 4})  # fmt: skip
    return folder


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _metrics(folder: Path, config: Config, generator: np.random.Generator) -> None:
    noise, target = generator.normal(0, 0.1, config.steps), 1 - config.sparsity
    lines = []
    for i in range(config.steps):
        done = i / max(1, config.steps - 1)
        kept = target + config.sparsity * float(np.exp(-6 * done))
        ce, kl = 2.6 + 0.9 * float(np.exp(-3 * done)) + noise[i], 0.2 + 0.3 * float(np.exp(-2 * done))
        lines.append({"step": i + 1, "loss": ce + 2 * kl, "ce": ce, "kl": kl, "kept": kept, "score": kept - 0.01,
                      "target": target, "mu": 0.15 - 0.1 * done, "lr": 0.05 * (1 - done), "lambda1": [0.3 * done],
                      "lambda2": [5.0 + 0.01 * done], "lambda3": [0.02 * done]})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _gates(
    folder: Path, config: Config, generator: np.random.Generator, layers: int, heads: int, channels: int, experts: int
) -> dict[str, np.ndarray]:
    groups = {}
    for layer in range(layers):
        sizes = {"kv_groups": heads, ("expert_channels" if experts else "channels"): channels * (experts or 1)}
        for kind, units in sizes.items():
            share = 1 - config.sparsity * (0.3 + 1.4 * layer / max(1, layers - 1))
            z = generator.normal(1.0, 0.2, units).clip(0.05) * (generator.random(units) < share)
            if kind == "expert_channels":
                z[: channels if layer % 3 == 0 else 0] = 0  # an expert that is gone
            groups[f"layers.{layer}.{kind}"] = z.astype(np.float32)
    about = {"format": 1, "architecture": "0123456789abcdef", "method": config.method, "tokens": 61440,
             "data": {"data": config.data, "documents": 43, "fingerprint": "2a6afe85eabc6356"},
             "fixing": {"step": config.steps // 2, "kept_before": 0.63, "kept_after": 0.6, "held_out_before": 3.0,
                        "held_out_after": 3.01},
             "versions": {"secateur": "0.1.0", "torch": "2.13.0", "transformers": "5.19.0"},
             "experts": {name: experts for name in groups if experts and "expert" in name}}  # fmt: skip
    save_file(groups, folder / "gates.safetensors", metadata={"secateur": json.dumps(about)})
    return groups


def _plan(folder: Path, groups: dict[str, np.ndarray]) -> None:
    kept = {name: np.flatnonzero(z) for name, z in groups.items()}
    rounding = {"allowed": 0.6, "open_gates": 0.6, "kept": 0.6, "closed": 0, "reopened": 0, "reopened_scale": 0.0,
                "held_out_learned": 3.0, "held_out_planned": 3.0}  # fmt: skip
    _write(folder / "plan.json", {
        "format": 1, "architecture": "0123456789abcdef", "shape": "ragged", "rounding": rounding,
        "kept": {name: index.tolist() for name, index in kept.items()},
        "scales": {name: groups[name][index].astype(float).round(6).tolist() for name, index in kept.items()},
    })  # fmt: skip


def evaluation(generator: np.random.Generator, kept: float, tasks: int = 3) -> dict[str, Any]:
    """What eval.json holds."""
    dense = {"parameters": 134_515_008, "active_parameters": 134_515_008, "block_parameters": 106_168_320,
             "flops_per_token": 268_959_744, "kv_bytes_per_token": 46_080, "perplexity": 14.01, "loss": 2.64,
             "loss_stderr": 0.06, "windows": 20, "length": 512, "tokens": 10_220,
             "disk_bytes": 538_060_032}  # fmt: skip
    pruned = {name: int(value * (0.2 + 0.8 * kept)) if value > 1000 else value for name, value in dense.items()}
    worse = float(np.exp(1.6 * (1 - kept) ** 1.3 + 0.05 * generator.random()))
    pruned |= {"perplexity": dense["perplexity"] * worse, "loss": 2.64 + float(np.log(worse)), "tokens": 10_220}
    rounding = {"allowed": kept, "open_gates": kept, "kept": kept, "closed": 0, "reopened": 0, "reopened_scale": 0.0,
                "held_out_learned": 3.0, "held_out_planned": 3.0}  # fmt: skip
    names = ("arc_easy", "piqa", "hellaswag", "winogrande", "openbookqa")[:tasks]
    found = {}
    for i, name in enumerate(names):
        first, drop = 0.4 + 0.06 * i, 0.2 * (1 - kept)
        found[name] = {
            "dense": {"acc": first, "acc_stderr": 0.012}, "pruned": {"acc": first - drop, "acc_stderr": 0.012},
            "difference": {"acc": -drop, "acc_stderr": 0.009}, "items": 500, "of": 2376, "limit": 500, "fewshot": 0,
            "cut": 0, "joined": 0, "versions": {"lm_eval": "0.4.13", "task": 1.0},
        }  # fmt: skip
    sample = {"prompt": "Water boils at a temperature of", "dense": " 100 degrees Celsius at sea level.",
              "pruned": " 100 degrees, the heat of the sea.", "text": " 100 °C under normal pressure."}  # fmt: skip
    return {
        "method": "deterministic", "text": "wiki.test.raw.txt", "join": "raw", "dense": dense, "pruned": pruned,
        "rounding": rounding, "updates": [], "fixing": None, "tasks": found, "samples": [sample, sample],
        "loss_change_stderr": 0.012,
        "overlap": {"run_words": 13, "calibration_words": 6661, "text": {"words": 6117, "covered": 0, "runs": 0},
                    "tasks": {}},
        "seconds": {"learn": 90.3, "eval": 34.3}, "versions": {"secateur": "0.1.0", "torch": "2.13.0"},
    }  # fmt: skip


def made_bench(sparsity: float) -> dict[str, Any]:
    def spread(value: float) -> dict[str, Any]:
        return {"median": value, "low": 0.97 * value, "high": 1.04 * value, "values": [value]}

    fast = 1 / (1 - 0.8 * sparsity)
    rows = [
        {"metric": metric, "batch_size": batch, "unit": "tokens/s", "dense": spread(speed),
         "pruned": spread(speed * fast), "speedup": spread(fast * share), "ideal": {"speedup": fast, "by": "flops"}}
        for metric, batch, speed, share in (("prefill", 1, 400.0, 0.97), ("prefill", 8, 900.0, 0.99),
                                            ("decode", 1, 20.0, 0.9), ("decode", 8, 110.0, 0.93))
    ]  # fmt: skip
    model = {"versions": {"torch": "2.13.0", "vllm": "0.32.0"}, "implementation": "vLLM", "peak_bytes": 2**30,
             "weight_bytes": 2**29, "kv_tokens": 4096, "kv_tokens_by": "engine", "kv_space_bytes": 2**28,
             "parameters": 134_515_008, "odd_widths": {"64": {}, "32": {}}, "widths": 12}  # fmt: skip
    return {"format": 1, "runtime": "vllm", "dtype": "float32", "settings": {"prompt_tokens": 256, "new_tokens": 32,
            "rounds": 5}, "machine": {"cpu": "a processor", "cores": 2}, "dense": model, "pruned": model,
            "timings": rows}  # fmt: skip
