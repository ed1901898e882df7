"""An exported checkpoint → one GGUF file, which llama.cpp runs. `secateur export RUN --format gguf`.

Everything is read off the checkpoint: its configuration and the shapes of its weights. Where all layers are alike the
file is of the model's own architecture (`llama`, `qwen2`, `qwen3`). llama.cpp takes widths by layer in `deci` only: a
Llama whose head counts, KV head counts and MLP widths are lists. What this cannot say is said by zeros: channels of
zeros change nothing, and fill rows up to the blocks that quantisation wants.

H = hidden size, D = head size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from secateur.files import InputError, replacing
from secateur.own_code import brings_own_code

GGUFType = Literal["f32", "f16", "q8_0"]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name for models whose layers are alike."""

INTERLEAVED = ("llama", "deci")
"""Architectures in which llama.cpp rotates neighbouring components; transformers rotates those D / 2 apart."""

BLOCK = 32
"""Weights that share a scale in Q8_0: what a row has to be divisible by."""

TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Written:
    """What the file says of itself."""

    architecture: str
    zero_channels: int
    """Channels of zeros, all layers together, that stand for closed MLPs or fill rows up to blocks."""

    def __str__(self) -> str:
        return self.architecture + (f", {self.zero_channels} channels of zeros added" if self.zero_channels else "")


@dataclass(frozen=True)
class Entry:
    """A tensor of the file; its values are read when it is written."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Layer:
    """Widths of a layer in the file; 0 KV heads and 0 heads: no attention."""

    heads: int
    kv_heads: int
    width: int


def write_gguf(checkpoint: Path, out: Path, kind: str = "f16", *, tokenizer: bool = True) -> Written:
    """Writes the checkpoint in a folder as the GGUF file `out`, whole or not at all. Memory: the largest weight.

    `kind` (`f32`, `f16` or `q8_0`) is the type of matrices; norms and biases stay float32. Without its `tokenizer` the
    file only takes and gives token ids.
    Raises InputError with one line where llama.cpp has no place for the model or its tokenizer.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise InputError("GGUF files need the gguf package; run: pip install 'secateur[gguf]'") from None
    from secateur.gguf_tokenizer import add_numbers, add_tokenizer

    model = Checkpoint(checkpoint)
    architecture = model.architecture()
    layers = model.layers(kind)
    entries = list(model.entries(architecture, layers))
    types = [_type_of(entry, kind) for entry in entries]
    with replacing(out) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            _add_configuration(writer, model, layers, kind)
            if tokenizer:
                words = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
                add_tokenizer(writer, words, model.vocabulary)
            else:
                add_numbers(writer, model.vocabulary)
            for entry, type_ in zip(entries, types, strict=True):
                shape = gguf.quant_shape_to_byte_shape(entry.shape, type_) if type_.name == "Q8_0" else entry.shape
                dtype = np.dtype({"F32": np.float32, "F16": np.float16, "Q8_0": np.uint8}[type_.name])
                writer.add_tensor_info(entry.name, shape, dtype, math.prod(shape) * dtype.itemsize, raw_dtype=type_)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry, type_ in zip(entries, types, strict=True):
                values = gguf.quants.quantize(entry.read().float().contiguous().numpy(), type_)
                writer.write_tensor_data(values)
        finally:
            writer.close()
    return Written(architecture, sum(layer.width for layer in layers) - sum(width for _, _, width in model.widths()))


def _type_of(entry: Entry, kind: str) -> Any:
    from gguf import GGMLQuantizationType

    if len(entry.shape) == 1:
        return GGMLQuantizationType.F32
    if kind == "q8_0" and entry.shape[-1] % BLOCK:
        raise InputError(
            f"{entry.name} has rows of {entry.shape[-1]}, and q8_0 wants a multiple of {BLOCK}: the nearest is "
            "`--gguf-type f16`, which takes any shape"
        )
    return GGMLQuantizationType[kind.upper()]


