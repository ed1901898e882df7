"""Models and tokenizers from a folder, the hub or a GGUF file, with errors that say what is wrong and what to do.

Only safetensors and GGUF weights are read, never pickles; code from a checkpoint runs only on request.
"""

import hashlib
import textwrap
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
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

from secateur.describe import Description, check_causal, check_unquantised, describe
from secateur.families import build, config_class, model_class
from secateur.files import InputError, read_json
from secateur.selection import AttentionUnit

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


def load(
    name: str,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    offload: Path | None = None,
    units: Collection[str] | None = None,
    attention_unit: AttentionUnit | None = None,
    keep: Collection[str] = (),
    spread: bool = False,
) -> Loaded:
    """Loads a causal LM and its tokenizer, in eval mode and without gradients. Raises InputError with one line.

    With a folder to `offload` to, weights stay on disk, where accelerate reads each one when it is needed
    (`weight_of`). `units` are the kinds to prune (Description.only), None: all that there are; `attention_unit` says
    what those of attention are, `keep` which layers stay whole (Description.keeping). `spread`: the model stays on the
    CPU, in the dtype of the device, over several of which it is to be spread (sharding.py).
    """
    where = _source(name)
    description, config = describe_pretrained(name, trust_remote_code, attention_unit)  # before any weight is read
    description = description if units is None else description.only(units)
    description.check_attention(attention_unit)
    description = description.keeping(keep)
    target = pick_device(device)
    own_dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    wanted = own_dtype if target.type != "cpu" or offload else torch.float32
    on_disk = {} if offload is None else {"device_map": {"": "disk"}, "offload_folder": str(offload)}
    model = read_model(name, config, wanted if dtype == "auto" else getattr(torch, dtype), trust_remote_code, **on_disk)
    tokenizer = _one_line(
        lambda: AutoTokenizer.from_pretrained(**where, trust_remote_code=trust_remote_code),
        f"cannot load the tokenizer of {name}",
    )
    model = model.eval().requires_grad_(False)
    return Loaded(model if offload or spread else model.to(target), tokenizer, description, own_dtype)


def read_model(
    name: str, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool, **options: Any
) -> PreTrainedModel:
    """The causal LM of a configuration with its weights. Raises InputError with one line."""
    where = _source(name)
    model: PreTrainedModel = _one_line(
        lambda: model_class(config).from_pretrained(
            **where,
            dtype=dtype,
            use_safetensors=None if "gguf_file" in where else True,
            trust_remote_code=trust_remote_code,
            **options,
        ),
        f"cannot load the weights of {name}",
    )
    return model


def read_export(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The checkpoint in a folder as its user loads it, on the CPU; its code is Secateur's own modelling file.

    Where another library in this process has registered a configuration for its `model_type`, too.
    """
    values = read_json(folder / "config.json", "secateur export RUN")
    own = values.get("auto_map", {}).get("AutoModelForCausalLM")
    cls = get_class_from_dynamic_module(own, str(folder)) if own else AutoModelForCausalLM
    model: PreTrainedModel = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    return model.eval()


def weight_of(model: torch.nn.Module, name: str) -> torch.Tensor:
    """A parameter's values, read from disk where accelerate has offloaded them."""
    parameter = model.get_parameter(name).data
    if not parameter.is_meta:
        return parameter
    module, _, own = name.rpartition(".")
    offloaded: Any = model.get_submodule(module)
    value: torch.Tensor = offloaded._hf_hook.weights_map[own]
    return value


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Hash of a sample of each weight, by which gates know the model they were learned on; the same in any dtype from
    bfloat16 up, on disk or not."""
    digest = hashlib.sha256()
    for name, _ in model.named_parameters():
        flat = weight_of(model, name).flatten()
        index = torch.linspace(0, len(flat) - 1, min(SAMPLED, len(flat)), dtype=torch.float64).long()
        values = flat[index.to(flat.device)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {len(flat)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_pretrained(
    name: str, trust_remote_code: bool = False, attention_unit: AttentionUnit | None = None
) -> tuple[Description, PreTrainedConfig]:
    """What can be pruned in a model, from its configuration alone: it is built on the meta device, without weights."""
    config = load_config_of(name, trust_remote_code)
    with torch.device("meta"):
        skeleton = _one_line(
            lambda: build(config, trust_remote_code),
            f"cannot build {name} from its configuration",
        )
    return describe(skeleton, attention_unit), config


def load_config_of(name: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration of a model, checked to be a causal LM's. Raises InputError with one line."""
    where = _source(name)

    def read() -> PreTrainedConfig:
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
    except SafetensorError as error:
        raise InputError(f"{what}: a safetensors file is truncated or broken ({error}); download it again") from None
    except InputError:
        raise
    except (
        OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError, StrictDataclassError
    ) as error:  # fmt: skip
        reason = textwrap.shorten(str(error), 400, placeholder=" …") or type(error).__name__
        raise InputError(f"{what}: {reason}") from None
