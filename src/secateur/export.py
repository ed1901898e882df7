"""Model + plan → an ordinary Hugging Face checkpoint: weights, configuration, tokenizer, model card. `secateur export`.

Two forms. Stock: the same widths in every layer, said by the stock configuration; no code is needed to load it.
Ragged: widths differ by layer, said by `config.per_layer_config`, the standard key for that; transformers ships the
configuration's side of it only, so `modeling_pruned.py` goes into the checkpoint. Before any weight is written, the
class that the user will load is built on the meta device, and its shapes are compared with the plan's.
"""

import copy
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from secateur import families
from secateur.describe import Description, check_unquantised, head_dim
from secateur.experts import is_fused
from secateur.files import InputError, replacing, write_json, write_text
from secateur.offloaded import weight_of
from secateur.own_code import MODELING_FILE, STOCK, modeling_text, pruned_name
from secateur.plan import Plan
from secateur.shards import write_shards
from secateur.slicing import added_biases, pruned_shapes, sliced
from secateur.units import said_by_config, whole

EXPORT_FORMAT = 1


def export(
    model: PreTrainedModel,
    tokenizer: Any,
    description: Description,
    plan: Plan,
    folder: Path,
    *,
    card: Callable[[bool], str] | None = None,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
    outdated: Iterable[Path] = (),
) -> None:
    """Writes the pruned checkpoint to `folder`, which appears when it is complete and replaces what was there.

    `tokenizer` may be None; `card` makes the README.md, told whether this is a stock checkpoint; `dtype` None keeps
    each weight's own; `outdated` are files that speak of what was there. Memory: the model, if its weights are not
    offloaded to disk, and what cutting one of them takes.
    Raises InputError when the plan's widths cannot be said in the shape it asks for.
    """
    stock, stock_base = _stock_classes(model)
    values = _config_values(model.config, description, dtype or model.dtype, base_model, plan)
    ragged = _ragged(values, description, plan)
    if plan.policy.uniform and plan.means is not None:
        raise InputError("a uniform shape has no place for the biases that stand for removed units; use --shape ragged")
    with replacing(folder, outdated) as temporary:
        temporary.mkdir()
        if stock.__module__.startswith(families.__name__):
            values = values | _travelling(stock, temporary)
        required = plan.policy.uniform or "per_layer_config" not in ragged
        is_stock = _write_stock(values, stock, description, plan, temporary, required)
        if not is_stock:
            classes = stock, stock_base
            if values["model_type"] == "llama" and _heads_vary(ragged) and not _biases(values):
                # LlamaConfig reads the head count as soon as it is made, which fails where layers differ: without
                # trust_remote_code not even the tokenizer would load.
                ragged, classes = _as_mistral(ragged), (MistralForCausalLM, MistralModel)
            _write_ragged(ragged | _auto_classes(classes[0]), classes[0].config_class, temporary)
            write_text(temporary / MODELING_FILE, _modeling_text(*classes))
            _check_shapes(_pruned_skeleton(temporary), description, plan)
        _write_weights(model, description, plan, temporary, max_shard_size, dtype)
        if getattr(model, "generation_config", None) is not None:
            write_text(temporary / "generation_config.json", model.generation_config.to_json_string())
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if card is not None:
            write_text(temporary / "README.md", card(is_stock))


# --- configuration ---------------------------------------------------------------------------------------------------


