"""What the units of a sublayer are: attention, MLP, fused experts, shared experts, recognised by their linear maps and
the shapes of these. What does not fit is refused with the reason; `describe` puts the rest to the test.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from secateur.experts import is_fused, reader
from secateur.selection import AttentionUnit
from secateur.units import Group, Slice


class RefusedError(Exception):
    """Raised inside one sublayer's description; becomes a `Refusal`."""


@dataclass(frozen=True)
class Sublayer:
    """An attention or an MLP module, and where it stands."""

    module: nn.Module
    where: str
    layer: int
    config: PreTrainedConfig
    """The configuration of this layer: its own widths if the model has been pruned before."""
    attention_unit: AttentionUnit | None = None
    """What attention is divided into; None: `kv-groups` where heads share keys, else `heads`."""

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {name: child for name, child in self.module.named_children() if isinstance(child, nn.Linear)}

    def other_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that do not belong to the linear maps directly in the module."""
        linears = self.linears
        return ((n, p) for n, p in self.module.named_parameters() if n.split(".")[0] not in linears)


Describe = Callable[[Sublayer], tuple[Group, ...]]
"""Gives the groups of a sublayer: two where KV heads can go as well as query heads, else one."""


def parts_of(sublayer: Sublayer) -> list[tuple[Sublayer, Describe]]:
    """What a sublayer consists of, each with what describes it; of a mixture, its experts and its shared experts."""
    module, where = sublayer.module, sublayer.where
    if not any(is_fused(m) for m in module.modules()):
        return [(sublayer, attention if _is_attention(sublayer) else _mlp)]
    if is_fused(module):
        return [(sublayer, _experts)]
    parts: list[tuple[Sublayer, Describe]] = []
    for name, child in module.named_children():
        part = replace(sublayer, module=child, where=f"{where}.{name}")
        if any(is_fused(m) for m in child.modules()):
            parts += parts_of(part)
        elif part.linears:  # a router has none below it
            parts.append((part, _shared_experts))
    return parts


def cache_of(sublayer: Sublayer) -> list[str]:
    names = {"k_proj", "v_proj"} & sublayer.linears.keys()
    if "kv_b_proj" in sublayer.linears:
        names = {n for n in sublayer.linears if n.startswith("kv_a_")}
    return [f"{sublayer.where}.{n}.weight" for n in sorted(names)]


# --- attention -------------------------------------------------------------------------------------------------------


def _is_attention(sublayer: Sublayer) -> bool:
    """By its maps; what else calls itself attention is sent the same way to be refused there."""
    named = "Attention" in type(sublayer.module).__name__ or hasattr(sublayer.module, "is_causal")
    return named or not {"q_proj", "kv_b_proj"}.isdisjoint(sublayer.linears)


def attention(sublayer: Sublayer) -> tuple[Group, ...]:
    """The units that `--attention-unit` says. Where heads have keys of their own (MHA) a head is all three of them;
    where all share one (MQA, latent attention) there are only heads.

    Query heads of GQA are divided among KV heads, which kernels want to serve as many each. Nested, query heads and KV
    heads have gates of their own, a query head's output is multiplied by both: so each KV head costs what it holds
    alone, keys and values, each query head what it holds, and the cost of what is kept is their sum, exactly.
    """
    linears, config, unit = sublayer.linears, sublayer.config, sublayer.attention_unit
    if "kv_b_proj" in linears:
        return _latent_attention(sublayer)
    readers = ("q_proj", "k_proj", "v_proj")
    if not set(readers) <= linears.keys():
        found = [n for n, p in sublayer.module.named_parameters() if p.ndim == 2]
        raise RefusedError(f"queries, keys and values are not three linear maps q_proj, k_proj, v_proj (found {found})")
    writer = _the_writer(linears, set(readers), config)

    heads = config.num_attention_heads
    q, k, v, columns = (*(linears[n].out_features for n in readers), linears[writer].in_features)
    size = q // heads
    kv_heads = k // size if size else 0
    if not kv_heads or q % heads or k % size or heads % kv_heads or v % kv_heads or columns != heads * (v // kv_heads):
        raise RefusedError(f"q, k, v of {q}, {k}, {v} rows and {writer} of {columns} columns do not make {heads} heads")

    if unit in ("kv-groups", "nested") and kv_heads == 1 < heads:
        raise RefusedError("all its heads share one KV head, so there are no KV groups to remove, only heads")

    of_keys, common = _rows(sublayer, readers[1:]), []
    slices = [*_rows(sublayer, readers[:1]), *of_keys, Slice(f"{sublayer.where}.{writer}.weight", 1)]
    for name, parameter in sublayer.other_parameters():
        rows = _heads_of(name, tuple(parameter.shape), heads, kv_heads, size)
        if rows:
            slices.append(Slice(f"{sublayer.where}.{name}", 0))
            of_keys += slices[-1:] if rows == kv_heads else []
        else:
            common.append(f"{sublayer.where}.{name}")
    of_heads = [s for s in slices if s not in of_keys]
    heads_key = [("num_attention_heads", 1)]
    keys_key = [("num_key_value_heads", 1)] if getattr(config, "num_key_value_heads", None) is not None else []
    if kv_heads == heads:
        return (_group(sublayer, "heads", heads, writer, slices, heads_key + keys_key, common),)
    if kv_heads == 1 or unit == "heads":
        common = [s.param for s in of_keys] + common
        alone = _group(sublayer, "heads", heads, writer, of_heads, heads_key, common)
        return (replace(alone, kv_heads=kv_heads if kv_heads > 1 else 0),)
    if unit == "nested":
        keys = _group(sublayer, "kv_groups", kv_heads, writer, of_keys, keys_key, [])
        inside = _group(sublayer, "heads", heads, writer, of_heads, heads_key, common)
        return keys, replace(inside, kv_heads=kv_heads, keys=keys.name)
    both_keys = [("num_attention_heads", heads // kv_heads), *keys_key]
    return (_group(sublayer, "kv_groups", kv_heads, writer, slices, both_keys, common),)


def _heads_of(name: str, shape: tuple[int, ...], heads: int, kv_heads: int, size: int) -> int:
    """How many heads a norm, sink or the like has entries for, one for each, or 0: it serves any head's vector of
    `size`."""
    in_submodule = "." in name
    if (in_submodule and shape == (size,)) or shape in {(), (1,), (1, size)}:
        return 0
    if shape in {(heads,), (heads, size), (kv_heads, size)}:
        return shape[0]
    if shape in {(heads * size,), (kv_heads * size,)}:
        raise RefusedError(f"{name} normalises over all heads together, so removing one would change the others")
    raise RefusedError(f"parameter {name} of shape {shape} fits neither one head nor a row of heads")


def _latent_attention(sublayer: Sublayer) -> tuple[Group, ...]:
    """Multi-head latent attention (DeepSeek-V2): heads live in q (or q_b) and kv_b rows; the latent is shared."""
    linears, where, config = sublayer.linears, sublayer.where, sublayer.config
    if sublayer.attention_unit in ("kv-groups", "nested"):
        raise RefusedError("all its heads share one latent, so there are no KV groups to remove, only heads")
    reader = "q_proj" if "q_proj" in linears else "q_b_proj"
    compressors = {n for n in linears if n.startswith(("q_a_", "kv_a_"))}
    if reader not in linears or not compressors:
        raise RefusedError(f"unknown latent attention with {sorted(linears)}")
    writer = _the_writer(linears, {reader, "kv_b_proj"} | compressors, config)
    heads = config.num_attention_heads
    if any(size % heads for size in (linears[reader].out_features, linears["kv_b_proj"].out_features)):
        raise RefusedError(f"the rows of {reader} and kv_b_proj do not divide into {heads} heads")
    slices = [*_rows(sublayer, (reader, "kv_b_proj")), Slice(f"{where}.{writer}.weight", 1)]
    nested = [n for n, p in sublayer.other_parameters() if p.ndim > 1]
    if nested:
        raise RefusedError(f"{nested} choose what is attended to (an indexer), perhaps for other layers, too")
    cut = {reader, "kv_b_proj", writer}
    common = [f"{where}.{n}" for n, _ in sublayer.module.named_parameters() if n.split(".")[0] not in cut]
    keys = [k for k in ("num_attention_heads", "num_key_value_heads") if getattr(config, k, None) == heads]
    return (_group(sublayer, "heads", heads, writer, slices, [(key, 1) for key in keys], common),)


def _the_writer(linears: dict[str, nn.Linear], readers: set[str], config: PreTrainedConfig) -> str:
    rest = sorted(linears.keys() - readers)
    if len(rest) != 1 or linears[rest[0]].out_features != config.hidden_size:
        raise RefusedError(f"expected one linear map after {sorted(readers)}, found {rest}")
    return rest[0]


# --- MLP -------------------------------------------------------------------------------------------------------------


def _mlp(sublayer: Sublayer) -> tuple[Group, ...]:
    """One reader (plain), two readers or one twice as tall (gated), and a writer back to the hidden size."""
    writer, width, slices, common = _channels(sublayer)
    key = _width_key(sublayer.config, width, "intermediate_size")
    return (_group(sublayer, "channels", width, writer, slices, [(key, 1)], common),)


def _shared_experts(sublayer: Sublayer) -> tuple[Group, ...]:
    """An MLP beside the routed experts, which every token passes. Only Qwen's has a key of its own: the width of
    others is a multiple of the routed experts' width."""
    writer, width, slices, common = _channels(sublayer)
    key = "shared_expert_intermediate_size"
    sizes = [(key, 1)] if getattr(sublayer.config, key, None) == width else []
    return (_group(sublayer, "shared_channels", width, writer, slices, sizes, common),)


