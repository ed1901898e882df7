"""Models and tokenizers from a folder, the hub or a GGUF file, with errors that say what is wrong and what to do.

Only safetensors and GGUF weights are read, never pickles; code from a checkpoint runs only on request.
"""

import hashlib
import textwrap
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import cached_file

from secateur.config import IN_MEMORY
from secateur.depth import with_depth
from secateur.describe import Description, check_causal, check_unquantised, describe
from secateur.families import build, config_class, model_class
from secateur.files import InputError, read_json
from secateur.gguf_header import check_gguf
from secateur.offloaded import forget_ties, weight_of
from secateur.own_code import AGAIN, check_code
from secateur.selection import AttentionUnit, Depth
from secateur.untrusted import (
    INDEX,
    MAX_HEADER,
    check_folder,
    check_weights,
    parse_json,
    plain_names,
    read_bytes,
)

SAMPLED = 256
"""Values of each weight that `weights_fingerprint` looks at."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to be pruned."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    description: Description
    checkpoint_dtype: torch.dtype
    """dtype that the checkpoint's weights are kept in, which the export keeps."""


@dataclass(frozen=True)
class Described:
    """What is known of a model before any weight is read."""

    model: PreTrainedModel
    """On the meta device."""
    description: Description
    config: PreTrainedConfig

    @property
    def checkpoint_dtype(self) -> torch.dtype:
        """dtype that the checkpoint's weights are kept in, as its configuration says."""
        dtype = self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load(
    name: str,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    offload: Path | None = None,
    described: Described | None = None,
    layers_on: str | None = None,
    spread: bool = False,
) -> Loaded:
    """Loads a causal LM and its tokenizer, in eval mode and without gradients. Raises InputError with one line.

    With a folder to `offload` to, weights stay on disk, where accelerate reads each one when it is needed
    (`weight_of`): in the model's own files, or in this folder where transformers converts them. `described` is what is
    known of the model already (`describe_selected`). With `layers_on` "cpu" or "disk" only the decoder layers lie there
    (`places`), and come to the device one linear map after the other, whenever they are used. `spread`: the model
    stays on the CPU, in the dtype of the device, over several of which it is to be spread (sharding.py).
    """
    where = _source(name)
    described = described or describe_selected(name, trust_remote_code)  # before any weight is read
    config, target = described.config, pick_device(device)
    in_memory = learning_dtype(described, target, dtype)
    if layers_on == "cpu" and target.type == "cpu":
        raise InputError("--offload cpu is for accelerators, and this run learns on the CPU; say --offload disk")
    wanted = in_memory if offload is None or layers_on else described.checkpoint_dtype
    where_to = places(described, target, layers_on) if layers_on else {"": "disk"}
    placed = {} if offload is None else {"device_map": where_to, "offload_folder": str(offload)}
    model = read_model(name, config, wanted, trust_remote_code, **placed)
    tokenizer = _one_line(
        lambda: AutoTokenizer.from_pretrained(**where, trust_remote_code=trust_remote_code),
        f"cannot load the tokenizer of {name}",
    )
    if type(tokenizer).__module__.startswith("transformers_modules"):
        raise InputError(
            f"the tokenizer of {name} is code of its own, which no pruned checkpoint brings along; save it "
            "as a tokenizer.json that transformers reads alone first"
        )
    model = model.eval().requires_grad_(False)
    if offload is None:
        model = model if spread else model.to(target)
    else:  # buffers are in memory all the same, and are exported as they are there
        for buffer in (b for b in model.buffers() if b.dtype == wanted):
            buffer.data = buffer.data.to(in_memory)
        forget_ties(model)
    return Loaded(model, tokenizer, described.description, described.checkpoint_dtype)


def places(known: Described | Loaded, device: torch.device, layers_on: str) -> dict[str, str]:
    """Where each module is to lie when the decoder layers lie elsewhere: all others are named, as accelerate wants.

    Of the pruned model, too: it has the same modules outside of its layers.
    """
    layers = known.description.layers
    others = [n for n, m in known.model.named_modules() if not list(m.children()) and not n.startswith(f"{layers}.")]
    return {**dict.fromkeys(others, str(device)), layers: layers_on}


