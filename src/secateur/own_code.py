"""The code in an export, and whether it is Secateur's own: what this version writes, byte for byte.

Commands run the code in RUN/model without `--trust-remote-code`, so a run of someone else must not bring other code.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from secateur import families, modeling_pruned
from secateur.files import InputError, read_json

MODELING_FILE = "modeling_pruned.py"
STOCK = ("StockConfig", "StockForCausalLM", "StockModel")
"""What the modelling file calls the classes that it extends."""
AGAIN = "secateur export RUN"


def modeling_text(classes: Mapping[str, tuple[str, str]]) -> str:
    """modeling_pruned.py with the imports of another architecture in the place of Llama's: module and class of each of
    STOCK."""
    text = Path(modeling_pruned.__file__).read_text(encoding="utf-8")
    for alias, (module, name) in classes.items():
        line = f"from {module} import {name} as {alias}"
        text, count = re.subn(rf"^from .* as {alias}  # stock$", line, text, flags=re.MULTILINE)
        assert count == 1, f"no import of {alias} in {MODELING_FILE}"
    return text.replace("class PrunedForCausalLM", f"class {pruned_name(classes['StockForCausalLM'][1])}")


def pruned_name(stock: str) -> str:
    """Name of the pruned class: that of the stock one is in it, which is all that a serving plugin is told."""
    return f"Pruned{stock}"


def brings_own_code(folder: Path) -> bool:
    """Whether config.json asks for code, all of it Secateur's own."""
    return bool(_asked(folder)) and _other_code(folder) is None


def check_code(folder: Path) -> None:
    """Raises InputError where config.json asks for other code than this version of Secateur writes."""
    if (other := _other_code(folder)) is not None:
        raise InputError(
            f"{folder} has code that this version of Secateur does not write, or not so ({other}), so it is not run; "
            f"run `{AGAIN}` again"
        )


def _asked(folder: Path) -> dict[str, object]:
    config = read_json(folder / "config.json", AGAIN)
    asked = config.get("auto_map", {}) if isinstance(config, dict) else None
    if not isinstance(asked, dict):
        raise InputError(f"{folder / 'config.json'} is not the configuration of a model; run `{AGAIN}` again")
    return asked


def _other_code(folder: Path) -> str | None:
    """What of the code that is there, or is asked for, is not our own."""
    family_files = _family_files()
    for path in sorted(folder.rglob("*.py")):  # transformers runs custom_generate/generate.py without being asked
        if path.relative_to(folder).as_posix() not in {MODELING_FILE, *family_files}:
            return path.relative_to(folder).as_posix()
    for path in sorted(folder.glob("*.json")):
        if path.name not in ("config.json", "tokenizer.json"):
            values = read_json(path, AGAIN)
            if isinstance(values, dict) and "auto_map" in values:  # of a tokenizer or processor: ours have none
                return f"auto_map of {path.name}"
    for said in _asked(folder).values():
        module, _, name = said.partition(".") if isinstance(said, str) else ("", "", "")
        if f"{module}.py" not in {MODELING_FILE, *family_files} or not name.isidentifier():
            return repr(said)  # a repository of the hub, for example
    for file in (MODELING_FILE, *family_files):
        if (path := folder / file).exists():
            content = path.read_bytes()
            if content != (_own_modeling(content) if file == MODELING_FILE else family_files[file].read_bytes()):
                return file
    return None


def _family_files() -> dict[str, Path]:
    """Files of models that transformers lacks, which travel beside the modelling file."""
    return {path.name: path for path in Path(families.__file__).parent.glob("modeling_*.py")}


def _own_modeling(content: bytes) -> bytes | None:
    """What we would write for the classes that a modelling file says it extends."""
    classes = {}
    own = "|".join(rf"\.{path.stem}" for path in _family_files().values()).encode()
    for alias in STOCK:
        place = rb"^from (transformers\.models\.[\w.]+|%s) import (\w+) as %s$" % (own, alias.encode())
        if (found := re.search(place, content, flags=re.MULTILINE | re.ASCII)) is None:
            return None
        classes[alias] = (found[1].decode(), found[2].decode())
    return modeling_text(classes).encode()
