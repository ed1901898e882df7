"""Weights that are not in memory, or not on the device: read, and given other values for a while.

Serves `--offload` and models that do not fit. accelerate leaves such a parameter on the meta device; whenever its
module runs, what the hook's `weights_map` has under its name takes its place, in the dtype that the parameter has on
the meta device. So casting parameters in place works as it does in memory. Other values go into the map.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

Change = Callable[[Any], Tensor]
"""A parameter's own value (None: the module has none) → the value it is to have, in any floating-point dtype."""


def is_offloaded(model: nn.Module) -> bool:
    """Whether some of its parameters are."""
    return any(parameter.is_meta for parameter in model.parameters())


def weight_of(model: nn.Module, name: str) -> Tensor:
    """A parameter's values, read from where accelerate has offloaded them."""
    parameter = model.get_parameter(name).data
    if not parameter.is_meta:
        return parameter
    module, _, own = name.rpartition(".")
    weights = _hook(model.get_submodule(module)).weights_map
    where = weights.dataset.index.get(weights.prefix + own)
    if where is None:  # offloaded to memory
        offloaded: Tensor = weights[own]
        return offloaded
    with safe_open(where["safetensors_file"], framework="pt") as file:  # in the file's own dtype, cast only once
        value: Tensor = file.get_tensor(where["weight_name"])
    return value


@contextmanager
def changed(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """Within the context parameters, by name, have other values, rounded to the dtype of their modules' own; those that
    are offloaded get them anew whenever they are read."""
    with ExitStack() as stack:
        for name, change in changes.items():
            path, _, own = name.rpartition(".")
            module = model.get_submodule(path)
            before = getattr(module, own)
            stack.callback(setattr, module, own, before)
            like = next(module.parameters(recurse=False)) if before is None else before
            if like.is_meta:
                hook = _hook(module)
                weights = hook.weights_map
                stack.callback(setattr, hook, "weights_map", weights)
                read = partial(_changed, None if before is None else weights, own, change)
                hook.weights_map = _With(weights, own, read)
                value = read().to("meta") if before is None else before.data
            else:
                value = change(None if before is None else before.data)
            setattr(module, own, nn.Parameter(value.to(like.device, like.dtype), requires_grad=False))
        yield


def forget_ties(model: nn.Module) -> None:
    """Makes weights in memory free to be cast. accelerate knows tied ones by their addresses, at which others would lie
    once these have moved, and be taken for them. What is tied here is in memory, where it stays so by itself."""
    for module in model.modules():
        if ties := getattr(getattr(module, "_hf_hook", None), "tied_params_map", None):
            ties.clear()


def _hook(module: nn.Module) -> Any:
    """accelerate's hook of a module with offloaded parameters of its own."""
    return module._hf_hook


def _changed(weights: Mapping[str, Tensor] | None, name: str, change: Change) -> Tensor:
    return change(None if weights is None else weights[name])


class _With(Mapping[str, Tensor]):
    """A module's offloaded weights, one of them read otherwise."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, read: Callable[[], Tensor]) -> None:
        self.weights, self.name, self.read = weights, name, read

    def __getitem__(self, name: str) -> Tensor:
        return self.read() if name == self.name else self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter({*self.weights, self.name})

    def __len__(self) -> int:
        return len({*self.weights, self.name})
