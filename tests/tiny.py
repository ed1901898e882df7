"""Tiny random models of every architecture, and random plans for them: what the tests of pruning work on."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from secateur.attach import attached
from secateur.describe import Description
from secateur.families import FAMILIES, build
from secateur.plan import Plan

COMMON = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 20, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
LATENT |= {"num_key_value_heads": 6, "head_dim": None}


def tiny(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model of three layers in which nothing is zero or one: norms and biases are random, too."""
    values = COMMON | changes
    values = {key: value for key, value in values.items() if value is not None}
    own = FAMILIES.get(model_type)
    config = own[0](**values) if own else AutoConfig.for_model(model_type, **values)
    torch.manual_seed(seed)
    model = build(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.1, 0.7)
    return model.eval()


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    """Random token ids without the special ones, shape (batch, length)."""
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


MIXTURE = {"num_experts": 5, "num_local_experts": 5, "n_routed_experts": 5, "num_experts_per_tok": 2}
MIXTURE |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 24, "n_shared_experts": 2}


def random_plan(
    description: Description,
    *,
    close: tuple[str, ...] = (),
    close_experts: tuple[int, ...] = (),
    seed: int = 2,
    shape: str = "ragged",
    share: float | None = None,
) -> Plan:
    """Keeps about half of the units, unevenly by layer and expert (evenly if uniform), at gates of 0.2 to 3; `close`
    loses all, as do `close_experts` of every layer; `share`: of all, instead of about half. A sublayer with a gate of
    its own is closed with it, and with its last unit."""
    generator = torch.Generator().manual_seed(seed)
    kept, scales = {}, {}
    nested = any(group.keys for group in description.groups)  # three groups a layer
    for number, group in enumerate(description.groups):
        keep = share or (0.5 if shape == "uniform" else (0.35, 0.65, 0.5)[(number + nested * group.layer) % 3])
        if group.experts and shape == "uniform":
            count = max(1, round(keep * group.width))
            orders = [torch.randperm(group.width, generator=generator)[:count] for _ in range(group.experts)]
            chosen = torch.cat([e * group.width + order for e, order in enumerate(orders)])
        elif group.kv_heads:
            count = max(1, round(keep * group.width))
            keys = kept[group.keys].tolist() if group.keys else range(group.kv_heads)
            orders = [k * group.width + torch.randperm(group.width, generator=generator)[:count] for k in keys]
            chosen = torch.cat([*orders, torch.zeros(0, dtype=torch.int64)])
        else:
            chosen = torch.randperm(group.units, generator=generator)[: max(1, round(keep * group.units))]
        if group.experts:
            chosen = chosen[~torch.isin(chosen // group.width, torch.tensor(close_experts))]
        kept[group.name] = chosen[: 0 if group.name in close else None].sort().values
        scales[group.name] = 0.2 + 2.8 * torch.rand(len(kept[group.name]), generator=generator)
    for group in (g for g in description.groups if g.depth):
        if not (len(kept[group.name]) and len(kept[group.depth])):
            for name in (group.name, group.depth):
                kept[name], scales[name] = kept[name][:0], scales[name][:0]
    return Plan(kept, scales, shape)


@torch.no_grad()
def dense_logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    return model(input_ids).logits


@torch.no_grad()
def gated_logits(model: PreTrainedModel, description: Description, plan: Plan, input_ids: Tensor) -> Tensor:
    with attached(model, description.groups, plan.gates(description.groups)):
        return model(input_ids).logits


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """What a user does."""
    return AutoModelForCausalLM.from_pretrained(folder, **{"trust_remote_code": True, **kwargs}).eval()
