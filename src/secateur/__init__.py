"""Secateur: structured pruning of large language models with learned, deterministic gates."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from secateur.api import inspect as inspect
    from secateur.api import new_session as new_session
    from secateur.api import open_session as open_session
    from secateur.api import prune as prune
    from secateur.api import resume as resume
    from secateur.config import Config as Config
    from secateur.files import InputError as InputError
    from secateur.learn import StopLearning as StopLearning
    from secateur.listeners import Progress as Progress
    from secateur.load import describe_pretrained as describe_pretrained
    from secateur.optimise import Step as Step
    from secateur.results import Inspection as Inspection
    from secateur.results import Pruned as Pruned
    from secateur.stages import VerificationFailed as VerificationFailed
    from secateur.stages import eval_stage as eval_stage
    from secateur.stages import export_stage as export_stage
    from secateur.stages import learn_stage as learn_stage
    from secateur.stages import plan_stage as plan_stage
    from secateur.stages import recover_stage as recover_stage
    from secateur.stages import verify_stage as verify_stage

_IN = {
    "api": ("prune", "resume", "inspect", "new_session", "open_session"),
    "config": ("Config",),
    "files": ("InputError",),
    "learn": ("StopLearning",),
    "load": ("describe_pretrained",),
    "optimise": ("Step",),
    "results": ("Pruned", "Inspection"),
    "listeners": ("Progress",),
    "stages": (
        "learn_stage", "plan_stage", "export_stage", "verify_stage", "recover_stage", "eval_stage", "VerificationFailed"
    ),
}  # fmt: skip
"""Module → what of it is public. No name is that of a module, which would take its place once it is imported."""
_HOMES = {name: module for module, names in _IN.items() for name in names}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Imports the public verbs when they are first used: torch and transformers take seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
