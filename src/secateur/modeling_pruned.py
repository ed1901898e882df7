"""A causal LM pruned by Secateur: the stock model, its decoder layers built to the widths of `config.per_layer_config`.

This file travels in the checkpoint (`auto_map`) and needs only torch and transformers ≥ 5.16. A layer whose heads or
channels are all gone gets a constant in the place of the sublayer; experts without a channel are gone. The three
imports marked `stock` are those of the checkpoint's own architecture: export writes them, and names the last class.
"""

import copy
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama.configuration_llama import LlamaConfig as StockConfig  # stock
from transformers.models.llama.modeling_llama import LlamaForCausalLM as StockForCausalLM  # stock
from transformers.models.llama.modeling_llama import LlamaModel as StockModel  # stock


@strict
class PrunedConfig(StockConfig):
    """The stock configuration without its demand that the head count divides the hidden size."""

    def validate_architecture(self) -> None:
        """Any number of heads is fine: `head_dim` is written out."""


class Constant(nn.Module):
    """What a linear map with a bias gives when its input is zero."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros_like(bias))

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_BTH) + self.bias


class ClosedMLP(nn.Module):
    """An MLP without channels: its writer's bias is all that is left of it, under the name it had. Without a bias there
    is no module of that name, so that PEFT, which goes by names, does not take it for a linear map."""

    def __init__(self, mlp: nn.Module, writer: str) -> None:
        super().__init__()
        bias = getattr(mlp, writer).bias
        self.left = None if bias is None else writer
        if bias is not None:
            self.add_module(writer, Constant(bias))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros_like(hidden_states) if self.left is None else getattr(self, self.left)(hidden_states)


class ClosedAttention(ClosedMLP):
    """Attention without heads. It caches a zero a token: the cache's length is read off its first layer."""

    def __init__(self, attention: nn.Module, writer: str) -> None:
        super().__init__(attention, writer)
        self.layer_idx = attention.layer_idx

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, past_key_values: Any = None, cache: Any = None, **kwargs: Any
    ) -> Any:
        cache = past_key_values if cache is None else cache  # transformers 5.19 says the one, 5.24 the other
        if cache is not None:
            zeros_B1T1 = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(zeros_B1T1, zeros_B1T1, self.layer_idx)
        return super().forward(hidden_states), None


class Pruned(PreTrainedModel):
    """Builds the stock model at its unpruned widths (on meta when loading), then gives each layer its own."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        dense = copy.copy(config)
        dense.per_layer_config = None
        super().__init__(dense, *args, **kwargs)
        # Without these two the layers would choose other kernels than the masks are made for: silently wrong logits.
        config._attn_implementation = dense._attn_implementation
        config._experts_implementation = dense._experts_implementation
        layers = decoder_layers(self, config)
        for index, layer in enumerate(layers):
            narrow(layer, config, dense, index)
        # One live configuration for all, so that set_attn_implementation reaches every layer.
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = config
        for module in layers.modules():
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config = config
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """All modules here are stock ones, so that their buffers are to be filled the way stock models' are."""
        return False


def decoder_layers(model: nn.Module, config: PreTrainedConfig) -> nn.ModuleList:
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers)
    return next(lists)


def narrow(layer: nn.Module, config: PreTrainedConfig, dense: PreTrainedConfig, index: int) -> None:
    """Gives the stock layer its own widths and the biases that stand for what was removed; a sublayer of width 0 is
    replaced by what is left of it.

    Only modules that were pruned are taken from the narrower layer: some models add to their layers after building
    them, and others derive the width of what was not pruned from the same key.
    """
    layer_config = copy.copy(config.per_layer_config[index])
    for key in config.per_layer_attributes or ():
        if getattr(layer_config, key) == 0:
            setattr(layer_config, key, getattr(dense, key))
    keys = ("narrowed", "widths", "experts", "biases", "closed")
    own = {key: config.secateur.get(key, {}).get(str(index), []) for key in keys}
    narrower = type(layer)(layer_config, index)
    for path in own["narrowed"]:
        layer.set_submodule(path, narrower.get_submodule(path))
    for path, writer, width in own["widths"]:
        set_width(layer.get_submodule(path), writer, width)
    for path, kept in own["experts"]:
        keep_experts(layer.get_submodule(path), kept)
    for path in own["biases"]:
        linear: Any = layer.get_submodule(path)
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    for kind, path, writer in own["closed"]:
        closed_class = ClosedMLP if kind.endswith("channels") else ClosedAttention
        layer.set_submodule(path, closed_class(layer.get_submodule(path), writer))


def set_width(mlp: nn.Module, writer: str, width: int) -> None:
    """Gives an MLP a width that no key of the configuration says: that of shared experts."""
    linears = {name: m for name, m in mlp.named_children() if isinstance(m, nn.Linear)}
    before = linears[writer].in_features
    for name, m in linears.items():
        sizes = (width, m.out_features) if name == writer else (m.in_features, m.out_features // before * width)
        setattr(mlp, name, nn.Linear(*sizes, bias=m.bias is not None, device=m.weight.device, dtype=m.weight.dtype))


def keep_experts(experts: Any, kept: list[int]) -> None:
    """Leaves only the weights of the experts `kept`. The router chooses among all of them as before; what it sends to
    one that is gone comes to nothing, as it did when that one's gates were closed."""
    count, places = len(kept), [len(kept)] * experts.num_experts
    for place, expert in enumerate(kept):
        places[expert] = place
    for name, parameter in list(experts.named_parameters(recurse=False)):
        setattr(experts, name, nn.Parameter(parameter.new_empty(count, *parameter.shape[1:])))
    experts.num_experts = count
    experts._is_expert_parallel = True  # so that all implementations pass over an index of `count`

    def placed(_experts: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_RH, index_RK, weight_RK = args
        place_RK = torch.tensor(places, device=index_RK.device)[index_RK]
        return hidden_RH, place_RK, weight_RK * (place_RK < count)

    experts.register_forward_pre_hook(placed)


class PrunedModel(Pruned, StockModel):
    config_class = PrunedConfig


class PrunedForCausalLM(Pruned, StockForCausalLM):
    config_class = PrunedConfig
