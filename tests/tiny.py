"""Tiny random models of every architecture, and random plans for them: what the tests of pruning work on."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from secateur.attach import attached
from secateur.describe import Description
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
    config = AutoConfig.for_model(model_type, **{key: value for key, value in values.items() if value is not None})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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


def random_plan(description: Description, *, close: tuple[str, ...] = (), seed: int = 2, shape: str = "ragged") -> Plan:
    """Keeps about half of the units, unevenly by layer (evenly if uniform), at gates of 0.2 to 3; `close` loses all."""
    generator = torch.Generator().manual_seed(seed)
    kept, scales = {}, {}
    for number, group in enumerate(description.groups):
        share = 0.5 if shape == "uniform" else (0.35, 0.65, 0.5)[number % 3]
        count = 0 if group.name in close else max(1, round(share * group.units))
        order = torch.randperm(group.units, generator=generator)
        kept[group.name] = order[:count].sort().values
        scales[group.name] = 0.2 + 2.8 * torch.rand(count, generator=generator)
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
