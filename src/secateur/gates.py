"""The learned parameters: one vector z over all units of the model, and the file it is kept in (gates.safetensors).

One flat vector keeps the optimiser to a single tensor; `by_group` gives the views that `attach` and `plan` use.

Shape suffixes: N units of the whole model, in the order of the groups.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from secateur.files import InputError, replacing
from secateur.units import Group, Shapes

GATES_FORMAT = 1


def by_group(values_N: torch.Tensor, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """Views of a flat vector, by group name; each has shape (group.units,)."""
    parts = values_N.split([g.units for g in groups])
    return dict(zip((g.name for g in groups), parts, strict=True))


@dataclass(frozen=True)
class Gates:
    """Gates as learned. `z_N` may be negative (closed); the gate value is ReLU(z)."""

    z_N: torch.Tensor
    groups: tuple[Group, ...]
    about: dict[str, Any]
    """What made them: model, architecture fingerprint, sparsity, steps, recipe; JSON-able."""

    def values(self) -> dict[str, torch.Tensor]:
        """Gate values ReLU(z) by group name (method §3, forward gate)."""
        return by_group(self.z_N.relu(), self.groups)


def architecture_fingerprint(groups: Sequence[Group], shapes: Shapes) -> str:
    """Hash of all units and of the shapes they lie in: gates fit a model exactly when this is equal."""
    content = json.dumps([[asdict(g) for g in groups], sorted((k, list(v)) for k, v in shapes.items())])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def save_gates(path: Path, gates: Gates) -> None:
    """Writes z by group, float32, with `about` and the format version in the metadata; atomic."""
    tensors = {name: z.detach().float().cpu().contiguous() for name, z in by_group(gates.z_N, gates.groups).items()}
    # One entry only: safetensors writes several in a random order, and equal gates should be equal files.
    metadata = {"secateur": json.dumps({"format": GATES_FORMAT, **gates.about})}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_gates(path: Path, groups: Sequence[Group], fingerprint: str) -> Gates:
    """Reads gates and checks that they belong to this architecture. Raises InputError with the reason if not."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("secateur", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path} is missing; `secateur learn` writes it") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path} is not a readable gates file ({error}); run `secateur learn` again") from None
    if not isinstance(about, dict) or about.get("format") != GATES_FORMAT:
        raise InputError(f"{path} is not a gates file of format {GATES_FORMAT}; learn the gates anew with this version")
    wrong = [g.name for g in groups if g.name not in tensors or tensors[g.name].shape != (g.units,)]
    if wrong or about.get("architecture") != fingerprint:
        detail = f"{wrong[0]} does not fit" if wrong else "the shapes of its weights differ"
        raise InputError(f"{path} holds gates of another architecture ({detail}); learn gates for this model")
    return Gates(torch.cat([tensors[g.name].float() for g in groups]), tuple(groups), about)
