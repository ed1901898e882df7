"""Pruning from Python: `secateur.prune(model, tokenizer, data=…, sparsity=0.2)` and the verbs beside it.

The stages are those of the command line, over a run folder as there; what is given in memory becomes what they read
(in_memory.py), and what they wrote comes back as dataclasses (results.py).
"""

import difflib
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.config import IN_MEMORY, Config
from secateur.describe import describe
from secateur.files import InputError
from secateur.in_memory import check_given, is_text, loaded_from, name_of, place_of, write_given
from secateur.listeners import Listeners, Progress
from secateur.load import describe_pretrained
from secateur.logs import check_installed, logs_of
from secateur.optimise import Step
from secateur.progress import Screen
from secateur.results import Inspection, Pruned
from secateur.run import GIVEN_TEXTS, free_folder, new_run, open_run
from secateur.session import Session
from secateur.sizes import session_on, sizes_of
from secateur.stages import remaining_stages

Model: TypeAlias = "PreTrainedModel | str | Path | Config"
"""A model in memory, its name (folder, hub id, GGUF file), or all settings with its name in them."""
Callback = Progress | Callable[[Step], object]
"""What hears of a run: a `Progress`, of all that happens, or a function, of every learning step."""


def prune(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    data: Any = None,
    sparsity: float | None = None,
    steps: int | None = None,
    out: Path | str | None = None,
    callbacks: Iterable[Callback] = (),
    show: bool = False,
    **settings: Any,
) -> Pruned:
    """Prunes a model as `secateur prune` does: learns gates, exports, verifies and evaluates the smaller model.

    `model` in memory is left as it is, and needs its `tokenizer`. `data` is what `--data` takes, or text itself: a
    text, a list of texts, a Dataset. `out` is the folder of the run, by default a new one under runs/. `callbacks` hear
    of each learning step, and end learning by raising StopLearning; `show` prints what the command line prints
    meanwhile. `settings` are all others of Config: `seq_len=512, shape="uniform"`.
    Raises InputError, a ValueError of one line, for what can be put right, and VerificationFailed where the export does
    not compute what the gated model does.
    """
    given = {"data": data, "sparsity": sparsity, "steps": steps, "out": out}
    settings |= {name: value for name, value in given.items() if value is not None}
    session = new_session(model, tokenizer, callbacks=callbacks, **settings)
    return _finish(session, show)


def new_session(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    callbacks: Iterable[Callback] = (),
    **settings: Any,
) -> Session:
    """A new run, as `prune` takes it, with nothing done: for `learn_stage`, `plan_stage`, `export_stage` and so on."""
    listeners = _listeners(callbacks)
    if isinstance(model, str | Path | Config):
        if tokenizer is not None:
            raise InputError("a model that is named brings its own tokenizer; leave tokenizer out")
        base = model if isinstance(model, Config) else {"model": str(model)}
    else:
        check_given(model, tokenizer)
        base = {"model": name_of(model)}
    settings = {name: str(value) if isinstance(value, Path) and name in GIVEN_TEXTS else value
                for name, value in settings.items()}  # fmt: skip
    texts = {name: settings.pop(name) for name in GIVEN_TEXTS if is_text(settings.get(name))}
    config = _config(base, settings)
    if config.sweep is not None and config.pick is None:
        raise InputError("a sweep ends in one model here: say which by pick='loss<=1.05' (`secateur prune --help`)")
    check_installed(config.log)
    config.out = config.out or free_folder(config)
    places = {name: place_of(value, name, config.out) for name, value in texts.items()}
    named: dict[str, Any] = {name: str(path) for name, path in places.items()}
    config = replace(config, **named)
    loaded = None
    if isinstance(model, PreTrainedModel):
        loaded = loaded_from(model, tokenizer, config)  # what is wrong with it shows before there is a folder
    session = Session(new_run(config), listeners)
    for name, path in places.items():
        write_given(path, texts[name], name, config)
    if loaded is not None:
        session.loaded = loaded
    return session


