"""The safetensors files of a checkpoint, written tensor by tensor: memory holds one of them, whatever a file takes.

safetensors' own `save_file` wants all tensors of a file at once. The files are the same to the byte: a header of names,
dtypes, shapes and offsets, then the values, those of wide dtypes first and by name (the format's documentation).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from secateur.files import write_json

NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
"""What safetensors calls the dtypes, in its own order."""


def write_shards(
    folder: Path, layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], max_shard_size: int | str
) -> None:
    """Writes `tensors`, whose names, shapes and dtypes `layout` holds on the meta device, into files of at most
    `max_shard_size`, with their index where there are several."""
    shards = split_torch_state_dict_into_shards(
        dict(layout), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    places: dict[str, tuple[Path, int]] = {}
    for file, names in shards.filename_to_tensors.items():
        places |= _begin(folder / file, {name: layout[name] for name in names})
    for name, tensor in tensors:
        path, start = places.pop(name)
        expected = layout[name]
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), f"{name} is not as laid out"
        with path.open("r+b") as target:
            target.seek(start)
            target.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    assert not places, f"tensors missing: {sorted(places)}"
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": dict(sorted(shards.tensor_to_filename.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def _begin(path: Path, layout: Mapping[str, Tensor]) -> dict[str, tuple[Path, int]]:
    """Writes the header of a file that is to hold these; where in it the values of each go."""
    order = list(NAMES)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, starts = 0, {}
    for name in sorted(layout, key=lambda name: (-order.index(layout[name].dtype), name)):
        tensor, start = layout[name], end
        starts[name], end = start, start + tensor.numel() * tensor.itemsize
        offsets = [start, end]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begun = len(text).to_bytes(8, "little") + text
    with path.open("wb") as file:
        file.write(begun)
        file.truncate(len(begun) + end)
    return {name: (path, len(begun) + start) for name, start in starts.items()}
