"""config.yaml: all settings of a run as a file, and back, without trusting whoever wrote it."""

from dataclasses import replace
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from secateur.config import Config
from secateur.files import InputError, write_text
from secateur.untrusted import read_yaml


def save_config(config: Config, path: Path) -> None:
    """Writes all settings but the output folder, so that `secateur prune --config FILE` repeats the run elsewhere."""
    values = TypeAdapter(Config).dump_python(config, mode="json")
    del values["out"]
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def trusted(config: Config, path: Path, trust_remote_code: bool | None) -> Config:
    """Settings from a file, which may be someone else's: code of the model runs only where it is asked for here, too.
    Raises InputError where the file alone asks for it. None: no model is loaded, the settings are only shown."""
    if trust_remote_code is None:
        return config
    if config.trust_remote_code and not trust_remote_code:
        raise InputError(
            f"{path} asks to run code that comes with {config.model} (trust_remote_code: true); if you trust it, say "
            "--trust-remote-code here, too"
        )
    return replace(config, trust_remote_code=trust_remote_code)


def load_config(path: Path) -> Config:
    """Reads a config file. Raises InputError that names the file and the wrong field."""
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing: not the folder of a run, or `secateur prune` never started there"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not readable YAML: {error}") from None
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        raise InputError(f"{path}: {where}: {first['msg']}; `secateur prune --help` lists the settings") from None