def _config_values(
    config: PreTrainedConfig, description: Description, dtype: torch.dtype, base_model: str | None, plan: Plan
) -> dict[str, Any]:
    """What config.json says of the unpruned model, with the head size spelled out, and by which plan it is cut."""
    config = copy.deepcopy(config)
    check_unquantised(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers has turned GGUF blocks into plain weights
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    values.pop("auto_map", None)
    values["dtype"] = str(dtype).removeprefix("torch.")
    if any(group.attends for group in description.groups):
        values["head_dim"] = head_dim(config)
    earlier = values.get("secateur", {"base_model": base_model, "closed": {}})
    earlier = {key: value for key, value in earlier.items() if key not in ("updates", "recovery_steps")}
    return values | {"secateur": {"format": EXPORT_FORMAT, **earlier, "plan": plan.digest}}


def _ragged(values: dict[str, Any], description: Description, plan: Plan) -> dict[str, Any]:
    """Adds per-layer widths where they differ from the unpruned ones, and the sublayers that are gone."""
    widths = {int(layer): dict(keys) for layer, keys in values.get("per_layer_config", {}).items()}
    own: dict[str, Any] = {**values["secateur"]}
    sizes = plan.sizes(description.groups)

    def put(key: str, layer: int | str, entry: Any) -> None:
        """Adds an entry to a layer's list, in the place of an earlier one for the same thing: what it begins with."""

        def what(e: Any) -> str:
            return str(e if isinstance(e, str) else e[0])

        layers = own.get(key, {})
        others = [e for e in layers.get(str(layer), []) if what(e) != what(entry)]
        own[key] = {**layers, str(layer): [*others, entry]}

    for group in (g for g in description.groups if not g.gate_only):
        size, path = sizes[group.name], group.gate_at.removeprefix(f"{description.layers}.{group.layer}.")
        module, _, writer = path.rpartition(".")
        if (said := said_by_config(group, size)) != said_by_config(group, whole(group)):
            widths.setdefault(group.layer, {}).update(said)
        if group.sizes:
            put("narrowed", group.layer, path if group.experts else module)
        if size.width == 0 and group.writes:
            put("closed", group.layer, ["heads" if group.attends else "channels", module, writer])
        elif not group.sizes:
            put("widths", group.layer, [module, writer, size.width])
        if group.experts and size.parts < group.experts:
            earlier = dict(own.get("experts", {}).get(str(group.layer), []))
            names = earlier.get(path, list(range(group.experts)))
            put("experts", group.layer, [path, [names[e] for e in plan.pack(group).experts.tolist()]])
    for name in added_biases(description, plan):
        layer, _, path = name.removeprefix(f"{description.layers}.").removesuffix(".bias").partition(".")
        put("biases", layer, path)
    if all(sizes[g.name] == whole(g) for g in description.groups if not g.gate_only) and not widths:
        return values
    return values | {
        "per_layer_config": {str(layer): widths[layer] for layer in sorted(widths)},
        "secateur": own,
    }


def _write_stock(
    values: dict[str, Any],
    stock: type[PreTrainedModel],
    description: Description,
    plan: Plan,
    folder: Path,
    required: bool,
) -> bool:
    """Writes a stock config.json if it gives a model of the plan's shapes: widths of any shape may turn out equal.

    Raises InputError where it does not and is `required`.
    """
    try:
        _check_shapes(_write_uniform(values, stock, description, plan, folder), description, plan)
    except InputError:
        if required:
            raise
        return False
    return True


def _write_uniform(
    values: dict[str, Any], stock: type[PreTrainedModel], description: Description, plan: Plan, folder: Path
) -> nn.Module:
    """Writes a stock config.json with one width for all layers; returns the model it gives, on the meta device."""
    widths: dict[str, Counter[int]] = {}
    sizes = plan.sizes(description.groups)
    for group in description.groups:
        for key, value in said_by_config(group, sizes[group.name]).items():
            widths.setdefault(key, Counter())[value] += 1
    for key, counts in widths.items():
        if len(counts) > 1 or 0 in counts:
            found = ", ".join(f"{width} in {layers} layers" for width, layers in sorted(counts.items()))
            raise InputError(
                f"a uniform shape needs one {key} above 0 for all layers, the plan has {found}; "
                "plan again with `--shape uniform` or export with `--shape ragged`"
            )
    values = values | {key: next(iter(counts)) for key, counts in widths.items()}
    values |= {"architectures": [stock.__name__]}
    values.pop("per_layer_config", None)
    try:
        return _stock_skeleton(values, folder)
    except (ValueError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        name = stock.config_class.__name__
        if values["model_type"] != "llama":
            raise InputError(f"{name} refuses these widths: {reason} Export with `--shape ragged`") from None
        if biases := _biases(values):
            raise InputError(
                f"LlamaConfig refuses these widths, MistralConfig takes them but has no {biases[0]}: {reason} "
                "Export with `--shape ragged`"
            ) from None
        return _stock_skeleton(_as_mistral(values), folder)


def _stock_skeleton(values: dict[str, Any], folder: Path) -> nn.Module:
    write_json(folder / "config.json", values)
    with torch.device("meta"):
        return families.build(families.config_class(values).from_pretrained(folder))


def _biases(values: dict[str, Any]) -> list[str]:
    """Biases that a Llama configuration asks for, and MistralConfig has no word for."""
    return [key for key in ("attention_bias", "mlp_bias") if values.get(key)]


def _heads_vary(ragged: dict[str, Any]) -> bool:
    return any("num_attention_heads" in widths for widths in ragged["per_layer_config"].values())


def _write_ragged(ragged: dict[str, Any], config_class: type[PreTrainedConfig], folder: Path) -> None:
    """Writes a config.json of widths by layer. Where the stock configuration looks at the one head count of a model, a
    key lets it: what reads the configuration alone (tokenizers, servers with a plugin) would fail otherwise."""
    write_json(folder / "config.json", ragged)
    try:
        config_class.from_pretrained(folder)
    except AmbiguousGlobalPerLayerAttributeError:
        write_json(folder / "config.json", ragged | {"allow_global_per_layer_attribute_access": True})


def _as_mistral(values: dict[str, Any]) -> dict[str, Any]:
    """Mistral is the same network, and its configuration takes any head count."""
    unknown = {"attention_bias", "mlp_bias", "pretraining_tp"}
    kept = {key: value for key, value in values.items() if key not in unknown}
    return kept | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


# --- the class that will be loaded -----------------------------------------------------------------------------------


def _stock_classes(model: PreTrainedModel) -> tuple[type[PreTrainedModel], type[PreTrainedModel]]:
    """The classes of the causal LM and of its base model that the pruned ones extend."""
    if model.config.model_type in families.FAMILIES:
        _, stock, base = families.FAMILIES[model.config.model_type]
        return stock, base
    return _stock_class(type(model)), _stock_class(type(model.base_model))


def _stock_class(cls: type) -> type[PreTrainedModel]:
    """The class of transformers itself that `cls` is or, in a checkpoint pruned before, extends."""
    for base in cls.__mro__:
        if base.__module__.startswith("transformers.models."):
            return base
    raise InputError(
        f"{cls.__name__} is code from a checkpoint, not from transformers; its pruned form cannot be written"
    )


def _auto_classes(stock: type[PreTrainedModel]) -> dict[str, Any]:
    """What config.json says of the classes in the modelling file."""
    classes = {
        "AutoConfig": "PrunedConfig",
        "AutoModel": "PrunedModel",
        "AutoModelForCausalLM": pruned_name(stock.__name__),
    }
    module = MODELING_FILE.removesuffix(".py")
    auto_map = {auto: f"{module}.{name}" for auto, name in classes.items()}
    return {"architectures": [pruned_name(stock.__name__)], "auto_map": auto_map}


def _modeling_text(stock: type[PreTrainedModel], stock_base: type[PreTrainedModel]) -> str:
    """The modelling file of this architecture."""
    classes = {}
    for alias, cls in zip(STOCK, (stock.config_class, stock, stock_base), strict=True):
        own = cls.__module__.startswith(families.__name__)  # such a file travels beside this one
        module = f".{cls.__module__.rpartition('.')[2]}" if own else cls.__module__
        classes[alias] = (module, cls.__name__)
    return modeling_text(classes)


def _travelling(stock: type[PreTrainedModel], folder: Path) -> dict[str, Any]:
    """Puts the file of a model that transformers lacks into the checkpoint; what config.json says of it."""
    source = Path(str(sys.modules[stock.__module__].__file__))
    write_text(folder / source.name, source.read_text(encoding="utf-8"))
    name = stock.__name__.removesuffix("ForCausalLM")
    classes = {"AutoConfig": f"{name}Config", "AutoModel": f"{name}Model", "AutoModelForCausalLM": stock.__name__}
    return {"auto_map": {auto: f"{source.stem}.{cls}" for auto, cls in classes.items()}}


def _pruned_skeleton(folder: Path) -> nn.Module:
    """The model on the meta device, built by the very files that go into the checkpoint."""
    package = ModuleType(f"secateur_export_{id(folder)}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    try:
        module = importlib.import_module(f"{package.__name__}.{MODELING_FILE.removesuffix('.py')}")
        config = module.PrunedConfig.from_pretrained(folder)
        with torch.device("meta"):
            return getattr(module, config.architectures[0])(config)
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == package.__name__]:
            del sys.modules[name]


def _check_shapes(skeleton: nn.Module, description: Description, plan: Plan) -> None:
    expected = pruned_shapes(description, plan)
    actual = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    for name in [*expected, *actual]:
        if expected.get(name) != actual.get(name):
            raise InputError(
                f"{type(skeleton).__name__} cannot hold this plan in `{plan.shape}` shape: {name} would be "
                f"{actual.get(name, 'absent')}, the plan leaves {expected.get(name, 'nothing')}"
            )


# --- weights ---------------------------------------------------------------------------------------------------------


def buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What checkpoints hold beside parameters: routers' biases."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    yield from ((name, tensor) for name, tensor in model.state_dict().items() if name not in parameters)


def as_shipped(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors under the names that the model's checkpoints have for them, experts one by one: what stock servers read.

    Only of mixtures: some dense models read older names that they do not write.
    """
    mixture = any(is_fused(module) for module in model.modules())
    for name, tensor in tensors:
        yield from (revert_weight_conversion(model, {name: tensor}).items() if mixture else [(name, tensor)])


def _write_weights(
    model: PreTrainedModel, description: Description, plan: Plan, folder: Path, max_shard_size: int | str, dtype: Any
) -> None:
    """Safetensors files, each tensor written as soon as it has been cut."""
    held, names = (
        list(buffers(model)),
        list(description.shapes),
    )  # of weights on disk, tied ones are not the same object
    on_meta = [(name, model.get_parameter(name).to("meta")) for name in names]
    on_meta += [(name, buffer.to("meta")) for name, buffer in held]
    layout = dict(as_shipped(model, sliced(on_meta, description, plan, dtype)))
    values = chain(((name, weight_of(model, name)) for name in names), held)
    write_shards(folder, layout, as_shipped(model, sliced(values, description, plan, dtype)), max_shard_size)
