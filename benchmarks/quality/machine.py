"""What figures were measured with, as far as it bears on them: no names of hosts, users or folders."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from secateur.load import autocast
from secateur.measure import processor

PACKAGES = ("secateur", "torch", "transformers", "lm_eval")
ROOT = Path(__file__).parents[2]


def machine() -> dict[str, str | int]:
    """Processor, cores that may be used, threads that torch uses, memory, and what `--precision auto` is here."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with autocast(torch.device("cpu"), "auto"):
        low = torch.is_autocast_enabled("cpu")
    return {
        "cpu": processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "ram_gb": round(memory / 1e9),
        "system": platform.system(),
        "precision": "bfloat16" if low else "float32",
    }


def versions() -> dict[str, str]:
    """Versions of Python, of the packages and of the source tree."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"commit": COMMIT}


def _commit() -> str:
    """Short hash of the source tree, with a + if its code is not as committed."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "src") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


COMMIT = _commit()
"""Of the code that this process runs: taken at its start, as the tree may move on meanwhile."""
