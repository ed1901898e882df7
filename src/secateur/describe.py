"""What can be pruned in a model, found by its structure; every refusal ("cannot prune X because …") is made here.

No list of model names: a decoder layer's children are recognised by the linear maps they hold and the shapes of these.
What is read off the shapes is then put to the test: the layer's own class, built with fewer units, must have exactly
the predicted shapes, for a checkpoint could not be loaded otherwise. Serves `secateur inspect MODEL`, which needs only
the configuration (the model is built on the meta device).
"""

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from secateur.experts import is_fused
from secateur.families import model_class
from secateur.files import InputError
from secateur.policy import check_permitted, policy_of
from secateur.selection import SPOKEN, AttentionUnit
from secateur.sublayers import RefusedError, Sublayer, attention, cache_of, parts_of
from secateur.units import Group, Shapes, Size, said_by_config, sliced_shapes, unit_params, whole


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
    matmuls: Mapping[str, float]
    """Weights that a token is multiplied by → the share of them: 1, or the share of experts it is routed to. A tied
    embedding counts through the output head."""
    others: tuple[Group, ...] = ()
    """Groups that this run leaves whole (`only`, `keeping`)."""
    kept: frozenset[str] = frozenset()
    """Names of those that `keeping` leaves whole: sparsity is a share of their parameters, too."""

    @property
    def layer_count(self) -> int:
        """Decoder layers."""
        inside = f"{self.layers}."
        return 1 + max(int(n.removeprefix(inside).split(".")[0]) for n in self.shapes if n.startswith(inside))

    @property
    def unit_parameters(self) -> int:
        """Parameters that belong to units: what a sparsity of 1 would remove."""
        return sum(g.units * unit_params(g, self.shapes) for g in self.groups)

    @property
    def held_parameters(self) -> int:
        """Parameters of units that stay because of `--keep`."""
        return sum(g.units * unit_params(g, self.shapes) for g in self.others if g.name in self.kept)

    def check_shape(self, shape: str) -> None:
        """Raises InputError where a group can have none of the widths that a shape permits, or a uniform one would cut
        one of two widths that a stock configuration ties: that of shared experts without a key of their own follows
        from that of the routed ones."""
        policy = policy_of(shape)
        if policy.uniform and self.kept:
            raise InputError(f"--keep leaves layers wider than others, so --shape {policy} contradicts it")
        if policy.uniform and any(g.is_sublayer for g in self.groups):
            raise InputError(f"--depth closes whole sublayers of some layers, so --shape {policy} contradicts it")
        check_permitted(policy, self.groups, self.others)
        cut, whole = ({g.kind for g in groups if g.experts or not g.sizes} for groups in (self.groups, self.others))
        if policy.uniform and cut and "shared_channels" in cut | whole and whole:
            raise InputError(
                "a stock configuration derives the shared experts' width from that of the routed ones: with --shape "
                "uniform say --units expert_channels shared_channels, or use --shape ragged"
            )

    @property
    def kinds(self) -> frozenset[str]:
        """What there is of units."""
        return frozenset(g.kind for g in self.groups if not g.gate_only)

    def only(self, kinds: Collection[str]) -> "Description":
        """The same model with the units of some kinds alone (`--units`). None said: the channels of a mixture's
        experts, as in the paper (method §1), or all units of any other model. Raises InputError when none are left."""
        present = {"heads" if g.attends else g.kind for g in self.groups}
        words = {word: present & set(SPOKEN.get(word, (word,))) for word in sorted(kinds)}
        if missing := [word for word, found in words.items() if not found]:
            raise InputError(f"this model has no {missing[0]} that can be pruned; --units can be {sorted(present)}")
        wanted = {kind for found in words.values() for kind in found} or {"expert_channels"} & present or present
        return self._leaving([g for g in self.groups if ("heads" if g.attends else g.kind) not in wanted])

    def check_attention(self, unit: str | None) -> None:
        """Raises InputError where `--attention-unit` was said and attention is not pruned."""
        if unit is None or any(g.attends for g in self.groups):
            return
        if any(g.attends for g in self.others):
            raise InputError(f"--attention-unit {unit}: this run leaves attention whole; add heads to --units")
        reasons = "; ".join(dict.fromkeys(r.reason for r in self.refusals)) or "it has none"
        raise InputError(f"--attention-unit {unit}: this model's attention cannot be pruned so: {reasons}")

    def keeping(self, words: Collection[str]) -> "Description":
        """The same model with some layers or sublayers left whole (`--keep`): `layers.0`, `layers.-1.mlp`. Raises
        InputError for layers that there are not, and when nothing is left to prune."""
        if not words:
            return self
        count = self.layer_count
        kept: set[str] = set()
        for word in words:
            _, number, *sublayer = word.split(".")
            if not -count <= int(number) < count:
                raise InputError(f"--keep {word}: the model has {count} layers, layers.0 to layers.{count - 1}")
            attends = {"attention": (True,), "mlp": (False,)}.get("".join(sublayer), (True, False))
            kept |= {g.name for g in self.groups if g.layer == int(number) % count and g.attends in attends}
        if len(kept) == len(self.groups):
            raise InputError(f"--keep {','.join(words)} leaves nothing to prune; keep fewer layers")
        return replace(self._leaving([g for g in self.groups if g.name in kept]), kept=frozenset(kept))

    def sparsity_of_rest(self, sparsity: float) -> float:
        """The share of the units' parameters to remove that is `sparsity` of those of `--keep`, too. Raises InputError
        where that is all of them, or more."""
        held, free = self.held_parameters, self.unit_parameters
        if sparsity * (free + held) >= free:
            least = floor(1000 * free / (free + held)) / 1000
            raise InputError(
                f"--keep leaves {free / (free + held):.1%} of the units' parameters to prune, and --sparsity "
                f"{sparsity:g} asks for more; keep less, or use --sparsity below {least:g}"
            )
        return sparsity * (free + held) / free

    def _leaving(self, whole: Collection[Group]) -> "Description":
        """The same model with more groups left whole."""
        return replace(self, groups=tuple(g for g in self.groups if g not in whole), others=(*self.others, *whole))


