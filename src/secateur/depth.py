"""Which sublayers may go whole, and where a gate of their own acts: `--depth`.

A sublayer's gate multiplies what the sublayer adds to the hidden states. `joint`, it stands beside the gates of its
units, so that width and depth compete for one budget (joint.py); `alone`, it is all that is learned, and widths stay.
Nearly everywhere it acts where the units' gates do, at the writer's input, and is folded into the writer. Where a norm
reads the writer's output first (Gemma 2, OLMo 2), which no factor changes, it acts behind that norm and is folded into
its weight. Which models do so, no name says: what a module reads is looked at while the model runs on two tokens.

The experts of a mixture have no such gate: transformers reads no mixture without experts back, so that a router and two
experts would be left of it.
"""

import copy
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.describe import Description, Refusal
from secateur.experts import is_fused
from secateur.files import InputError
from secateur.selection import Depth
from secateur.units import Group


def with_depth(description: Description, model: nn.Module, depth: Depth) -> Description:
    """The same model with sublayers that have gates of their own. `model` is on any device, meta included.

    Raises InputError where there are none, or `alone` where some of what is to be pruned cannot go whole.
    """
    if depth == "off":
        return description
    norms, refused = _behind_norms(model, [g for g in description.groups if can_go(g)])
    groups: list[Group] = []
    gates: dict[str, Group] = {}
    for g in description.groups:
        whole = None
        if can_go(g) and module_of(g) not in refused:
            whole = sublayer_of(g, norms.get(module_of(g)))
            gates[whole.name] = whole
        if depth == "joint":
            groups.append(g if whole is None else replace(g, depth=whole.name, after=whole.after))
        elif whole is not None:
            groups.append(replace(whole, slices=g.slices, sizes=_of_all(g), shared=g.shared))
    if not groups or not gates:
        raise InputError(f"--depth {depth}: {_none_can(description, refused)}")
    if depth == "alone" and (stay := [g for g in description.groups if not can_go(g)]):
        raise InputError(
            f"--depth alone: the {stay[0].kind.replace('_', ' ')} of {stay[0].name} cannot go whole, as a router and "
            "two experts would be left; say --units attention, or use --depth joint"
        )
    left = tuple(g for g in description.groups if depth == "alone" and module_of(g) in refused)
    refusals = (*description.refusals, *(Refusal(where, reason) for where, reason in refused.items()))
    last = tuple(gates.values()) if depth == "joint" else ()
    return replace(description, groups=(*groups, *last), others=(*description.others, *left), refusals=refusals)


def can_go(group: Group) -> bool:
    """Whether the group's sublayer holds nothing else, so that it can go whole."""
    return group.attends or group.kind == "channels"


def module_of(group: Group) -> str:
    """The attention or MLP module of a group."""
    return group.gate_at.rpartition(".")[0]


def sublayer_of(group: Group, norm: tuple[str, float] | None) -> Group:
    """The gate of a group's sublayer: one unit without slices. `norm`: the one that it acts behind, and its offset."""
    kind = "attention" if group.attends else "mlp"
    after, offset = norm or ("", 0.0)
    return Group(
        f"layers.{group.layer}.{kind}", group.layer, kind, 1, group.gate_at, (), (), after=after, offset=offset
    )


def _of_all(group: Group) -> tuple[tuple[str, int], ...]:
    """Config key → its value where all units are stored."""
    return tuple((key, per_unit * group.units) for key, per_unit in group.sizes)


def _none_can(description: Description, refused: dict[str, str]) -> str:
    if refused:
        where, reason = next(iter(refused.items()))
        return f"no sublayer can have a gate of its own ({where}: {reason})"
    kinds = ", ".join(sorted(kind.replace("_", " ") for kind in description.kinds))
    return f"none of what this run prunes ({kinds}) makes a whole sublayer; add attention to --units"


# --- norms behind sublayers ------------------------------------------------------------------------------------------


def _behind_norms(model: nn.Module, groups: Collection[Group]) -> tuple[dict[str, tuple[str, float]], dict[str, str]]:
    """Module of each group's sublayer → the norm that alone reads its output, and that norm's offset; and of those that
    something else reads first, why they can have no gate."""
    norms: dict[str, tuple[str, float]] = {}
    refused: dict[str, str] = {}
    for where, reader in _readers(model, {module_of(g) for g in groups}).items():
        norm = model.get_submodule(reader)
        offset = _offset(norm)
        if offset is None:
            refused[where] = f"{reader} reads its output, and a factor cannot be folded into a {type(norm).__name__}"
        else:
            norms[where] = reader, offset
    return norms, refused


@torch.no_grad()
def _readers(model: nn.Module, sublayers: Collection[str]) -> dict[str, str]:
    """Sublayer → the module outside of it that is given its very output, where there is one."""
    outputs: list[tuple[Tensor, str]] = []
    found: dict[str, str] = {}

    def wrote(where: str):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output, where))

        return hook

    def reads(name: str):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            for tensor, where in outputs:
                if args and args[0] is tensor:
                    found.setdefault(where, name)

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name in sublayers:
                stack.callback(module.register_forward_hook(wrote(name)).remove)
            if not isinstance(module, nn.Dropout | nn.Identity):
                stack.callback(module.register_forward_pre_hook(reads(name)).remove)
            if is_fused(module):  # which sends each token to its own experts, and none where there are no values
                stack.callback(module.__dict__.pop, "forward", None)
                module.forward = _same
        _run(model)
    return found


def _same(hidden: Tensor, *_args: Any, **_options: Any) -> Tensor:
    return hidden


def _run(model: nn.Module) -> None:
    """Runs the model on two tokens; with a mask of its own, because none can be made where tensors have no values."""
    parameter = next(model.parameters())
    ids = torch.zeros((1, 2), dtype=torch.int64, device=parameter.device)
    mask = torch.zeros((1, 1, 2, 2), dtype=parameter.dtype, device=parameter.device)
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--depth: cannot see what reads the sublayers' outputs in this model: {reason}") from None


def _offset(norm: nn.Module) -> float | None:
    """What a norm adds to its weight: 0 as a rule, 1 in Gemma's; None where its weight does not multiply its output."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or any(True for _ in norm.children()):
        return None
    alone = copy.deepcopy(norm).to_empty(device="cpu").float()
    x = torch.linspace(-1.0, 2.0, len(weight), device="cpu")[None]
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.zero_()
        zero = alone(x)
        alone.get_parameter("weight").fill_(1.0)
        one = alone(x)
    if not one.abs().max() > 0:
        return None
    for offset in (0.0, 1.0):
        if torch.allclose(zero * (1.0 + offset), one * offset, atol=1e-6):
            return offset
    return None