def learning_dtype(described: Described, device: torch.device, dtype: str) -> torch.dtype:
    """The dtype of weights while learning (`--dtype`)."""
    if dtype != "auto":
        return getattr(torch, dtype)
    return described.checkpoint_dtype if device.type != "cpu" else torch.float32


def selected(
    model: PreTrainedModel,
    units: Collection[str] | None,
    attention_unit: AttentionUnit | None,
    keep: Collection[str],
    depth: Depth,
) -> Description:
    """What a run prunes of a model: `units` are the kinds to prune (Description.only), None: all that there are;
    `attention_unit` says what those of attention are, `keep` which layers stay whole (Description.keeping), `depth`
    whether sublayers have gates of their own (depth.py)."""
    description = describe(model, attention_unit)
    description = description if units is None else description.only(units)
    description.check_attention(attention_unit)
    return with_depth(description.keeping(keep), model, depth)


def read_model(
    name: str, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool, **options: Any
) -> PreTrainedModel:
    """The causal LM of a configuration with its weights. Raises InputError with one line."""
    where = _source(name)

    def read() -> PreTrainedModel:
        if "gguf_file" not in where:
            _check_weights(where["pretrained_model_name_or_path"], _built(config, trust_remote_code))
        model: PreTrainedModel = model_class(config).from_pretrained(
            **where,
            dtype=dtype,
            use_safetensors=None if "gguf_file" in where else True,
            trust_remote_code=trust_remote_code,
            **options,
        )
        return model

    found: PreTrainedModel = _one_line(read, f"cannot load the weights of {name}")
    return found


