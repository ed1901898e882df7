"""Files that are written whole or not at all: in a temporary folder beside the target, then a rename.

Temporary names carry the number of their process: what one leaves that was killed is told from what another one is
writing, is never read, and goes when the run is next opened (`sweep`). A folder, because safetensors writes to a file
of its own beside the one that it is told, and leaves it when it is killed.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from secateur.untrusted import MAX_JSON, parse_json, read_bytes

TEMPORARY = re.compile(r"\.(?P<target>.+)\.(?P<process>\d+)(?P<earlier>\.earlier)?\.tmp")
"""Names of what is not whole yet, and of an earlier folder while another one takes its place."""


class InputError(ValueError):
    """Something the user can put right: the command line prints its one line and exits with code 2."""


@contextmanager
def replacing(target: Path, outdated: Iterable[Path] = ()) -> Iterator[Path]:
    """A temporary path that becomes `target` (a file or a folder) on success and disappears on any failure.

    Its content is on the disk before it gets its name, so that a power cut leaves the old or the new one, too.
    `outdated` are files and folders that speak of the old one: they go just before it does.
    Raises InputError when the disk is full or not writable, which safetensors reports by an error of its own.
    """
    room = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    earlier = target.with_name(f".{target.name}.{os.getpid()}.earlier.tmp")
    temporary = room / target.name
    try:
        room.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in (path for path in room.rglob("*") if path.is_file()):
            file.chmod(0o666 & ~_umask())  # those of safetensors are their owner's alone
        to_disk(room)
        for path in outdated:
            remove(path)
        if temporary.is_dir() and target.exists():
            target.replace(earlier)  # a folder cannot be renamed over another
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise cannot_write(target, error) from None
    finally:
        if earlier.exists() and not target.exists():
            earlier.replace(target)
        for left in (room, earlier):
            remove(left)


def cannot_write(target: Path, error: Exception) -> InputError:
    """What is said where a disk is full or not writable."""
    reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
    if number := re.search(r"\(os error (\d+)\)", reason):  # safetensors adds a name of its own
        reason = os.strerror(int(number[1]))
    whole = Path(*(part for part in target.parts if not TEMPORARY.fullmatch(part)))
    return InputError(f"cannot write {whole}: {reason}")


@contextmanager
def scratch_folder(folder: Path, name: str) -> Iterator[Path]:
    """A folder inside of `folder` for what is needed meanwhile."""
    path = folder / f".{name}.{os.getpid()}.tmp"
    path.mkdir()
    try:
        yield path
    finally:
        remove(path)


def sweep(folder: Path) -> None:
    """Removes what processes that are no more left half-written below `folder`; puts back what they had set aside."""
    for path in sorted(folder.rglob(".*.tmp")):  # an earlier folder before what was to take its place
        if (name := TEMPORARY.fullmatch(path.name)) and not _at_work(int(name["process"])):
            if name["earlier"] and not (target := path.with_name(name["target"])).exists():
                with suppress(OSError):
                    path.replace(target)
            else:
                remove(path)


def meant(name: str) -> str:
    """What a temporary name is to become; any other name as it is."""
    temporary = TEMPORARY.fullmatch(name)
    return temporary["target"] if temporary else name


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there and may be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def to_disk(folder: Path) -> None:
    """Waits until every file in a folder is on the disk and no longer in the memory of the system only."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _at_work(process: int) -> bool:
    """Whether another process of this number runs: this one has nothing half-written when it opens a run."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


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
        return parse_json(read_bytes(path, MAX_JSON))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; `{made_by}` writes it") from None
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON ({error}); run `{made_by}` again") from None
