"""What Python code gives to `secateur.prune` in memory, a model and texts, as the stages read it.

The model is not worked on itself: a twin of it is built from its configuration, as transformers builds one that it
loads, and holds the same weights, in the same memory. So hooks, training mode, `requires_grad` and the attention
implementation of the model that was given are never touched, and what is pruned is what its configuration says.
Texts become a file in the run folder, so that the run can be repeated from its config.yaml.
"""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from secateur.config import IN_MEMORY, Config
from secateur.data import POOL_CHARACTERS
from secateur.describe import check_causal, check_unquantised
from secateur.export import buffers
from secateur.files import InputError, replacing
from secateur.load import Loaded, pick_device, selected, weights_fingerprint
from secateur.run import GIVEN_TEXTS
from secateur.text import encodable
from secateur.verify import with_weights_in

CHARACTERS_A_TOKEN = 16
"""More than tokens have: how much of a longer text is written down beside the pool that documents are shuffled in."""
LONGEST_NAME = 300
"""A `str` of more characters, or of several lines, is a text and no path."""


def name_of(model: PreTrainedModel) -> str:
    """What config.yaml calls a model in memory: where it was loaded from, as others may know, and its weights' hash."""
    source = str(getattr(model.config, "_name_or_path", "") or "")
    name = Path(source).name if source.startswith(("/", ".", "~")) or Path(source).exists() else source
    names = [n for n, _ in model.named_parameters()]
    return f"{IN_MEMORY}{name or type(model).__name__}, weights {weights_fingerprint(model, names)}"


def check_given(model: Any, tokenizer: Any) -> None:
    """Raises InputError for what is no model in memory that can be pruned."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        hint = "; merge the adapter first (merge_and_unload)" if hasattr(model, "merge_and_unload") else ""
        raise InputError(f"a model is a PreTrainedModel of transformers, a name or a Config, not a {kind}{hint}")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"this {kind} has adapters of PEFT in it; load it without them, or merge them first")
    if tokenizer is None:
        raise InputError("a model in memory needs its tokenizer beside it: prune(model, tokenizer, …)")
    places = {parameter.device for parameter in model.parameters()}
    if torch.device("meta") in places:
        raise InputError(f"weights of this {kind} are not in memory; load them all, or give the model's name instead")
    if len(places) > 1:
        raise InputError(f"this {kind} lies on {len(places)} devices; put it on one of them (model.to)")
    check_causal(model.config)
    check_unquantised(model.config)


def loaded_from(model: PreTrainedModel, tokenizer: Any, config: Config) -> Loaded:
    """A model in memory as `load` gives one that it reads, sharing its weights where dtype and device are the run's.

    Raises InputError where the model is not what its configuration says.
    """
    first = next(model.parameters())
    own_dtype = first.dtype
    device = first.device if config.device == "auto" else pick_device(config.device)
    wanted = own_dtype if device.type != "cpu" else torch.float32
    wanted = wanted if config.dtype == "auto" else getattr(torch, config.dtype)
    twin = with_weights_in(_twin(model), wanted).to(device)
    description = selected(twin, config.units, config.attention_unit, config.keep, config.depth)
    return Loaded(twin, tokenizer, description, own_dtype)


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another model of the same configuration and class with parameters of its own on the same storage."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = config._experts_implementation = None  # transformers' choice, as for one it loads
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(config))
    shapes = [{name: tuple(p.shape) for name, p in m.named_parameters()} for m in (model, skeleton)]
    for name in [*shapes[0], *shapes[1]]:
        if shapes[0].get(name) != shapes[1].get(name):
            has, said = (of.get(name, "none") for of in shapes)
            raise InputError(
                f"the model is not what its configuration says: {name} is {has} in memory and {said} by the "
                "configuration; change that too, or load the model anew"
            )
    # Buffers that no checkpoint holds are computed anew: rotary frequencies that were cast with a model are not exact.
    with init_empty_weights(include_buffers=False):
        twin: PreTrainedModel = type(model)(config)
    shared: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = shared.setdefault(id(parameter), nn.Parameter(parameter.data, requires_grad=False))
        path, _, last = name.rpartition(".")
        setattr(twin.get_submodule(path), last, own)
    kept = dict(buffers(model))
    for name, buffer in buffers(twin):
        buffer.data = kept[name].detach().clone()
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin.eval()


# --- texts -----------------------------------------------------------------------------------------------------------


def is_text(data: Any) -> bool:
    """Whether `data` is text itself, not the name of where it is."""
    if isinstance(data, str):
        return "\n" in data or len(data) > LONGEST_NAME
    return data is not None


def place_of(data: Any, setting: str, folder: Path) -> Path:
    """The file in a run folder that texts go to which were given for `data` or `eval_data`."""
    return folder / (GIVEN_TEXTS[setting] + (".txt" if isinstance(data, str) else ".jsonl"))


def write_given(path: Path, data: Any, setting: str, config: Config) -> None:
    """Writes texts that were given in memory: a text as it is, of others a line a document.

    No more of them than the run can use, so that `data` may be a stream. Raises InputError for what is no text.
    """
    wanted = config.steps * config.batch_size * config.seq_len + config.held_out_tokens
    most = POOL_CHARACTERS + CHARACTERS_A_TOKEN * wanted
    if setting == "eval_data":
        most = CHARACTERS_A_TOKEN * config.eval_windows * config.eval_length or most
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        if isinstance(data, str):
            file.write(encodable(data))
            return
        characters = 0
        for document in _documents(data, setting, config.text_column):
            file.write(json.dumps({config.text_column: document}, ensure_ascii=False) + "\n")
            characters += len(document)
            if characters > most:
                break


def _documents(data: Any, setting: str, column: str) -> Iterator[str]:
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        hint = f" (it has {', '.join(map(repr, data))}: give one of them)" if isinstance(data, Mapping) else ""
        what = "a path, a name, a text, a list of texts or a Dataset"
        raise InputError(f"{setting} is a {type(data).__name__}{hint}; it can be {what}")
    for number, row in enumerate(data):
        if isinstance(row, Mapping) and column not in row:
            raise InputError(f"{setting} has no column {column!r} (columns: {', '.join(row)}); say text_column=")
        text = row[column] if isinstance(row, Mapping) else row
        if not isinstance(text, str | None):
            raise InputError(f"{setting}[{number}] is a {type(text).__name__}, not text")
        yield encodable(text or "")
