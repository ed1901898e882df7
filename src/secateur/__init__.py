"""Secateur: structured pruning of large language models with learned, deterministic gates."""

__version__ = "0.1.0"