def open_session(
    folder: Path | str,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    callbacks: Iterable[Callback] = (),
    trust_remote_code: bool = False,
) -> Session:
    """A session on an existing run, for the stage functions; of a run on a model in memory with that model again.
    `trust_remote_code` is to be said again of a run whose settings ask for it.

    Raises InputError where it is another one.
    """
    session = Session(open_run(Path(folder), trust_remote_code), _listeners(callbacks))
    if model is not None:
        check_given(model, tokenizer)
        own, asked = session.config.model, name_of(model)
        if not own.startswith(IN_MEMORY):
            raise InputError(f"{folder} is a run on {own}, which it loads itself; leave the model out")
        if own.rpartition(" ")[2] != asked.rpartition(" ")[2]:
            raise InputError(f"{folder} is a run on a model {own}, and this one has other weights ({asked})")
        session.loaded = loaded_from(model, tokenizer, session.config)
    return session


def resume(
    folder: Path | str,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    callbacks: Iterable[Callback] = (),
    show: bool = False,
    trust_remote_code: bool = False,
) -> Pruned:
    """Goes on with an interrupted run, or shows a finished one again; a model in memory is given again."""
    trust = {"trust_remote_code": trust_remote_code}
    return _finish(open_session(folder, model, tokenizer, callbacks=callbacks, **trust), show)


def inspect(model: PreTrainedModel | str | Path, trust_remote_code: bool = False) -> Inspection:
    """What can be pruned in a model, in memory or named; a named one's weights are not read."""
    if isinstance(model, PreTrainedModel):
        return Inspection(type(model).__name__, describe(model), model.config)
    return Inspection(str(model), *describe_pretrained(str(model), trust_remote_code))


def _finish(session: Session, show: bool) -> Pruned:
    with ExitStack() as stack:
        if show:
            shown = stack.enter_context(Screen(Console(highlight=False), session.config))
            session.progress = Listeners([shown, session.progress])
        logs = stack.enter_context(logs_of(session.run))
        session.progress = Listeners([session.progress, *logs])
        results = remaining_stages(session)
    if session.config.sweep is None:
        return Pruned.of(session, results)
    picked = next(run for run in sizes_of(session.run) if run.folder.name == results["picked"])
    return Pruned.of(session_on(session, picked), results["results"], results["sizes"])


def _config(base: Config | Mapping[str, Any], settings: Mapping[str, Any]) -> Config:
    """Settings as a Config, checked as those of a file are. Raises InputError of one line."""
    known = {f.name: f.default for f in fields(Config)}
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else "`secateur prune --help` lists them"
            raise InputError(f"there is no setting {name}; {hint}")
    one = {name: (value,) for name, value in settings.items() if known[name] == () and isinstance(value, str)}
    values = {**(vars(base) if isinstance(base, Config) else base), **settings, **one}
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        own = first.get("ctx", {}).get("error")
        if isinstance(own, InputError):
            raise own from None
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        raise InputError(f"{where}: {first['msg']}, not {first['input']!r}") from None


class _OnStep(Progress):
    """A function that hears of every learning step."""

    def __init__(self, hear: Callable[[Step], object]) -> None:
        self.hear = hear

    def step(self, step: Step) -> None:
        self.hear(step)


def _listeners(callbacks: Iterable[Callback]) -> Listeners:
    if isinstance(callbacks, Progress) or callable(callbacks):
        callbacks = [callbacks]
    found: list[Progress] = []
    for callback in callbacks:
        if not (isinstance(callback, Progress) or callable(callback)):
            kind = type(callback).__name__
            raise InputError(f"a callback is a function of a Step, or a secateur.Progress, not a {kind}")
        found.append(callback if isinstance(callback, Progress) else _OnStep(callback))
    return Listeners(found or [_Warnings()])


class _Warnings(Progress):
    """Says warnings as Python does, where nothing else hears of them."""

    def warned(self, warning: str) -> None:
        warnings.warn(warning, stacklevel=2)
