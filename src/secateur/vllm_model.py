"""Pruned models in vLLM: the stock model of vLLM, its layers built from the widths of `config.per_layer_config`.

No layer is written anew: vLLM's own classes read their widths from the configuration, so each layer is built while the
configuration says what that layer has, and then loses what is gone from it altogether. vLLM's kernels, loaders,
compilation, tensor and pipeline parallelism stay as they are.

Shape suffixes: T tokens, H hidden size, E experts that the router knows, K experts a token.
"""

import copy
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router
from vllm.model_executor.models import utils
from vllm.model_executor.utils import set_weight_attrs

from secateur import vllm_plugin
from secateur.vllm_plugin import PREFIX

EXPERTS_WIDTH = "moe_intermediate_size"
"""What experts alone are told of their width by: shared experts are as wide as a multiple of it in the unpruned model
still, so no model of vLLM's hears of it but its experts."""


@cache
def sibling(name: str) -> type[nn.Module]:
    """The pruned sibling of a model of vLLM's: `PrunedLlamaForCausalLM` extends its `LlamaForCausalLM`."""
    stock = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    return type(
        name,
        (Pruned, stock),
        {"__module__": vllm_plugin.__name__, "__doc__": f"{stock.__name__} with widths by layer."},
    )


class Pruned(nn.Module):
    """What a pruned class has over the stock one: it builds itself layer by layer."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        with layers_narrowed(vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        whole = vllm_config.quant_config is None and vllm_config.parallel_config.world_size == 1
        self.layer_sizes = sizes_of_layers(self.named_parameters()) if whole else None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Raises ValueError where a layer was built for other weights than come: vLLM's loaders take a part of those
        that are too large without a word."""
        sizes: Counter[int] = Counter()
        loaded = super().load_weights(counted(weights, sizes))  # type: ignore[misc]
        for index, size in (self.layer_sizes or {}).items():
            if sizes[index] != size:
                name = type(self).__name__
                raise ValueError(
                    f"vLLM's {name.removeprefix(PREFIX)} cannot be pruned layer by layer: layer {index} would hold "
                    f"{size} weights, the checkpoint has {sizes[index]}; export with `--shape uniform`"
                )
        return loaded


def counted(weights: Iterable[tuple[str, Tensor]], sizes: Counter[int]) -> Iterator[tuple[str, Tensor]]:
    """The weights, as they come; adds the number of those in each decoder layer to `sizes`."""
    for name, tensor in weights:
        if found := re.search(r"(?:^|\.)layers\.(\d+)\.", name):
            sizes[int(found[1])] += tensor.numel()
        yield name, tensor


def sizes_of_layers(tensors: Iterable[tuple[str, Tensor]]) -> Counter[int]:
    """Number of weights in each decoder layer."""
    sizes: Counter[int] = Counter()
    for _ in counted(tensors, sizes):
        pass
    return sizes