def describe(model: nn.Module, attention_unit: AttentionUnit | None = None) -> Description:
    """Groups of units of a causal LM (on any device, meta included); `attention_unit` as `--attention-unit` says it.

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
            sublayer = Sublayer(child, f"{layers_name}.{index}.{name}", index, layer_config, attention_unit)
            cached += cache_of(sublayer)
            for part, describe_part in parts_of(sublayer):
                try:
                    if any(id(p) in reused for p in child.parameters()):
                        raise RefusedError("its weights serve more than one sublayer")
                    if describe_part is attention and shared_cache:
                        raise RefusedError("layers share keys and values, so one layer's heads cannot go alone")
                    found = describe_part(part)
                    _check_class(layer, f"{layers_name}.{index}.", found, layer_config)
                    groups += found
                except RefusedError as error:
                    refusals.append(Refusal(part.where, str(error)))
    if not groups:
        first = {r.reason: r for r in reversed(refusals)}.values()
        reasons = "; ".join(f"{r.where}: {r.reason}" for r in reversed(first)) or "no linear maps found in its layers"
        raise InputError(f"nothing in this {config.model_type} model can be pruned: {reasons}")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return Description(
        tuple(groups), tuple(refusals), shapes, layers_name, tuple(cached), _matmul_weights(model, config)
    )


def check_causal(config: PreTrainedConfig) -> None:
    """Raises InputError for models that are not decoder-only, text-only causal LMs."""
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{config.model_type} is an encoder–decoder model; Secateur prunes decoder-only causal LMs")
    if config.get_text_config() is not config:
        raise InputError(f"{config.model_type} is a multimodal model; pass the checkpoint of its text model alone")
    known = type(config) in AutoModelForCausalLM._model_mapping or model_class(config) is not AutoModelForCausalLM
    if not known and "AutoModelForCausalLM" not in getattr(config, "auto_map", {}):
        raise InputError(f"{config.model_type} is not a causal language model that transformers can build")


def check_unquantised(config: PreTrainedConfig) -> None:
    """Raises InputError for models whose weights are quantised; those of GGUF files transformers makes plain."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        said = quantization if isinstance(quantization, dict) else vars(quantization)
        method = said.get("quant_method", "no method named")
        name = getattr(method, "value", method)
        if name != "gguf":
            raise InputError(f"the model is quantised ({name}); prune its full-precision checkpoint, then quantise")


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