def _channels(sublayer: Sublayer) -> tuple[str, int, list[Slice], list[str]]:
    """Writer, width, slices and common parameters of an MLP."""
    module, linears, hidden = sublayer.module, sublayer.linears, sublayer.config.hidden_size
    if isinstance(module, nn.Linear):
        raise RefusedError("a linear map that stands alone in its layer, not in an MLP module")
    if any(isinstance(m, nn.ModuleList) or hasattr(m, "experts") for m in module.modules()):
        raise RefusedError("a mixture of experts that are not fused tensors in the layout of transformers")
    others = [n for n, p in sublayer.other_parameters() if p.numel() > 1]
    if others:
        raise RefusedError(f"parameters {others} are not those of linear maps of an MLP")
    mixing = [n for n, m in module.named_children() if n not in linears and not _is_elementwise(m)]
    if mixing:
        raise RefusedError(f"{mixing} do not treat every channel by itself, so removing one would change the others")
    writers = [n for n, m in linears.items() if m.out_features == hidden and m.in_features != hidden]
    if len(writers) != 1:
        raise RefusedError(f"cannot tell which of {sorted(linears)} writes back to the hidden size {hidden}")
    writer, width = writers[0], linears[writers[0]].in_features
    readers = [n for n in linears if n != writer]
    shapes = [(linears[n].in_features, linears[n].out_features) for n in readers]
    if shapes not in ([(hidden, width)], [(hidden, width)] * 2, [(hidden, 2 * width)]):
        raise RefusedError(f"{readers} of shapes {shapes} do not make a plain or gated MLP of width {width}")
    copies = shapes[0][1] // width
    slices = [*_rows(sublayer, readers, copies), Slice(f"{sublayer.where}.{writer}.weight", 1)]
    common = [f"{sublayer.where}.{n}" for n, _ in sublayer.other_parameters()]
    return writer, width, slices, common