@contextmanager
def layers_narrowed(vllm_config: VllmConfig) -> Iterator[None]:
    """Within the context, the layers that a model of vLLM's builds get the widths of their checkpoint."""
    model_config = vllm_config.model_config
    config, text_config = model_config.hf_config, model_config.hf_text_config
    plain = copy.copy(config)  # the one that the model keeps: no ambiguity, and the dense widths where none was changed
    plain.per_layer_config = None
    stock_layers = utils.make_layers

    def make_layers(count: int, layer_fn: Callable[..., nn.Module], prefix: str) -> Any:
        def narrow(prefix: str) -> nn.Module:
            index = utils.extract_layer_index(prefix)
            with said_of_layer(plain, config, index):
                layer = layer_fn(prefix=prefix)
            forget_sizes(layer)
            finish(layer, prefix, own(config, index), vllm_config)
            return layer

        return stock_layers(count, narrow, prefix)

    def make_experts(stock: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            index = utils.extract_layer_index(kwargs["prefix"])
            if EXPERTS_WIDTH in (config.per_layer_attributes or ()):
                kwargs["intermediate_size"] = getattr(config.per_layer_config[index], EXPERTS_WIDTH)
            changes = own(config, index)["experts"]
            if not changes:
                return stock(*args, **kwargs)
            [(_path, kept)] = changes  # a layer has one row of experts, whatever vLLM calls it
            router = PlacedRouter(stock_router(kwargs), kept, kwargs["num_experts"])
            return stock(*args, **{**kwargs, "num_experts": len(kept), "router": router})

        return make

    try:
        model_config.hf_config, model_config.hf_text_config = plain, plain
        with replaced("make_layers", lambda _stock: make_layers), replaced("FusedMoEFactory", make_experts):
            yield
    finally:
        model_config.hf_config, model_config.hf_text_config = config, text_config


@contextmanager
def replaced(name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """Within the context, a function that vLLM's models import by name is another one, in each of their modules."""
    package = utils.__name__.rpartition(".")[0]
    modules = [m for n, m in list(sys.modules.items()) if n.startswith(f"{package}.") and hasattr(m, name)]
    before = [(m, getattr(m, name)) for m in modules if m is not utils]
    try:
        for module, stock in before:
            setattr(module, name, replacement(stock))
        yield
    finally:
        for module, stock in before:
            setattr(module, name, stock)


@contextmanager
def said_of_layer(plain: Any, config: Any, index: int) -> Iterator[None]:
    """Within the context, `plain` says the widths of layer `index`; those of a sublayer that is gone stay dense, since
    vLLM cannot build it with none."""
    keys = set(config.per_layer_attributes or ()) - {EXPERTS_WIDTH}
    before, layer = {key: getattr(plain, key) for key in keys}, config.per_layer_config[index]
    hidden = plain.hidden_size
    try:
        for key, dense in before.items():
            setattr(plain, key, getattr(layer, key) or dense)
        if hasattr(plain, "head_dim"):
            plain.hidden_size = HiddenSize(hidden, plain.num_attention_heads, plain.head_dim)
        yield
    finally:
        for key, value in before.items():
            setattr(plain, key, value)
        plain.hidden_size = hidden


class HiddenSize(int):
    """A hidden size that, divided by the number of heads, gives the size of a head: so some models of vLLM's find it,
    which is right in unpruned models only."""

    def __new__(cls, size: int, heads: int, head_dim: int) -> "HiddenSize":
        self = super().__new__(cls, size)
        self.heads, self.head_dim = heads, head_dim
        return self

    heads: int
    head_dim: int

    def __floordiv__(self, other: int) -> int:
        return self.head_dim if other == self.heads else int(self) // other


def forget_sizes(layer: nn.Module) -> None:
    """Leaves plain integers in a layer that was built: compilation knows no others."""
    for module in layer.modules():
        for name, value in vars(module).items():
            if type(value) is HiddenSize:
                setattr(module, name, int(value))


def own(config: Any, index: int) -> dict[str, list[Any]]:
    """What the checkpoint says of one layer beyond its widths; see `modeling_pruned.narrow`."""
    return {key: config.secateur.get(key, {}).get(str(index), []) for key in ("widths", "experts", "biases", "closed")}


def finish(layer: nn.Module, prefix: str, changes: dict[str, list[Any]], vllm_config: VllmConfig) -> None:
    """Takes from a layer what no key of the configuration says: widths of shared experts, biases that stand for what
    was removed, sublayers that are gone."""
    for path, writer, width in changes["widths"]:
        set_width(layer.get_submodule(path), writer, width, vllm_config)
    for path in changes["biases"]:
        linear: Any = layer.get_submodule(path)
        linear.bias = bias(linear)
    for _kind, path, writer in changes["closed"]:
        sublayer = layer.get_submodule(path)
        linear = getattr(sublayer, writer)
        layer.set_submodule(path, Closed(writer, linear.bias))
        # What is not there caches nothing: vLLM gives a cache to the attention layers that it finds here.
        static = vllm_config.compilation_config.static_forward_context
        for name in [n for n in static if n.startswith(f"{prefix}.{path}.")]:
            del static[name]


def bias(linear: Any) -> nn.Parameter:
    """A bias for a linear map that was made without one."""
    parameter = nn.Parameter(torch.zeros(linear.output_size, dtype=linear.params_dtype), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": linear.weight_loader})
    return parameter


def set_width(mlp: Any, writer: str, width: int, vllm_config: VllmConfig) -> None:
    """Gives an MLP of shared experts another width, in place, since vLLM's experts hold it too."""
    for name, linear in list(mlp.named_children()):
        if not hasattr(linear, "input_size"):
            continue
        options: dict[str, Any] = {"bias": linear.bias is not None, "prefix": linear.prefix}
        options |= {"quant_config": vllm_config.quant_config, "disable_tp": linear.tp_size == 1}
        if name == writer:
            options |= {"input_size": width, "output_size": linear.output_size, "reduce_results": linear.reduce_results}
        else:
            options |= {"input_size": linear.input_size, "output_sizes": [width] * len(list(linear.output_sizes))}
        setattr(mlp, name, type(linear)(**options))


class Constant(nn.Module):
    """What is left of a linear map whose input is gone: its bias."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias


class Closed(nn.Module):
    """A sublayer without heads or channels, in the place and under the names of the one that it was."""

    def __init__(self, writer: str, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.writer = writer
        self.add_module(writer, Constant(bias))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Of an MLP's one argument, or attention's `hidden_states`: zeros of that shape, or the bias."""
        hidden_TH = kwargs["hidden_states"] if "hidden_states" in kwargs else args[-1]
        found = getattr(self, self.writer).bias
        return torch.zeros_like(hidden_TH) if found is None else found.expand_as(hidden_TH).contiguous()


def stock_router(kwargs: dict[str, Any]) -> Any:
    """The router that vLLM would give to these experts."""
    assert kwargs.get("router") is None and not kwargs.get("enable_eplb"), "experts that are moved cannot be placed"
    scaled_later = kwargs.get("apply_routed_scale_to_output", False)
    return create_fused_moe_router(
        top_k=kwargs["top_k"],
        global_num_experts=kwargs["num_experts"],
        renormalize=kwargs.get("renormalize", True),
        use_grouped_topk=kwargs.get("use_grouped_topk", False),
        num_expert_group=kwargs.get("num_expert_group"),
        topk_group=kwargs.get("topk_group"),
        scoring_func=kwargs.get("scoring_func", "softmax"),
        routed_scaling_factor=1.0 if scaled_later else kwargs.get("routed_scaling_factor", 1.0),
        e_score_correction_bias=kwargs.get("e_score_correction_bias"),
        custom_routing_function=kwargs.get("custom_routing_function"),
    )


class PlacedRouter(BaseRouter):
    """Chooses among all experts as the stock router does; what goes to one that is gone gets weight 0, as it came to
    nothing when that one's gates were closed."""

    def __init__(self, stock: Any, kept: list[int], experts: int) -> None:
        super().__init__(top_k=stock.top_k, global_num_experts=len(kept))
        self.stock = stock
        place_E = torch.full((experts,), -1, dtype=torch.int32, device="cpu")
        place_E[torch.tensor(kept, device="cpu")] = torch.arange(len(kept), dtype=torch.int32, device="cpu")
        self.place_E = place_E.to(torch.get_default_device())

    @property
    def routing_method_type(self) -> RoutingMethodType:
        """A kind that no kernel has built in, so that kernels ask this router."""
        return RoutingMethodType.Custom

    def _compute_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        weight_TK, expert_TK = self.stock._compute_routing(
            hidden_states, router_logits, indices_type, input_ids=input_ids
        )
        place_TK = self.place_E[expert_TK.long()]
        return weight_TK * (place_TK >= 0), place_TK.clamp(min=0).to(expert_TK.dtype)
