"""Files that are written whole or not at all: a temporary name beside the target, then a rename."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


class InputError(ValueError):
    """Something the user can put right: the command line prints its one line and exits with code 2."""


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path that becomes `target` (a file or a folder) on success and disappears on any failure.

    Raises InputError when the disk is full or not writable, which safetensors reports by an error of its own.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    earlier = target.with_name(f".{target.name}.{os.getpid()}.earlier.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_dir() and target.exists():
            target.replace(earlier)  # a folder cannot be renamed over another
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise InputError(f"cannot write {target}: {reason}") from None
    finally:
        if earlier.exists() and not target.exists():
            earlier.replace(target)
        for left in (temporary, earlier):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, made_by: str) -> Any:
    """Reads JSON; `made_by` is the command to run when the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; `{made_by}` writes it") from None
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON ({error}); run `{made_by}` again") from None
