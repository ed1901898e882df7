"""Makes a real mixture of experts, since none ships in a package: SmolLM2-135M up-cycled to Mixtral's shape.

    python benchmarks/moe/upcycle.py MODEL --data FOLDER [--out .cache/moe/smollm2-moe] [--minutes 30]

MODEL is the GGUF of `make model`, FOLDER holds text/. In every layer the inputs of the MLP are clustered (spherical
k-means); each of 8 experts gets the channels that give most on one cluster, with their weights, and the router a row
for each cluster's centre. Channels that matter everywhere so stand in all experts, where top-2 routing, whose weights
sum to one, leaves them as they were. Then experts and router learn from the dense model on the calibration text;
attention and embeddings are frozen. No loss asks for even routing: how uneven it is, is printed. An existing folder is
kept.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
from judge import TEXTS, Judge, linked_calibration
from secateur.data import load_blocks
from secateur.evaluate import mean_loss, perplexity
from secateur.experts import IMPLEMENTATION
from secateur.files import replacing, write_json
from secateur.inspection import routing, routing_table
from secateur.load import autocast, load
from secateur.objective import distillation_loss

EXPERTS, CHOSEN, WIDTH = 8, 2, 512
"""Experts, experts a token, channels an expert: 1,024 of 1,536 dense channels are active."""
CLUSTERED_ROWS, SEQ_LEN, BATCH = 64, 256, 4
SHARPNESS = 8.0
"""Length of the router's rows, in units of 1 / the typical length of an MLP's input."""
STEPS = 1000
LR = {"experts": 3e-4, "router": 1e-3}
KD_WEIGHT = 2.0
console = Console(highlight=False)


def clustered(x_TH: Tensor, count: int, rounds: int = 20) -> tuple[Tensor, Tensor]:
    """Spherical k-means, farthest points first: unit centres of shape (count, H), and the cluster of every row."""
    unit_TH = F.normalize(x_TH, dim=-1)
    centre_EH = unit_TH[:1]
    for _ in range(count - 1):
        farthest = (unit_TH @ centre_EH.T).max(-1).values.argmin()
        centre_EH = torch.cat([centre_EH, unit_TH[farthest][None]])
    for _ in range(rounds):
        nearest_T = (unit_TH @ centre_EH.T).argmax(-1)
        sums_EH = torch.zeros_like(centre_EH).index_add(0, nearest_T, unit_TH)
        centre_EH = torch.where(sums_EH.norm(dim=-1, keepdim=True) > 0, F.normalize(sums_EH, dim=-1), centre_EH)
    return centre_EH, (unit_TH @ centre_EH.T).argmax(-1)


@torch.no_grad()
def upcycled(dense: PreTrainedModel, rows_NT: Tensor) -> MixtralForCausalLM:
    """The mixture before it is trained."""
    c = dense.config
    own = {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "sliding_window": None}
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "bos_token_id",
            "eos_token_id", "pad_token_id")  # fmt: skip
    config = MixtralConfig(**{key: getattr(c, key) for key in same}, **own, intermediate_size=WIDTH, dtype="float32")
    mixture = MixtralForCausalLM(config).eval()
    kept = {n: p for n, p in dense.state_dict().items() if ".mlp." not in n}
    missing, unexpected = mixture.load_state_dict(kept, strict=False)
    assert not unexpected and all(".mlp." in name for name in missing), (missing, unexpected)
    inputs, activations = _seen(dense, rows_NT)
    for layer, block in enumerate(mixture.model.layers):
        mlp = dense.model.layers[layer].mlp
        centre_EH, cluster_T = clustered(inputs[layer], EXPERTS)
        block.mlp.gate.weight.copy_(centre_EH * SHARPNESS / inputs[layer].norm(dim=-1).median())
        strength_I = mlp.down_proj.weight.norm(dim=0)
        for e in range(EXPERTS):
            mine = activations[layer][cluster_T == e]
            energy_I = (mine * strength_I).square().sum(0)
            channels = energy_I.topk(WIDTH).indices.sort().values
            rows = [mlp.gate_proj.weight[channels], mlp.up_proj.weight[channels]]
            block.mlp.experts.gate_up_proj[e] = torch.cat(rows)
            block.mlp.experts.down_proj[e] = mlp.down_proj.weight[:, channels]
    return mixture


def _seen(dense: PreTrainedModel, rows_NT: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of every MLP and of its down projection, one line a token."""
    inputs: list[list[Tensor]] = [[] for _ in dense.model.layers]
    activations: list[list[Tensor]] = [[] for _ in dense.model.layers]
    handles = []
    for layer, block in enumerate(dense.model.layers):
        for module, found in ((block.mlp, inputs[layer]), (block.mlp.down_proj, activations[layer])):

            def keep(_module, args, found=found):  # type: ignore[no-untyped-def]
                found.append(args[0].flatten(0, -2))

            handles.append(module.register_forward_pre_hook(keep))
    for row in rows_NT.split(1):
        dense.base_model(row, use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts)[1:] for parts in inputs], [torch.cat(parts)[1:] for parts in activations]