def first_of(config: PreTrainedConfig, keys: Sequence[str]) -> int | None:
    """The first of the keys that the configuration has."""
    return next((value for key in keys if (value := getattr(config, key, None)) is not None), None)


def experts_a_token(config: PreTrainedConfig) -> int | None:
    """How many experts a router chooses; None where no known key says it."""
    return first_of(config, ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"))


def _matmul_weights(model: nn.Module, config: PreTrainedConfig) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    shares = {names[id(m.weight)]: 1.0 for m in model.modules() if isinstance(m, nn.Linear)}
    for module in (m for m in model.modules() if is_fused(m)):
        stored = module.get_parameter("down_proj").shape[0]
        experts = first_of(config, ("num_experts", "num_local_experts", "n_routed_experts")) or stored
        active = min(1.0, (experts_a_token(config) or experts) / experts)
        shares |= {names[id(p)]: active for p in module.parameters() if p.ndim == 3}
    return shares


def _check_class(layer: nn.Module, prefix: str, groups: Sequence[Group], config: PreTrainedConfig) -> None:
    """The layer's class, built with fewer units of a sublayer, must have the shapes that slicing gives."""
    for key, value in (pair for g in groups for pair in said_by_config(g, whole(g)).items()):
        if getattr(config, key) != value:
            raise RefusedError(f"{key} is {getattr(config, key)}, but the weights say {value}")
    if not any(g.sizes for g in groups):
        return  # the class takes its width from elsewhere: modeling_pruned sets it
    group = groups[-1]
    own = f"{group.gate_at if group.experts else group.gate_at.rpartition('.')[0]}."
    added = getattr(config, "secateur", {}).get("biases", {}).get(str(group.layer), [])
    biases = {f"{path}.bias" for path in added}  # of an earlier pruning; the layer's class does not know of them
    dense = {prefix + n: tuple(p.shape) for n, p in layer.named_parameters() if n not in biases}
    for less in (0, 1):  # one unit, one unit fewer
        fewer = {g.name: max(1, g.width - 1) if less else 1 for g in groups}
        sizes = {g.name: Size(fewer[g.name], fewer.get(g.keys, g.parts)) for g in groups}
        some = " and ".join(f"{fewer[g.name]} of {g.width} {g.kind}" for g in groups)
        attempt = f"{type(layer).__name__} built with {some}"
        narrow = copy.copy(config)
        if group.attends:
            narrow.head_dim = head_dim(config)
        for key, value in (pair for g in groups for pair in said_by_config(g, sizes[g.name]).items()):
            setattr(narrow, key, value)
        try:
            with torch.device("meta"):
                built = type(layer)(narrow, group.layer)
        except (TypeError, ValueError, AttributeError, RuntimeError, AssertionError, ZeroDivisionError) as error:
            raise RefusedError(f"{attempt} fails: {' '.join(str(error).split())}") from None
        expected = sliced_shapes(groups, sizes, dense)
        actual = {prefix + n: tuple(p.shape) for n, p in built.named_parameters()}
        if group.experts:  # of a pruned checkpoint, some may be gone, which the layer's class does not know
            expected |= {s.param: (actual[s.param][0], *expected[s.param][1:]) for s in group.slices}
        for name in (n for n in expected if n.startswith(own) and expected[n] != actual.get(n)):
            shapes = f"{actual.get(name)}, not {expected[name]}"
            raise RefusedError(f"{attempt} has {name.removeprefix(own)} of shape {shapes}")
