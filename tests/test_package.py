"""Importing Secateur and asking it for help is fast: what is heavy is imported by what needs it."""

import subprocess
import sys
from pathlib import Path

import pytest

import secateur
from secateur.cli import COMMANDS

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "numpy", "pyarrow")


def loaded(code: str) -> set[str]:
    """The heavy modules that are loaded once the code has run in a new interpreter."""
    told = f"\nimport sys; print('loaded:', *(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code + told], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def command(*words: str) -> str:
    return f"""
from secateur.cli import main
try:
    main({list(words)})
except SystemExit:
    pass
"""


def test_importing_secateur_imports_nothing_heavy() -> None:
    assert loaded("import secateur; dir(secateur)") == set()
    assert loaded("from secateur import Config; Config('m', sparsity=0.2)") == set()


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["nonsense"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert loaded(command(*words)) == set()


def test_the_verbs_are_there_when_they_are_used() -> None:
    assert loaded("from secateur import prune") >= {"torch", "transformers"}
    for name in secateur.__all__:
        assert getattr(secateur, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        secateur.nonsense  # noqa: B018


def test_type_hints_are_shipped() -> None:
    assert (Path(secateur.__file__).parent / "py.typed").is_file()
