"""DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066; `deepseek-moe-16b`), which transformers lacks and whose own code does
not run on transformers 5: Llama with DeepSeek-V2's mixture in all layers but the first ones.

This file needs only torch and transformers ≥ 5.16; it travels in checkpoints pruned by Secateur.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

# Experts are shipped one by one, under the names that Qwen2-MoE has for them.
register_checkpoint_conversion_mapping("deepseek", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


@strict
class DeepseekConfig(LlamaConfig):
    """The keys of DeepSeekMoE's config.json."""

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012
    moe_intermediate_size: int = 1407
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int = 6
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    routed_scaling_factor: float = 1.0
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None

    def validate_router(self) -> None:
        """Refuses what the released models do not have and this file does not compute."""
        if self.scoring_func != "softmax" or self.norm_topk_prob:
            raise ValueError("deepseek: only a softmax router whose weights are not normalised again is implemented")


class DeepseekDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if layer_idx >= config.first_k_dense_replace and layer_idx % config.moe_layer_freq == 0:
            self.mlp = DeepseekV2Moe(config)


class DeepseekModel(LlamaModel):
    config_class = DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]  # noqa: RUF012
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: DeepseekConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.layers = nn.ModuleList([DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.post_init()


class DeepseekForCausalLM(LlamaForCausalLM):
    config_class = DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]  # noqa: RUF012
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: DeepseekConfig, *args: Any, **kwargs: Any) -> None:
        super(LlamaForCausalLM, self).__init__(config, *args, **kwargs)  # which would build a Llama without experts
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
