"""The exported checkpoint with other weights: what `refit` and `recover` write.

Everything but the weights stays as exported: names, shapes, dtypes, shards, configuration, tokenizer. config.json then
lists what was done (`"secateur": {"updates": ["refit", "recover-lora"], "recovery_steps": [200]}`): the model no longer
equals the gated one.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.files import replacing, write_json, write_text
from secateur.report.files import Exported, ExportedConfig, Refit, checked


def said_of(folder: Path) -> Exported:
    """What config.json of an exported checkpoint says of it; nothing for no folder."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    return checked(path, ExportedConfig, f"secateur export {folder.parent}").get("secateur", {})


def updates_of(folder: Path) -> list[str]:
    """What was done to the weights of an exported checkpoint, in order; nothing for a fresh export or no folder."""
    return said_of(folder).get("updates", [])


def recovery_steps(folder: Path) -> list[int]:
    """Steps of each recovery of an exported checkpoint, in order; earlier versions did not say them."""
    return said_of(folder).get("recovery_steps", [])


def refitted(folder: Path, record: Path) -> bool:
    """Whether the exported checkpoint has been refitted, or `record`, its refit.json, says that no ridge was better."""
    if "refit" in updates_of(folder):
        return True
    rounds = checked(record, list[Refit], f"secateur refit {folder.parent}") if record.exists() else []
    return bool(rounds) and not rounds[-1]["held_out_after"] < rounds[0]["held_out_before"]


def rewrite_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    update: str,
    texts: Mapping[str, str] | None = None,
    outdated: Iterable[Path] = (),
    steps: int | None = None,
) -> None:
    """Replaces tensors of the checkpoint in `folder` by name and adds `update` to its list of updates, and the `steps`
    that it was trained for.

    Each tensor is cast to the dtype of the one it replaces; all others are copied bit for bit. `texts` are files to
    write beside them, such as README.md, `outdated` those that speak of the earlier weights. The folder changes as a
    whole or not at all. Memory: one shard.
    """
    shards = sorted(folder.glob("*.safetensors"))
    missing = set(tensors)
    with replacing(folder, outdated) as temporary:
        shutil.copytree(folder, temporary, ignore=shutil.ignore_patterns("*.safetensors"))
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
            for name in held.keys() & tensors.keys():
                old, new = held[name], tensors[name].detach()
                assert new.shape == old.shape, f"{name} is {tuple(old.shape)} in {folder}, not {tuple(new.shape)}"
                held[name] = new.to("cpu", old.dtype).contiguous()
                missing.discard(name)
            save_file(held, temporary / shard.name, metadata=metadata)
        assert not missing, f"{folder} holds no {sorted(missing)}"
        config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        config["secateur"] |= {"updates": [*updates_of(folder), update]}
        if steps is not None:
            config["secateur"] |= {"recovery_steps": [*recovery_steps(folder), steps]}
        write_json(temporary / "config.json", config)
        for name, text in (texts or {}).items():
            write_text(temporary / name, text)