def train(mixture: MixtralForCausalLM, dense: PreTrainedModel, rows_NT: Tensor, steps: int, seconds: float) -> int:
    """Experts and router learn from text and dense model; the steps that were made within the time."""
    mixture.requires_grad_(False)
    experts = [p for n, p in mixture.named_parameters() if ".mlp.experts." in n]
    routers = [p for n, p in mixture.named_parameters() if ".mlp.gate." in n]
    for parameter in (*experts, *routers):
        parameter.requires_grad_()
    groups = [{"params": experts, "lr": LR["experts"]}, {"params": routers, "lr": LR["router"]}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    peaks = [group["lr"] for group in adam.param_groups]
    mixture.config._experts_implementation = IMPLEMENTATION  # one expert after the other: fastest on a CPU
    start, batches = time.monotonic(), rows_NT.split(BATCH)
    for step in range(steps):
        spent = max(step / steps, (time.monotonic() - start) / seconds)
        if spent >= 1.0:
            return step
        for group, peak in zip(adam.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, (step + 1) / 20) * 0.5 * (1.0 + math.cos(math.pi * spent))
        ids_BT = batches[step % len(batches)]
        with autocast(ids_BT.device, "auto"):
            with torch.no_grad():
                teacher_BTV = dense(ids_BT, use_cache=False).logits
            student_BTV = mixture(ids_BT, use_cache=False).logits
            loss, ce, kl = distillation_loss(student_BTV, teacher_BTV, ids_BT, KD_WEIGHT, 1.0)
        (loss / (1.0 + KD_WEIGHT)).backward()
        nn.utils.clip_grad_norm_((*experts, *routers), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if step % 50 == 0:
            console.print(f"step {step}: cross-entropy {ce.item():.3f}, KL to the dense model {kl.item():.3f}")
    return steps


def main() -> int:
    """Makes the model where it is not there, and prints how it routes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file or folder of a Llama")
    parser.add_argument("--data", type=Path, required=True, help="folder with text/")
    parser.add_argument("--out", type=Path, default=Path(".cache/moe/smollm2-moe"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=30.0, help="time to train for; the rates fall with it")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    test = str(options.data / TEXTS["wikitext2-test"])
    if not (options.out / "config.json").exists():
        make(options)
    found, tokens = routing(str(options.out), test)
    console.print(routing_table(found, tokens, Path(test).name))
    return 0


def make(options: argparse.Namespace) -> None:
    """Up-cycles, trains, measures and saves."""
    loaded = load(options.model, "cpu", "float32", trust_remote_code=False)
    dense, start = loaded.model, time.monotonic()
    texts = linked_calibration(options.data, options.out.parent / "calibration")
    blocks = load_blocks(
        str(texts), loaded.tokenizer, vocab_size=dense.config.vocab_size, seq_len=SEQ_LEN,
        calibration_blocks=options.steps * BATCH, held_out_blocks=16, seed=7, epochs=4,
        cache=options.out.parent / "data.safetensors",
    )  # fmt: skip
    ids_NT = Judge(loaded.tokenizer, None, options.data).texts["wikitext2-test"]

    def measured(model: PreTrainedModel) -> dict[str, float]:
        return {"wikitext2": perplexity(model, ids_NT).perplexity, "held_out": mean_loss(model, blocks.held_out_NT)}

    mixture = upcycled(dense, blocks.calibration_NT[:CLUSTERED_ROWS])
    figures = {"dense": measured(dense), "before": measured(mixture)}
    steps = train(mixture, dense, blocks.calibration_NT, options.steps, options.minutes * 60)
    mixture.config._experts_implementation = None
    figures["after"] = measured(mixture)
    figures["steps"] = {"made": steps, "tokens": steps * BATCH * SEQ_LEN, "minutes": (time.monotonic() - start) / 60}
    with replacing(options.out) as temporary:
        mixture.save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)
        write_json(temporary / "upcycling.json", figures)
    for name in ("dense", "before", "after"):
        console.print(f"{name}: WikiText-2 {figures[name]['wikitext2']:.2f}, held-out {figures[name]['held_out']:.3f}")
    count = sum(p.numel() for p in mixture.parameters())
    console.print(
        f"{count:,} parameters; {steps} steps of {BATCH} × {SEQ_LEN} in {figures['steps']['minutes']:.0f} min"
    )


if __name__ == "__main__":
    sys.exit(main())
