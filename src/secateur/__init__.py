"""Secateur: structured pruning of large language models with learned, deterministic gates."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from secateur.config import Config as Config
    from secateur.describe import describe as describe
    from secateur.load import describe_pretrained as describe_pretrained
    from secateur.stages import eval_stage as eval_stage
    from secateur.stages import export_stage as export_stage
    from secateur.stages import learn_stage as learn_stage
    from secateur.stages import open_session as open_session
    from secateur.stages import plan_stage as plan_stage
    from secateur.stages import prune as prune
    from secateur.stages import verify_stage as verify_stage

_HOMES = {
    "Config": "config",
    "describe": "describe",
    "describe_pretrained": "load",
    **dict.fromkeys(
        ("prune", "open_session", "learn_stage", "plan_stage", "export_stage", "verify_stage", "eval_stage"), "stages"
    ),
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Imports the public verbs when they are first used: torch and transformers take seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
