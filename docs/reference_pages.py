"""The reference of all commands and settings, written from their dataclasses: what --help says, on a page.

A setting is documented once, in the docstring under its field (config.py, options.py, recipes.py). Run as a script it
prints the pages.
"""

import inspect
import re
import types
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object

from secateur.cli import COMMANDS
from secateur.config import Config
from secateur.optimise import Step
from secateur.recipes import Recipe, auto_recipe, paper_recipe

SHORT, LONG = 100, 1000
"""Steps for which the automatic recipe is shown."""


def documented(kind: type) -> dict[str, str]:
    """Field → the docstring under it, those of base classes included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        try:
            found |= {p.arg_name: inspect.cleandoc(p.description or "") for p in parse_from_object(base).params}
        except OSError:
            continue
    return found


def arguments(hint: Any) -> tuple[str, list[str]]:
    """How a value is written on the command line, and the words that are allowed where there is a choice."""
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        said = next((note.metavar for note in notes if getattr(note, "metavar", None)), None)
        return (said, []) if said else arguments(inner)
    if get_origin(hint) in (Union, types.UnionType):
        return arguments(next(part for part in get_args(hint) if part is not type(None)))
    if get_origin(hint) is Literal:
        return "", [str(word) for word in get_args(hint)]
    if get_origin(hint) is tuple:
        written, words = arguments(get_args(hint)[0])
        return f"{written} …".strip(), words
    return {bool: "", int: "N", float: "X", Path: "PATH"}.get(hint, "TEXT"), []


def option(kind: type, name: str, command: str, hints: dict[str, Any], texts: dict[str, str]) -> str:
    """The entry of one setting."""
    field = next(f for f in fields(kind) if f.name == name)
    written, words = arguments(hints[name])
    flag = f"--{name.replace('_', '-')}"
    positional = field.default is MISSING and field.default_factory is MISSING and "Positional" in str(field.type)
    if positional:
        flag, written = name.upper(), ""
    elif hints[name] is bool and field.default is True:
        flag = f"--no-{name.replace('_', '-')}"
    aliases = [
        alias for note in getattr(hints[name], "__metadata__", ()) for alias in getattr(note, "aliases", None) or ()
    ]
    title = ", ".join(f"`{f'{alias} {written}'.strip()}`" for alias in (flag, *aliases))
    lines = [f"#### {title} {{ #{command}-{name.replace('_', '-')} }}", "", texts.get(name, "")]
    if words:
        lines.append("\nOne of " + ", ".join(f"`{word}`" for word in words) + ".")
    if not positional and field.default not in (MISSING, None, (), False, True):
        lines.append(f"\nDefault: `{field.default}`.")
    return "\n".join(lines) + "\n"


def shown(name: str, kind: type) -> list[str]:
    """The settings that a command's section lists: all but those of `prune` that another command takes, too."""
    elsewhere = {f.name for f in fields(Config)} if issubclass(kind, Config) and name != "prune" else set()
    return [f.name for f in fields(kind) if f.name not in elsewhere and "Suppress" not in str(f.type)]


def command_section(name: str, kind: type) -> str:
    """All of a command."""
    hints, texts = get_type_hints(kind, include_extras=True), documented(kind)
    about = inspect.cleandoc(kind.__doc__ or "")
    about = re.sub(r"^(Example[^:]*): (secateur .*)$", r"\1:\n\n```text\n\2\n```", about, flags=re.MULTILINE)
    if issubclass(kind, Config) and name != "prune":
        about += "\n\nAll settings of [prune](#prune), and:"
    entries = [option(kind, field, name, hints, texts) for field in shown(name, kind)]
    return "\n".join([f"## secateur {name} {{ #{name} }}", "", about, "", *entries])


def recipe_section() -> str:
    """The two recipes, side by side."""
    texts = documented(Recipe)
    recipes = [auto_recipe(SHORT), auto_recipe(LONG), paper_recipe(LONG)]
    lines = [
        f"| `learning` | what | `auto`, {SHORT} steps | `auto`, {LONG:,} steps | `paper` |",
        "|---|---|---|---|---|",
    ]
    for field in fields(Recipe):
        if field.name != "name":
            values = (plain(getattr(recipe, field.name)) for recipe in recipes)
            lines.append(f"| `{field.name}` | {' '.join(texts.get(field.name, '').split())} | {' | '.join(values)} |")
    return "\n".join(lines)


def plain(value: Any) -> str:
    """A value of a recipe, as a reader writes it."""
    if isinstance(value, tuple):
        return ", ".join(map(plain, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def steps_section() -> str:
    """What a line of metrics.jsonl holds."""
    texts = documented(Step)
    lines = ["| key | what |", "|---|---|"]
    return "\n".join(lines + [f"| `{f.name}` | {' '.join(texts.get(f.name, '').split())} |" for f in fields(Step)])


def pages() -> dict[str, str]:
    """Path in the docs → the page."""
    sections = [command_section(name, kind) for name, (kind, _) in COMMANDS.items()]
    intro = (
        "# Commands and settings\n\nWritten from the dataclasses of `config.py` and `options.py`, as `--help` is. "
        "A setting of `prune` is a key of `config.yaml`, with `_` for `-`, and a keyword in Python.\n"
    )
    recipes = (
        "## Recipes { #recipes }\n\n`config.yaml` holds the recipe as resolved, under `learning`: `auto` from the "
        f"number of steps, `paper` to the letter.\n\n{recipe_section()}\n"
    )
    metrics = f"## A line of metrics.jsonl {{ #metrics }}\n\n{steps_section()}\n"
    return {"reference/commands.md": "\n".join([intro, *sections, recipes, metrics])}


if __name__ == "__main__":
    print("\n".join(pages().values()))
