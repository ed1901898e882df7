"""States of training that is not done yet, from which it goes on bit for bit. Serves `secateur prune --resume RUN`.

Every `--checkpoint-every` steps, and at an interruption, a file of what learning or recovery cannot compute again:
gates or weights, multipliers, moments of the optimiser. Schedules, noise and the place in the data follow from the
settings and the number of steps done. Kept are the last two and, where losses are given, the best. A file that was
damaged is known by its digest, and the one before it is taken.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from secateur.files import InputError, remove, replacing
from secateur.untrusted import read_tensors, said_in

KEPT = 2
"""States that are kept beside the best."""


@dataclass(frozen=True)
class State:
    """What a file holds."""

    step: int
    """Steps done."""
    settings: str
    """What the training was told; it goes on only with the same."""
    tensors: dict[str, torch.Tensor]
    about: Any = None
    """More of it, JSON-able."""
    loss: float | None = None
    """By which the best is told, nats a token; None where those of other steps would mean something else."""

    @property
    def digest(self) -> str:
        """Hash of all of it."""
        digest = hashlib.sha256(json.dumps(self.said, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def said(self) -> dict[str, Any]:
        """All but the tensors."""
        return {"step": self.step, "settings": self.settings, "about": self.about, "loss": self.loss}


@dataclass(frozen=True)
class Checkpoints:
    """The states of one training, in a folder that is gone when it is done."""

    folder: Path
    every: int = 50
    """Steps between two of them."""
    warn: Callable[[str], None] = lambda _: None
    unreadable: set[Path] = field(default_factory=set)
    """Files that were found damaged."""

    def due(self, step: int, steps: int) -> bool:
        """Whether a state is to be saved after `step` of `steps`: the last one tells that all are done."""
        return step % self.every == 0 or step == steps

    def save(self, state: State) -> None:
        """Writes a state, of tensors on the CPU; what is no longer wanted goes. Raises InputError if it cannot."""
        # One entry only: safetensors writes several in a random order, and equal states should be equal files.
        metadata = {"secateur": json.dumps(state.said | {"digest": state.digest})}
        with replacing(self._file(state.step)) as temporary:
            save_file(state.tensors, temporary, metadata=metadata)
        self.unreadable.discard(self._file(state.step))
        earlier = [p for p in self._newest_first() if _step(p) <= state.step and p not in self.unreadable]
        losses = {path: loss for path in earlier if (loss := _said(path).get("loss")) is not None}
        best = min(losses, key=lambda path: losses[path], default=None)
        for path in self._newest_first():
            if path not in (*earlier[:KEPT], best):
                remove(path)

    def latest(self, settings: str) -> State | None:
        """The newest state that can be read; None where there is none.

        Raises InputError when it is one of training that was told something else.
        """
        for path in self._newest_first():
            try:
                state = _read(path)
            except (OSError, ValueError) as error:
                self.unreadable.add(path)
                self.warn(f"{path} is damaged ({str(error).strip().partition(chr(10))[0]}); going on from before it")
                continue
            if state.settings != settings:
                raise InputError(f"{path} belongs to other settings than these; delete {self.folder} to start over")
            return state
        return None

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Within, what was trained takes over a state. Raises InputError for one that does not fit it."""
        try:
            yield
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                f"{self.folder} holds a state that does not fit this training ({reason}); delete it to start over"
            ) from None

    def left_over(self, steps: int, said: str = "") -> bool:
        """Whether the newest state is that after the last of `steps`, its settings saying what is `said`: then they are
        of training that is done, left by a process that was killed before it discarded them, as is done now."""
        left = any(
            (state := _said(path)).get("step") == steps and said in state.get("settings", "")
            for path in self._newest_first()[:1]
        )
        if left:
            self.discard()
        return left

    def discard(self) -> None:
        """Removes all, the newest last: one that is complete is known as such to the end."""
        for path in reversed(self._newest_first()):
            remove(path)
        remove(self.folder)

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def _newest_first(self) -> list[Path]:
        files = self.folder.glob("step-*.safetensors")
        return sorted((path for path in files if re.fullmatch(r"step-\d{8}", path.stem)), reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _said(path: Path) -> dict[str, Any]:
    """What a file says of itself; nothing where it is damaged."""
    try:
        said = said_in(path)
    except (OSError, ValueError):
        return {}
    return said if _valid(said) else {}


def _valid(said: Any) -> bool:
    """Whether it is what `save` writes."""
    if not isinstance(said, dict) or set(said) != {"step", "settings", "about", "loss", "digest"}:
        return False
    texts = isinstance(said["settings"], str) and isinstance(said["digest"], str)
    return texts and type(said["step"]) is int and said["step"] >= 0 and isinstance(said["loss"], float | int | None)


def _read(path: Path) -> State:
    tensors, said = read_tensors(path)
    if not _valid(said):
        raise ValueError("it is not a state of training")
    digest = said.pop("digest")
    state = State(tensors=tensors, **said)
    if state.digest != digest:
        raise ValueError("its content is not what was written")
    return state
