"""What the README says is true: its commands, options, imports and its map of the code."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import secateur
from secateur.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
COMMAND_LINES = sorted(set(re.findall(rf"secateur (?:{'|'.join(COMMANDS)})\b[^\n`|]*", README)))


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_in_the_readme_exists_with_its_options(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    settings = fields(COMMANDS[name][0])
    known = {f"--{field.name.replace('_', '-')}" for field in settings}
    known |= {f"--no-{field.name.replace('_', '-')}" for field in settings if field.default is True}
    assert {a for a in arguments if a.startswith("--")} <= known | {"--help"}


def test_the_readme_names_both_commands_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in README and f"\n{target}:" in makefile


def test_python_examples_compile_and_import_what_exists() -> None:
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        compile(block, "README.md", "exec")
        for names in re.findall(r"from secateur import (.*)", block):
            assert all(hasattr(secateur, name.strip()) for name in names.split(","))


def test_the_map_of_the_code_lists_every_module() -> None:
    listed = set(re.findall(r"^  (\w+\.py) ", README, flags=re.MULTILINE))
    assert listed == {p.name for p in (ROOT / "src/secateur").glob("*.py")} - {"__init__.py"}


def test_no_file_is_longer_than_400_lines() -> None:
    long = {
        path.name: lines
        for folder in ("src", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long