def _built(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a configuration on the meta device. Raises ValueError where a weight would have no values."""
    with torch.device("meta"):
        skeleton = build(config, trust_remote_code)
    if empty := [name for name, parameter in skeleton.named_parameters() if not parameter.numel()]:
        raise ValueError(f"{empty[0]} would have no values")
    return skeleton


def _check_weights(place: str, skeleton: PreTrainedModel) -> None:
    """Checks the files of weights in a folder, or the names of those on the hub, before any is read."""
    if Path(place).is_dir():
        check_weights(Path(place))
        size = sum(path.stat().st_size for path in Path(place).glob("*.safetensors"))
        if (values := sum(parameter.numel() for parameter in skeleton.parameters())) > 2 * size:
            raise ValueError(f"config.json asks for {values:,} values, and the files have {size:,} bytes")
    elif index := cached_file(place, INDEX, _raise_exceptions_for_missing_entries=False):
        plain_names(parse_json(read_bytes(Path(index), MAX_HEADER)))


def read_export(folder: Path, dtype: torch.dtype, **placed: Any) -> PreTrainedModel:
    """The checkpoint in a folder as its user loads it, on the CPU or where a `device_map` says; its code is Secateur's
    own modelling file.

    Where another library in this process has registered a configuration for its `model_type`, too.
    """
    values = read_json(folder / "config.json", AGAIN)
    check_code(folder)

    def read() -> PreTrainedModel:
        check_folder(folder)
        check_weights(folder)
        own = values.get("auto_map", {}).get("AutoModelForCausalLM")
        cls = get_class_from_dynamic_module(own, str(folder)) if own else AutoModelForCausalLM
        model, found = cls.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **placed
        )
        if found["missing_keys"]:
            raise ValueError(f"its weights lack {min(found['missing_keys'])}")
        forget_ties(model)
        loaded: PreTrainedModel = model.eval()
        return loaded

    exported: PreTrainedModel = _one_line(read, f"cannot load the export {folder}")
    return exported


def weights_fingerprint(model: torch.nn.Module, names: Iterable[str]) -> str:
    """Hash of a sample of each of these weights, by which gates know the model they were learned on; the same in any
    dtype from bfloat16 up, on disk or not."""
    digest = hashlib.sha256()
    for name in names:
        flat = weight_of(model, name).flatten()
        index = torch.linspace(0, len(flat) - 1, min(SAMPLED, len(flat)), dtype=torch.float64).long()
        values = flat[index.to(flat.device)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {len(flat)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_pretrained(
    name: str, trust_remote_code: bool = False, attention_unit: AttentionUnit | None = None
) -> tuple[Description, PreTrainedConfig]:
    """What can be pruned in a model, from its configuration alone."""
    config, skeleton = _skeleton(name, trust_remote_code)
    return describe(skeleton, attention_unit), config


def describe_selected(
    name: str,
    trust_remote_code: bool = False,
    units: Collection[str] | None = None,
    attention_unit: AttentionUnit | None = None,
    keep: Collection[str] = (),
    depth: Depth = "off",
) -> Described:
    """The same with what a run prunes alone (`selected`)."""
    config, skeleton = _skeleton(name, trust_remote_code)
    return Described(skeleton, selected(skeleton, units, attention_unit, keep, depth), config)


def _skeleton(name: str, trust_remote_code: bool) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """The configuration of a model, and the model that it says, built on the meta device, without weights."""
    config = load_config_of(name, trust_remote_code)
    skeleton: PreTrainedModel = _one_line(
        lambda: _built(config, trust_remote_code), f"cannot build {name} from its configuration"
    )
    return config, skeleton


def load_config_of(name: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration of a model, checked to be a causal LM's. Raises InputError with one line."""
    where = _source(name)

    def read() -> PreTrainedConfig:
        place = Path(where["pretrained_model_name_or_path"])
        if "gguf_file" in where:
            check_gguf(place / where["gguf_file"])
        elif place.is_dir():
            check_folder(place)
        found = AutoConfig if "gguf_file" in where else config_class(PreTrainedConfig.get_config_dict(**where)[0])
        own = {"trust_remote_code": trust_remote_code} if found is AutoConfig else {}
        config: PreTrainedConfig = found.from_pretrained(**where, **own)
        return config

    config = _one_line(read, f"cannot read the configuration of {name}")
    check_causal(config)
    check_unquantised(config)
    return config


def pick_device(device: str) -> torch.device:
    """The device by name; `auto` is the first accelerator, else the CPU. InputError for one that is not there."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} is not usable here: {str(error).splitlines()[0]}") from None


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that learning passes run in (`--precision`): bfloat16 matrix products over float32 weights, or none.

    `auto` takes bfloat16 on CPUs that multiply in it (2.6 times faster a step on an AVX-512 machine, docs/study.md) and
    on accelerators, where weights are loaded in the checkpoint's dtype and autocast only matters if that is float32.
    """
    if precision == "auto" and device.type == "cpu":
        can: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        precision = "bfloat16" if can.get("avx512_bf16") or can.get("amx_bf16") else "float32"
    # Without the cache: it would keep the first step's weights until the context is left, while they are trained.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "float32", cache_enabled=False)


def _source(name: str) -> dict[str, str]:
    """Arguments of `from_pretrained` for a folder, a hub id or a GGUF file."""
    if name.startswith(IN_MEMORY):
        raise InputError(
            f"this run pruned a model {name}, which is gone: save that model and its tokenizer (save_pretrained) and "
            "name their folder as `model:` in the run's config.yaml, or go on in Python by secateur.resume(RUN, model, "
            "tokenizer)"
        )
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"no such GGUF file: {name}")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{name} is not a model folder: it has no config.json")
        return {"pretrained_model_name_or_path": str(path)}
    if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name} is neither a model folder, a GGUF file nor a hub id (owner/name)")
    return {"pretrained_model_name_or_path": name}


def _one_line(load, what: str):  # type: ignore[no-untyped-def]
    """Runs a loader of transformers; its many kinds of errors become one line."""
    try:
        return load()
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"{what}: a safetensors file is truncated or broken ({error}); download it again") from None
    except BaseException as error:  # what a file of someone else raises in transformers, tokenizers or torch is open
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        reason = textwrap.shorten(str(error), 400, placeholder=" …") or type(error).__name__
        raise InputError(f"{what}: {reason}") from None
