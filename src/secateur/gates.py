"""What a method found: one vector z over all units of the model, and the file it is kept in (gates.safetensors).

One flat vector keeps the optimiser to a single tensor; `by_group` gives the views that `attach` and `plan` use.
Units rank by z, and those with z > 0 are open. The value of an open gate is z itself, unless the method has other
values: then they are tensors `value.<group>`. In `mean.<group>` is what removed inputs of a writer give way to (FLAP).
Learning leaves all closed gates alike, so `order.<group>` says what units rank by for other sizes (order.py), and
`sensitivity.<group>` what it went by, from which gates are learned on elsewhere (`--gates`).

Shape suffixes: N units of the whole model, in the order of the groups.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from secateur.files import InputError, replacing
from secateur.units import Group, Shapes

GATES_FORMATS = (1, 2)
"""2: with gates of sublayers, by which the gates of their units are multiplied."""

OPTIONAL = ("value", "order", "sensitivity")
"""Tensors that a group may have beside its z."""


def by_group(values_N: torch.Tensor, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """Views of a flat vector, by group name; each has shape (group.units,)."""
    parts = values_N.split([g.units for g in groups])
    return dict(zip((g.name for g in groups), parts, strict=True))


@dataclass(frozen=True)
class Gates:
    """Gates as learned or scored."""

    z_N: torch.Tensor
    """What the units rank by; at most 0 where closed."""
    groups: tuple[Group, ...]
    about: dict[str, Any]
    """What made them: method, model, architecture fingerprint, sparsity, steps, recipe; JSON-able."""
    value_N: torch.Tensor | None = None
    """Values of the gates where they are not z itself."""
    means: Mapping[str, torch.Tensor] | None = None
    """Group name → mean of each input of its writer, where removed units are replaced by theirs."""
    order_N: torch.Tensor | None = None
    """What the units rank by for other sizes, where that is not z: from 1 on where kept."""
    sensitivity_N: torch.Tensor | None = None
    """What each unit is worth alone (sensitivity.py), where it was measured."""

    @property
    def asked(self) -> tuple[float | None, tuple[str, ...]]:
        """The `--sparsity` and `--budget` that they were found for."""
        return self.about.get("sparsity"), tuple(self.about.get("budget", ()))

    def deployed(self) -> torch.Tensor:
        """Gate values of shape (N,), 0 where closed: ReLU(z) (method §3) unless the method has others."""
        return self.z_N.relu() if self.value_N is None else torch.where(self.z_N > 0, self.value_N, 0.0)

    def values(self) -> dict[str, torch.Tensor]:
        """Gate values by group name."""
        return by_group(self.deployed(), self.groups)


def depth_of(groups: Sequence[Group]) -> str:
    """The `--depth` that groups are of."""
    if any(g.is_sublayer and not g.gate_only for g in groups):
        return "alone"
    return "joint" if any(g.depth for g in groups) else "off"


def architecture_fingerprint(groups: Sequence[Group], shapes: Shapes) -> str:
    """Hash of all units and of the shapes they lie in: gates fit a model exactly when this is equal."""
    later = ("experts", "kv_heads", "keys", "depth", "after", "offset")  # which the first gates files did not have
    units = [{key: value for key, value in asdict(g).items() if key not in later or value} for g in groups]
    content = json.dumps([units, sorted((k, list(v)) for k, v in shapes.items())])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def save_gates(path: Path, gates: Gates) -> None:
    """Writes z (and what else there is) by group, float32, with `about` and the format in the metadata; atomic."""
    named = by_group(gates.z_N, gates.groups)
    for prefix in OPTIONAL:
        if (more_N := getattr(gates, f"{prefix}_N")) is not None:
            named |= {f"{prefix}.{name}": part for name, part in by_group(more_N, gates.groups).items()}
    named |= {f"mean.{name}": mean for name, mean in (gates.means or {}).items()}
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in named.items()}
    # One entry only: safetensors writes several in a random order, and equal gates should be equal files.
    written = GATES_FORMATS[any(g.depth for g in gates.groups)]
    metadata = {"secateur": json.dumps({"format": written, **gates.about})}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_gates(path: Path, groups: Sequence[Group], *fingerprints: str) -> Gates:
    """Reads gates and checks that they belong to this architecture: to all shapes of the model, or to those of what is
    pruned, whose fingerprint is one of these. Raises InputError with the reason if not."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("secateur", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path} is missing; `secateur learn` writes it") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path} is not a readable gates file ({error}); run `secateur learn` again") from None
    if not isinstance(about, dict) or about.get("format") not in GATES_FORMATS:
        raise InputError(f"{path} is not a gates file of format 1 or 2; learn the gates anew with this version")
    depth, said = about.get("depth", "off"), depth_of(groups)
    if depth != said:
        has = "no gates of sublayers" if depth == "off" else f"gates of --depth {depth}"
        raise InputError(f"{path} holds {has}, and this run is one of --depth {said}; say --depth {depth}")
    wrong = [g for g in groups if g.name not in tensors or tensors[g.name].shape != (g.units,)]
    if wrong or not {about.get("architecture"), about.get("units")} & set(fingerprints):
        detail = "the shapes of its weights differ"
        if wrong:
            has = f"{tensors[wrong[0].name].numel():,}" if wrong[0].name in tensors else "none"
            detail = f"{wrong[0].name} does not fit: {wrong[0].units:,} units here, {has} there"
        of = f", {about['model']}" if about.get("model") else ""
        raise InputError(f"{path} holds gates of another architecture{of} ({detail}); learn gates for this model")

    def found(prefix: str) -> dict[str, torch.Tensor]:
        return {g.name: tensors[prefix + g.name].float() for g in groups if prefix + g.name in tensors}

    more = {f"{prefix}_N": torch.cat(list(parts.values())) for prefix in OPTIONAL if (parts := found(f"{prefix}."))}
    if wrong_size := [name for name, values_N in more.items() if values_N.numel() != sum(g.units for g in groups)]:
        raise InputError(f"{path} is not a readable gates file ({wrong_size[0][:-2]} is incomplete); learn again")
    return Gates(torch.cat(list(found("").values())), tuple(groups), about, means=found("mean.") or None, **more)
