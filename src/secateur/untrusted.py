"""What is checked of files that others made, before a library or a stage relies on them: JSON, YAML, safetensors files
and checkpoint folders. GGUF files are in gguf_header.py; docs/security.md says what is checked, and what is not.

Each check raises ValueError with a reason. Who reads the file names it, and says what to do next.
"""

import json
import math
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

MAX_DEPTH = 64
"""Lists and dictionaries within each other."""
MAX_JSON, MAX_YAML, MAX_HEADER = 2**30, 2**20, 100_000_000
"""Bytes of a file, and of a safetensors header (the library's own bound). A plan of millions of units has many."""
MAX_DIGITS = 300
"""Of a whole number: what a float holds. Tokenizers say 10^30 for no bound."""
MAX_LAYERS = 10_000
"""Of a model: each is built before weights are read."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Of a value, by the dtypes of the safetensors format."""

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file (a pipe would wait for ever) of at most so many bytes. Also raises OSError."""
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(21, "Is a directory", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    if found.st_size > most:
        raise ValueError(f"it has {found.st_size:,} bytes, more than {most:,}")
    return path.read_bytes()


# --- JSON and YAML ---------------------------------------------------------------------------------------------------


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, of bounded depth and numbers, with every key once and text that can be printed."""
    text = text if isinstance(text, str) else text.decode("utf-8")
    try:
        value = json.loads(text, parse_int=_whole, object_pairs_hook=_each_once)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inside = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [child for children in inside for child in children if isinstance(child, dict | list)]
        if not level:
            break
    else:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    if re.search(r"\\u[dD][89abAB]", text):  # halves of surrogate pairs fail where they are printed
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _whole(digits: str) -> int:
    if len(digits.removeprefix("-")) > MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    return int(digits)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in found if names.count(name) > 1)!r} twice")
    return found


def read_yaml(path: Path) -> Any:
    """The value of a YAML file of plain values. Aliases are refused: a few lines of them stand for billions."""
    text = read_bytes(path, MAX_YAML).decode("utf-8")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has an alias (*name); write the value out")
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    except (
        LookupError,
        AttributeError,
        TypeError,
        ArithmeticError,
    ) as error:  # a tag on what is none: !!int "", !!bool 2
        raise ValueError(f"a value is not what its tag says ({type(error).__name__})") from None


# --- safetensors -----------------------------------------------------------------------------------------------------


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file whose tensors fill the file, one behind the other, as their dtypes and shapes
    say. Also raises OSError."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"its header claims {length:,} bytes, the file has {size:,}")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a dictionary")
    said = header.pop("__metadata__", {})
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise ValueError("its metadata are not texts")
    end = 0
    for begin, stop, name in sorted((*_extent(name, entry), name) for name, entry in header.items()):
        if begin != end:
            raise ValueError(f"tensor {name!r} begins at {begin:,}, the one before it ends at {end:,}")
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"its tensors take {end:,} bytes, the file has {size - 8 - length:,} for them")
    return header | {"__metadata__": said}


def _extent(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor lies, checked against its dtype and shape."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} has not a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has a shape or offsets that are not whole numbers from 0 on")
    if math.prod(max(1, size) for size in shape) >= 2**63:
        raise ValueError(f"tensor {name!r} has a shape of more values than can be counted")
    if math.prod(shape) * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"tensor {name!r} has {offsets[1] - offsets[0]:,} bytes, {dtype} {shape} has others")
    return offsets[0], offsets[1]


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def said_in(path: Path) -> Any:
    """What one of Secateur's own safetensors files says of itself. Also raises OSError."""
    return parse_json(safetensors_header(path)["__metadata__"].get("secateur", "null"))


def read_tensors(path: Path) -> tuple[dict[str, Any], Any]:
    """The tensors of one of Secateur's own files, and what it says of itself. Also raises OSError."""
    said = said_in(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, said  # noqa: SIM118
    except (SafetensorError, RuntimeError, TypeError, KeyError) as error:  # a dtype that torch has not
        raise ValueError(str(error).strip().partition("\n")[0]) from None


# --- checkpoint folders ----------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Checks what is read of a checkpoint folder before its weights: links, configuration, the index of its shards."""
    check_links(folder)
    for path in sorted(folder.glob("*.json")):
        if path.name != "tokenizer.json":  # large, and read by a library with bounds of its own
            try:
                values = parse_json(read_bytes(path, MAX_HEADER))
            except (ValueError, IsADirectoryError) as error:
                raise ValueError(f"{path.name}: {error}") from None
            if path.name == "config.json":
                _check_layers(values)
            elif path.name == INDEX:
                plain_names(values)
    if (folder / "adapter_config.json").exists():
        raise ValueError("it is an adapter on another model (adapter_config.json); merge it into that model first")


def check_links(folder: Path, deep: bool = False) -> None:
    """Refuses links that lead out of a folder; those of the hub's cache, from a snapshot to its blobs, are its own.
    `deep`: of a run, all that lies in it but what W&B puts into its own folder."""
    whole = folder.resolve()
    allowed = [whole, *([whole.parent.parent / "blobs"] if whole.parent.name == "snapshots" else [])]
    for path in folder.rglob("*") if deep else folder.iterdir():
        inside = path.relative_to(folder)
        if deep and len(inside.parts) > 1 and inside.parts[0] == "wandb" and not path.name.startswith("secateur."):
            continue
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise ValueError(f"{inside} is a link that leads out of the folder; put the file itself there")


def _check_layers(values: Any) -> None:
    if not isinstance(values, dict):
        raise ValueError("config.json: it is not a dictionary")
    for name, value in values.items():
        if isinstance(value, dict):
            _check_layers(value)
        elif "layers" in name and isinstance(value, int) and value > MAX_LAYERS:
            raise ValueError(f"config.json: {name} is {value:,}, more than {MAX_LAYERS:,}")


def plain_names(index: Any) -> dict[str, str]:
    """The `weight_map` of an index of shards, whose files lie in the folder of the index itself."""
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise ValueError(f"{INDEX}: it has no weight_map")
    for name in names.values():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\:\0]+\.safetensors", name):
            raise ValueError(f"{INDEX}: {name!r} is not the name of a safetensors file in its folder")
    return names


def check_weights(folder: Path) -> None:
    """Checks the safetensors files of a checkpoint folder that are about to be read."""
    single = folder / "model.safetensors"
    if not single.is_file() and not (folder / INDEX).is_file():
        if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
            raise ValueError(
                f"its weights are pickles ({pickles[0]}), which run code when they are read; convert them where you "
                "trust them: AutoModelForCausalLM.from_pretrained(…).save_pretrained(FOLDER) writes safetensors"
            )
        raise ValueError("it has no model.safetensors")
    if single.is_file():
        checked([single])
        return
    names = plain_names(parse_json(read_bytes(folder / INDEX, MAX_HEADER)))
    held = checked(folder / name for name in sorted(set(names.values())))
    for tensor, name in names.items():
        if tensor not in held[name]:
            raise ValueError(f"{INDEX}: {name} holds no {tensor}")


def checked(paths: Iterable[Path]) -> Mapping[str, dict[str, Any]]:
    """The headers of safetensors files, by name."""
    found = {}
    for path in paths:
        try:
            found[path.name] = safetensors_header(path)
        except FileNotFoundError:
            raise ValueError(f"{path.name} is missing; download it again") from None
        except ValueError as error:
            raise ValueError(f"{path.name} is truncated or broken ({error}); download it again") from None
    return found
