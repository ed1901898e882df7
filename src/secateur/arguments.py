"""Words of the command line → the options of a command; of `prune`, over what a config file or earlier run brings."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from secateur.config import LEARNING_FIELDS, Config, load_config


def parse(name: str, kind: type, arguments: Sequence[str]) -> Any:
    """The options of a command, a dataclass `kind`. Ends the program with code 2 where the words say none."""
    default = _defaults(kind, arguments) if issubclass(kind, Config) else None
    if default is None:
        return tyro.cli(kind, args=arguments, prog=f"secateur {name}")
    options = tyro.cli(kind, args=arguments, prog=f"secateur {name}", default=replace(default))
    if any(getattr(options, f) != getattr(default, f) for f in LEARNING_FIELDS):
        options.learning = None
    scoped = ("shape", "recipe", "method")
    if any(getattr(options, f) != getattr(default, f) for f in scoped) and options.per == default.per:
        options.per = None  # what the file holds is the default of the other shape, recipe or method
    return options


def _defaults(kind: type, arguments: Sequence[str]) -> Any:
    """The settings that `--config` or `--resume` bring, as defaults for the other options of `prune`; None: neither."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--resume", type=Path)
    given, _ = parser.parse_known_args(arguments)
    path = given.config if given.config is not None else given.resume and given.resume / "config.yaml"
    return None if path is None else kind(**vars(load_config(path)), config=given.config, resume=given.resume)
