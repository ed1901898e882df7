"""How much memory there is: what the machine has free, within the limits of the control groups that a process is in."""

from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that this process may take more than it has."""
    held = psutil.Process().memory_info().rss
    return min([psutil.virtual_memory().available, *(max(0, limit - held) for limit in _limits())])


def _limits() -> list[int]:
    """Limits of the control groups of this process and of those around them, both versions of them; none elsewhere."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, name = (GROUPS / "memory", "memory.limit_in_bytes") if controllers else (GROUPS, "memory.max")
        inner = root / path.strip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(root):
                found += _number(folder / name)
    return found


def _number(path: Path) -> list[int]:
    try:
        return [int(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError):  # no such group is seen from here, or it says `max`
        return []
