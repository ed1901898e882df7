"""What can be pruned in a model, found by its structure; every refusal ("cannot prune X because …") is made here.

No list of model names: a decoder layer's children are recognised by the linear maps they hold and the shapes of these.
What is read off the shapes is then put to the test: the layer's own class, built with fewer units, must have exactly
the predicted shapes, for a checkpoint could not be loaded otherwise. Serves `secateur inspect MODEL`, which needs only
the configuration (the model is built on the meta device).
"""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from secateur.files import InputError
from secateur.units import Group, Shapes, Slice, sliced_shapes, unit_params


@dataclass(frozen=True)
class Refusal:
    """A sublayer that stays whole, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Description:
    """All that later stages know of an architecture."""

    groups: tuple[Group, ...]
    refusals: tuple[Refusal, ...]
    shapes: Shapes
    """Shapes of all parameters; tied ones appear once."""
    layers: str
    """Name of the module list that holds the decoder layers, e.g. `model.layers`."""
    cached: tuple[str, ...]
    """Parameters whose rows are what the KV cache holds for a token (k and v rows, or MLA's latent)."""
    matmuls: tuple[str, ...]
    """Weights that every token is multiplied by; a tied embedding counts through the output head."""

    @property
    def unit_parameters(self) -> int:
        """Parameters that belong to units: what a sparsity of 1 would remove."""
        return sum(g.units * unit_params(g, self.shapes) for g in self.groups)


class _RefusedError(Exception):
    """Raised inside one sublayer's description; becomes a `Refusal`."""


@dataclass(frozen=True)
class _Sublayer:
    """An attention or an MLP module, and where it stands."""

    module: nn.Module
    where: str
    layer: int
    config: PreTrainedConfig
    """The configuration of this layer: its own widths if the model has been pruned before."""

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {name: child for name, child in self.module.named_children() if isinstance(child, nn.Linear)}

    def other_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that do not belong to the linear maps directly in the module."""
        linears = self.linears
        return ((n, p) for n, p in self.module.named_parameters() if n.split(".")[0] not in linears)


def describe(model: nn.Module) -> Description:
    """Groups of units of a causal LM (on any device, meta included).

    Raises InputError when nothing in the model can be pruned, listing every reason.
    """
    config: PreTrainedConfig = model.config
    if config.is_heterogeneous and not hasattr(config, "secateur"):
        own = ", ".join(sorted(config.per_layer_attributes or ()))
        raise InputError(f"{config.model_type} has layers of different {own} from the start; those are not pruned yet")
    layers_name, layers = _decoder_layers(model, config)
    reused = _reused_parameters(layers)
    shared_cache = _shares_cache(layers, config)
    groups: list[Group] = []
    refusals: list[Refusal] = []
    cached: list[str] = []
    for index, layer in enumerate(layers):
        layer_config = _layer_config(config, index)
        for name, child in layer.named_children():
            if all(p.ndim < 2 for p in child.parameters()):
                continue
            sublayer = _Sublayer(child, f"{layers_name}.{index}.{name}", index, layer_config)
            cached += _cached(sublayer)
            try:
                if any(id(p) in reused for p in child.parameters()):
                    raise _RefusedError("its weights serve more than one sublayer")
                if _is_attention(sublayer) and shared_cache:
                    raise _RefusedError("layers share keys and values, so one layer's heads cannot go alone")
                group = _attention(sublayer) if _is_attention(sublayer) else _mlp(sublayer)
                _check_class(layer, f"{layers_name}.{index}.", group, layer_config)
                groups.append(group)
            except _RefusedError as error:
                refusals.append(Refusal(sublayer.where, str(error)))
    if not groups:
        first = {r.reason: r for r in reversed(refusals)}.values()
        reasons = "; ".join(f"{r.where}: {r.reason}" for r in reversed(first)) or "no linear maps found in its layers"
        raise InputError(f"nothing in this {config.model_type} model can be pruned: {reasons}")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return Description(tuple(groups), tuple(refusals), shapes, layers_name, tuple(cached), _matmul_weights(model))


def check_causal(config: PreTrainedConfig) -> None:
    """Raises InputError for models that are not decoder-only, text-only causal LMs."""
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{config.model_type} is an encoder–decoder model; Secateur prunes decoder-only causal LMs")
    if config.get_text_config() is not config:
        raise InputError(f"{config.model_type} is a multimodal model; pass the checkpoint of its text model alone")
    known = type(config) in AutoModelForCausalLM._model_mapping
    if not known and "AutoModelForCausalLM" not in getattr(config, "auto_map", {}):
        raise InputError(f"{config.model_type} is not a causal language model that transformers can build")


def head_dim(config: PreTrainedConfig) -> int:
    """The head size; where a configuration leaves it to follow from the head count, that of the unpruned count."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# --- the model as a whole --------------------------------------------------------------------------------------------


def _decoder_layers(model: nn.Module, config: PreTrainedConfig) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            causal = [m.is_causal for m in module.modules() if hasattr(m, "is_causal")]
            if causal and not any(causal):
                raise InputError(f"{config.model_type} attends both ways; Secateur prunes decoder-only causal LMs")
            return name, module
    raise InputError(f"{config.model_type}: found no list of {config.num_hidden_layers} decoder layers")


def _layer_config(config: PreTrainedConfig, index: int) -> PreTrainedConfig:
    """The widths of one layer; where a sublayer is gone, 1 stands for its 0, with which no layer class can be built."""
    layer_config = copy.copy(config.per_layer_config[index])
    for key in config.per_layer_attributes or ():
        setattr(layer_config, key, getattr(layer_config, key) or 1)
    return layer_config


def _reused_parameters(layers: nn.ModuleList) -> set[int]:
    """Ids of parameters that stand in more than one sublayer: cutting them for one would cut them for the other."""
    sublayers = (child for layer in layers for child in layer.children())
    owners = Counter(id(p) for child in sublayers for p in child.parameters())
    return {parameter for parameter, count in owners.items() if count > 1}


def _shares_cache(layers: nn.ModuleList, config: PreTrainedConfig) -> bool:
    """Whether layers read the keys and values of others (Gemma 3n), as the configuration or a lone q_proj says."""
    children = [child for layer in layers for child in layer.children()]
    maps = [{n for n, m in child.named_children() if isinstance(m, nn.Linear)} for child in children]
    lone = any("q_proj" in names and not any(n.startswith(("k", "v")) for n in names) for names in maps)
    return lone or bool(getattr(config, "num_kv_shared_layers", 0))


def _matmul_weights(model: nn.Module) -> tuple[str, ...]:
    names = {id(p): name for name, p in model.named_parameters()}
    linears = (m for m in model.modules() if isinstance(m, nn.Linear))
    return tuple(dict.fromkeys(names[id(m.weight)] for m in linears))


def _cached(sublayer: _Sublayer) -> list[str]:
    names = {"k_proj", "v_proj"} & sublayer.linears.keys()
    if "kv_b_proj" in sublayer.linears:
        names = {n for n in sublayer.linears if n.startswith("kv_a_")}
    return [f"{sublayer.where}.{n}.weight" for n in sorted(names)]


def _check_class(layer: nn.Module, prefix: str, group: Group, config: PreTrainedConfig) -> None:
    """The layer's class, built with fewer units, must have the shapes that slicing gives."""
    for key, per_unit in group.sizes:
        if getattr(config, key) != per_unit * group.units:
            raise _RefusedError(f"{key} is {getattr(config, key)}, but the weights say {per_unit * group.units}")
    own = group.gate_at.rpartition(".")[0] + "."
    added = getattr(config, "secateur", {}).get("biases", {}).get(str(group.layer), [])
    biases = {f"{path}.bias" for path in added}  # of an earlier pruning; the layer's class does not know of them
    dense = {prefix + n: tuple(p.shape) for n, p in layer.named_parameters() if n not in biases}
    for fewer in {1, max(1, group.units - 1)}:
        attempt = f"{type(layer).__name__} built with {fewer} of {group.units} {group.kind}"
        narrow = copy.copy(config)
        if group.kind != "channels":
            narrow.head_dim = head_dim(config)
        for key, per_unit in group.sizes:
            setattr(narrow, key, per_unit * fewer)
        try:
            with torch.device("meta"):
                built = type(layer)(narrow, group.layer)
        except (TypeError, ValueError, AttributeError, RuntimeError, AssertionError, ZeroDivisionError) as error:
            raise _RefusedError(f"{attempt} fails: {' '.join(str(error).split())}") from None
        expected = sliced_shapes([group], {group.name: fewer}, dense)
        actual = {prefix + n: tuple(p.shape) for n, p in built.named_parameters()}
        for name in (n for n in expected if n.startswith(own) and expected[n] != actual.get(n)):
            shapes = f"{actual.get(name)}, not {expected[name]}"
            raise _RefusedError(f"{attempt} has {name.removeprefix(own)} of shape {shapes}")


# --- attention -------------------------------------------------------------------------------------------------------


def _is_attention(sublayer: _Sublayer) -> bool:
    """By its maps; what else calls itself attention is sent the same way to be refused there."""
    named = "Attention" in type(sublayer.module).__name__ or hasattr(sublayer.module, "is_causal")
    return named or not {"q_proj", "kv_b_proj"}.isdisjoint(sublayer.linears)


def _attention(sublayer: _Sublayer) -> Group:
    linears, config = sublayer.linears, sublayer.config
    if "kv_b_proj" in linears:
        return _latent_attention(sublayer)
    readers = ("q_proj", "k_proj", "v_proj")
    if not set(readers) <= linears.keys():
        found = [n for n, p in sublayer.module.named_parameters() if p.ndim == 2]
        raise _RefusedError(
            f"queries, keys and values are not three linear maps q_proj, k_proj, v_proj (found {found})"
        )
    writer = _the_writer(linears, set(readers), config)

    heads = config.num_attention_heads
    q, k, v, columns = (*(linears[n].out_features for n in readers), linears[writer].in_features)
    size = q // heads
    kv_heads = k // size if size else 0
    if not kv_heads or q % heads or k % size or heads % kv_heads or v % kv_heads or columns != heads * (v // kv_heads):
        raise _RefusedError(
            f"q, k, v of {q}, {k}, {v} rows and {writer} of {columns} columns do not make {heads} heads"
        )

    multi_query = kv_heads == 1 < heads
    kind, units = ("kv_groups", kv_heads) if 1 < kv_heads < heads else ("heads", heads)
    sizes = [("num_attention_heads", heads // units)]
    if getattr(config, "num_key_value_heads", None) is not None and not multi_query:
        sizes.append(("num_key_value_heads", kv_heads // units))

    slices = _rows(sublayer, readers[:1] if multi_query else readers)
    slices.append(Slice(f"{sublayer.where}.{writer}.weight", 1))
    common = [f"{sublayer.where}.{n}.{p}" for n in readers[1:] for p, _ in linears[n].named_parameters() if multi_query]
    for name, parameter in sublayer.other_parameters():
        if _per_unit(name, tuple(parameter.shape), heads, kv_heads, size):
            slices.append(Slice(f"{sublayer.where}.{name}", 0))
        else:
            common.append(f"{sublayer.where}.{name}")
    return _group(sublayer, kind, units, writer, slices, sizes, common)


def _per_unit(name: str, shape: tuple[int, ...], heads: int, kv_heads: int, size: int) -> bool:
    """Whether a norm, sink or the like has entries for each head, or (False) serves any head's vector of `size`."""
    in_submodule = "." in name
    if (in_submodule and shape == (size,)) or shape in {(), (1,), (1, size)}:
        return False
    if shape in {(heads,), (heads, size), (kv_heads, size)}:
        return True
    if shape in {(heads * size,), (kv_heads * size,)}:
        raise _RefusedError(f"{name} normalises over all heads together, so removing one would change the others")
    raise _RefusedError(f"parameter {name} of shape {shape} fits neither one head nor a row of heads")


def _latent_attention(sublayer: _Sublayer) -> Group:
    """Multi-head latent attention (DeepSeek-V2): heads live in q (or q_b) and kv_b rows; the latent is shared."""
    linears, where, config = sublayer.linears, sublayer.where, sublayer.config
    reader = "q_proj" if "q_proj" in linears else "q_b_proj"
    compressors = {n for n in linears if n.startswith(("q_a_", "kv_a_"))}
    if reader not in linears or not compressors:
        raise _RefusedError(f"unknown latent attention with {sorted(linears)}")
    writer = _the_writer(linears, {reader, "kv_b_proj"} | compressors, config)
    heads = config.num_attention_heads
    if any(size % heads for size in (linears[reader].out_features, linears["kv_b_proj"].out_features)):
        raise _RefusedError(f"the rows of {reader} and kv_b_proj do not divide into {heads} heads")
    slices = [*_rows(sublayer, (reader, "kv_b_proj")), Slice(f"{where}.{writer}.weight", 1)]
    nested = [n for n, p in sublayer.other_parameters() if p.ndim > 1]
    if nested:
        raise _RefusedError(f"{nested} choose what is attended to (an indexer), perhaps for other layers, too")
    cut = {reader, "kv_b_proj", writer}
    common = [f"{where}.{n}" for n, _ in sublayer.module.named_parameters() if n.split(".")[0] not in cut]
    keys = [k for k in ("num_attention_heads", "num_key_value_heads") if getattr(config, k, None) == heads]
    return _group(sublayer, "heads", heads, writer, slices, [(key, 1) for key in keys], common)


def _the_writer(linears: dict[str, nn.Linear], readers: set[str], config: PreTrainedConfig) -> str:
    rest = sorted(linears.keys() - readers)
    if len(rest) != 1 or linears[rest[0]].out_features != config.hidden_size:
        raise _RefusedError(f"expected one linear map after {sorted(readers)}, found {rest}")
    return rest[0]


# --- MLP -------------------------------------------------------------------------------------------------------------


def _mlp(sublayer: _Sublayer) -> Group:
    """One reader (plain), two readers or one twice as tall (gated), and a writer back to the hidden size."""
    module, linears, hidden = sublayer.module, sublayer.linears, sublayer.config.hidden_size
    if isinstance(module, nn.Linear):
        raise _RefusedError("a linear map that stands alone in its layer, not in an MLP module")
    if any(isinstance(m, nn.ModuleList) or hasattr(m, "experts") for m in module.modules()):
        raise _RefusedError("mixture of experts: experts' channels are not pruned yet")
    others = [n for n, p in sublayer.other_parameters() if p.numel() > 1]
    if others:
        raise _RefusedError(f"parameters {others} are not those of linear maps of an MLP")
    mixing = [n for n, m in module.named_children() if n not in linears and not _is_elementwise(m)]
    if mixing:
        raise _RefusedError(f"{mixing} do not treat every channel by itself, so removing one would change the others")
    writers = [n for n, m in linears.items() if m.out_features == hidden and m.in_features != hidden]
    if len(writers) != 1:
        raise _RefusedError(f"cannot tell which of {sorted(linears)} writes back to the hidden size {hidden}")
    writer, width = writers[0], linears[writers[0]].in_features
    readers = [n for n in linears if n != writer]
    shapes = [(linears[n].in_features, linears[n].out_features) for n in readers]
    if shapes not in ([(hidden, width)], [(hidden, width)] * 2, [(hidden, 2 * width)]):
        raise _RefusedError(f"{readers} of shapes {shapes} do not make a plain or gated MLP of width {width}")
    copies = shapes[0][1] // width
    slices = [*_rows(sublayer, readers, copies), Slice(f"{sublayer.where}.{writer}.weight", 1)]
    common = [f"{sublayer.where}.{n}" for n, _ in sublayer.other_parameters()]
    return _group(sublayer, "channels", width, writer, slices, [(_width_key(sublayer.config, width), 1)], common)


def _is_elementwise(module: nn.Module) -> bool:
    """Activations and dropout are; a norm is not: the first two entries then depend on the others."""
    if isinstance(module, nn.Dropout) or any(True for _ in module.parameters()):
        return True
    x = torch.tensor([0.5, -1.0, 2.0, 3.0], device="cpu")
    try:
        return torch.equal(module(x)[:2], module(x[:2]))
    except RuntimeError:  # wants the full width
        return False


def _width_key(config: PreTrainedConfig, width: int) -> str:
    """The configuration key that sets the MLP's width: the one whose value is that width."""
    if getattr(config, "intermediate_size", None) == width:
        return "intermediate_size"
    keys = [k for k, v in config.to_dict().items() if v == width and not isinstance(v, bool) and k != "hidden_size"]
    if len(keys) != 1:
        raise _RefusedError(f"no single configuration key holds the MLP's width {width} (found {keys})")
    return str(keys[0])


# --- both ------------------------------------------------------------------------------------------------------------


def _rows(sublayer: _Sublayer, readers: Iterable[str], copies: int = 1) -> list[Slice]:
    names = [f"{n}.{p}" for n in readers for p, _ in sublayer.linears[n].named_parameters()]
    return [Slice(f"{sublayer.where}.{name}", 0, copies) for name in names]


def _group(
    at: _Sublayer,
    kind: str,
    units: int,
    writer: str,
    slices: list[Slice],
    sizes: list[tuple[str, int]],
    common: list[str],
) -> Group:
    name, gate_at = f"layers.{at.layer}.{kind}", f"{at.where}.{writer}"
    return Group(name, at.layer, kind, units, gate_at, tuple(slices), tuple(sizes), tuple(common))