def _add_configuration(writer: Any, model: "Checkpoint", layers: list[Layer], kind: str) -> None:
    import gguf

    c, head_dim = model.config, model.head_dim

    def alike(values: list[int]) -> Any:
        return values if writer.arch == "deci" else values[0]

    writer.add_type("model")
    writer.add_name(model.name)
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(model.vocabulary)
    writer.add_context_length(model.context())
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(alike([layer.width for layer in layers]))
    writer.add_head_count(alike([layer.heads for layer in layers]))
    writer.add_head_count_kv(alike([layer.kv_heads for layer in layers]))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])


class Checkpoint:
    """A checkpoint's configuration and, read when asked for, its tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=brings_own_code(folder))
        self.name = (getattr(self.config, "secateur", None) or {}).get("base_model") or folder.resolve().parent.name
        self.files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self.files |= dict.fromkeys(file.keys(), file)
        if "model.embed_tokens.weight" not in self.files:
            raise InputError(f"{folder} holds no weights of a model that can be written as GGUF; export again")
        self._check()

    def _check(self) -> None:
        """Raises InputError for what GGUF files of the architectures that we write have no word for."""
        c = self.config
        if c.model_type not in ARCHITECTURES:
            names = ", ".join(ARCHITECTURES)
            raise InputError(f"{c.model_type} models are not written as GGUF; models of these types are: {names}")
        if c.hidden_act != "silu":
            raise InputError(f"llama.cpp's {ARCHITECTURES[c.model_type]} computes silu, the model {c.hidden_act}")
        if self.rope_type not in ("default", *self._scaled_ropes()):
            raise InputError(
                f"positions of type {self.rope_type} are not written as GGUF for {c.model_type} models; default ones "
                "are, and for llama and mistral linear and llama3"
            )
        if c.rope_parameters.get("partial_rotary_factor", 1) != 1:
            raise InputError("positions that turn a part of each head are not written as GGUF for these models")

    def _scaled_ropes(self) -> tuple[str, ...]:
        return ("linear", "llama3") if ARCHITECTURES[self.config.model_type] == "llama" else ()

    @property
    def vocabulary(self) -> int:
        """Embeddings."""
        return self.shape("model.embed_tokens.weight")[0]

    @property
    def head_dim(self) -> int:
        """D."""
        c = self.config
        return int(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)

    @property
    def rope_type(self) -> str:
        """How positions are scaled."""
        return str(self.config.rope_parameters.get("rope_type", "default"))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self.files[name].get_slice(name).get_shape())

    def context(self) -> int:
        """Tokens that the model was made for. llama.cpp attends to all of them, the model to a window at most."""
        window = getattr(self.config, "sliding_window", None) or math.inf
        return int(min(self.config.max_position_embeddings, window))

    def widths(self) -> list[tuple[int, int, int]]:
        """Heads, KV heads and channels of each layer, 0 where there are none."""

        def rows(layer: int, name: str) -> int:
            weight = f"model.layers.{layer}.{name}.weight"
            return self.shape(weight)[0] if weight in self.files else 0

        return [
            (rows(i, "self_attn.q_proj") // self.head_dim, rows(i, "self_attn.k_proj") // self.head_dim,
             rows(i, "mlp.gate_proj"))
            for i in range(self.config.num_hidden_layers)
        ]  # fmt: skip

    def architecture(self) -> str:
        """llama.cpp's name for the model. Raises InputError for widths that llama.cpp has no architecture for."""
        kind, widths = self.config.model_type, self.widths()
        own = ARCHITECTURES[kind]
        if len(set(widths)) == 1 and all(widths[0]):
            # llama.cpp's qwen2 wants queries as wide as the model; its llama takes any, and biases, too.
            return "llama" if own == "qwen2" and widths[0][0] * self.head_dim != self.config.hidden_size else own
        if own == "qwen3":
            raise InputError(
                "llama.cpp takes widths that differ by layer only without norms of queries and keys, which qwen3 has; "
                "the nearest is `--shape uniform`"
            )
        return "deci"

    def layers(self, kind: str) -> list[Layer]:
        """The widths as the file has them."""
        multiple = BLOCK if kind == "q8_0" else 1
        layers = []
        for index, (heads, kv_heads, width) in enumerate(self.widths()):
            # deci reads the head size off its first layer's heads, and drops the biases of attention without heads.
            if not heads and (index == 0 or f"model.layers.{index}.self_attn.o_proj.bias" in self.files):
                heads = kv_heads = 1
            # deci takes an MLP of width 0, but drops the attention before it.
            layers.append(Layer(heads, kv_heads, -(-max(width, 1) // multiple) * multiple))
        return layers

    def entries(self, architecture: str, layers: list[Layer]) -> Iterator[Entry]:
        """All tensors of the file, in order. Raises InputError for a tensor that it has no place for."""
        taken = set()
        for name, own in TENSORS.items():
            if f"{name}.weight" in self.files:
                taken.add(f"{name}.weight")
                yield Entry(f"{own}.weight", self.shape(f"{name}.weight"), partial(self._get, f"{name}.weight"))
        if self.rope_type != "default":
            yield Entry("rope_freqs.weight", (self.head_dim // 2,), self._rope_factors)
        for index, layer in enumerate(layers):
            for name, own in LAYER_TENSORS.items():
                for part in ("weight", "bias"):
                    full = f"model.layers.{index}.{name}.{part}"
                    taken.add(full)
                    shape = self._shape_in(layer, name, part, full)
                    if shape is not None:
                        heads = {"self_attn.q_proj": layer.heads, "self_attn.k_proj": layer.kv_heads}.get(name, 0)
                        turned = heads if architecture in INTERLEAVED else 0
                        yield Entry(f"blk.{index}.{own}.{part}", shape, partial(self._filled, full, shape, turned))
        if unknown := sorted(set(self.files) - taken):
            raise InputError(f"llama.cpp's {architecture} has no place for {unknown[0]}; `--format hf` keeps it")

    def _shape_in(self, layer: Layer, name: str, part: str, full: str) -> tuple[int, ...] | None:
        """Shape of a layer's tensor in the file, None if it has none. Zeros may stand for what the layer lacks."""
        hidden, heads = self.config.hidden_size, layer.heads * self.head_dim
        kv_heads = layer.kv_heads * self.head_dim
        rows, columns = {
            "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv_heads, hidden),
            "self_attn.v_proj": (kv_heads, hidden), "self_attn.o_proj": (hidden, heads),
            "mlp.gate_proj": (layer.width, hidden), "mlp.up_proj": (layer.width, hidden),
            "mlp.down_proj": (hidden, layer.width),
        }.get(name, (0, 0))  # fmt: skip
        if not rows or not columns:  # a norm; that of attention without heads has nothing to do
            norms = full in self.files and (layer.heads or name != "input_layernorm")
            return self.shape(full) if norms else None
        if part == "bias":
            return (rows,) if full in self.files else None
        return rows, columns

    def _get(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)

    def _filled(self, name: str, shape: tuple[int, ...], heads: int) -> Tensor:
        """The tensor with zeros around it, its rows in llama.cpp's order of rotation if it has `heads`."""
        values = torch.zeros(shape)
        if name in self.files:
            own = self._get(name).float()
            values[tuple(slice(size) for size in own.shape)] = own
        if heads:
            values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(shape)
        return values

    def _rope_factors(self) -> Tensor:
        """What each frequency is divided by."""
        plain_D = 1 / self.config.rope_parameters["rope_theta"] ** (torch.arange(0, self.head_dim, 2) / self.head_dim)
        scaled_D, _attention = ROPE_INIT_FUNCTIONS[self.rope_type](self.config, torch.device("cpu"))
        return plain_D / scaled_D