def _is_elementwise(module: nn.Module) -> bool:
    """Activations and dropout are; a norm is not: the first two entries then depend on the others."""
    if isinstance(module, nn.Dropout) or any(True for _ in module.parameters()):
        return True
    x = torch.tensor([0.5, -1.0, 2.0, 3.0], device="cpu")
    try:
        return torch.equal(module(x)[:2], module(x[:2]))
    except RuntimeError:  # wants the full width
        return False


def _width_key(config: PreTrainedConfig, width: int, *usual: str) -> str:
    """The configuration key that sets a width: the usual one if it has that value, else the only one that has."""
    for key in usual:
        if getattr(config, key, None) == width:
            return key
    keys = [k for k, v in config.to_dict().items() if v == width and not isinstance(v, bool) and k != "hidden_size"]
    if len(keys) != 1:
        raise RefusedError(f"no single configuration key holds the width {width} (found {keys})")
    return str(keys[0])


# --- experts ---------------------------------------------------------------------------------------------------------


def _experts(sublayer: Sublayer) -> tuple[Group, ...]:
    """Fused experts: up (and gate) projections of all of them in one tensor, down projections in another."""
    module: Any = sublayer.module
    where, config = sublayer.where, sublayer.config
    up, hidden = reader(module), config.hidden_size
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    experts, rows, columns = shapes["down_proj"]
    width, back = (rows, columns) if module.is_transposed else (columns, rows)
    tall = width * (2 if module.has_gate else 1)
    expected: dict[str, tuple[int, ...]] = {"down_proj": (experts, rows, columns)}
    expected[up] = (experts, hidden, tall) if module.is_transposed else (experts, tall, hidden)
    if module.has_bias:
        expected |= {f"{up}_bias": (experts, tall), "down_proj_bias": (experts, hidden)}
    if shapes != expected or back != hidden:
        raise RefusedError(f"parameters {shapes} are not those of {experts} experts alike, of width {width}")
    if not _channelwise(module, width):
        raise RefusedError("its activation does not treat every channel by itself, so removing one changes the others")
    copies = 2 if module.has_gate and module.is_concatenated else 1
    slices = [Slice(f"{where}.{up}", 2 if module.is_transposed else 1, copies)]
    slices += [Slice(f"{where}.{up}_bias", 1, copies)] if module.has_bias else []
    slices.append(Slice(f"{where}.down_proj", 1 if module.is_transposed else 2))
    key = _width_key(config, width, "moe_intermediate_size", "intermediate_size")
    name, common = f"layers.{sublayer.layer}.expert_channels", (f"{where}.down_proj_bias",) if module.has_bias else ()
    group = Group(
        name, sublayer.layer, "expert_channels", experts * width, where, tuple(slices), ((key, 1),), common, experts
    )
    return (group,)


def _channelwise(module: Any, width: int) -> bool:
    """Whether the experts' activation gives channel j from channel j alone, in the layout that its attributes say."""
    rows = torch.randn(
        1, width * (2 if module.has_gate else 1), generator=torch.Generator().manual_seed(0), device="cpu"
    )
    half = torch.arange(width - 1, -1, -2, device="cpu").flip(0)  # every other one, the last among them
    copies = 2 if module.has_gate and module.is_concatenated else 1
    block = rows.shape[1] // (copies * width)
    fewer = rows.unflatten(1, (copies, width, block))[:, :, half].flatten(1)
    activation = module._apply_gate if module.has_gate else module.act_fn
    return torch.allclose(activation(rows)[:, half], activation(fewer))


# --- both ------------------------------------------------------------------------------------------------------------


def _rows(sublayer: Sublayer, readers: Iterable[str], copies: int = 1) -> list[Slice]:
    names = [f"{n}.{p}" for n in readers for p, _ in sublayer.linears[n].named_parameters()]
    return [Slice(f"{sublayer.where}.{name}", 0, copies) for name in names]


def _group(
    at: Sublayer,
    kind: str,
    units: int,
    writer: str,
    slices: list[Slice],
    sizes: list[tuple[str, int]],
    common: list[str],
) -> Group:
    name, gate_at = f"layers.{at.layer}.{kind}", f"{at.where}.{writer}"
    return Group(name, at.layer, kind, units, gate_at, tuple(slices), tuple(sizes), tuple(common))
