"""What Python code gets back: plain dataclasses, which a notebook shows as tables."""

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.card import asked, human, protocol, summary, warnings
from secateur.describe import Description, Refusal
from secateur.exported import checked_export, planned
from secateur.gates import Gates, load_gates
from secateur.inspection import COLUMNS, title, unit_rows
from secateur.load import read_export
from secateur.plan import Plan
from secateur.run import Run
from secateur.session import Session


@dataclass(frozen=True)
class Measured:
    """Figures of a model, dense or pruned."""

    perplexity: float
    """On the evaluation text."""
    loss: float
    """The same as nats a token."""
    parameters: int
    """All parameters; tied ones once."""
    active_parameters: int
    """Those that a token meets."""
    block_parameters: int
    """Parameters that belong to units: what sparsity is a share of."""
    flops_per_token: int
    """Without attention over the context."""
    kv_bytes_per_token: int
    """Bytes the KV cache takes for a token."""
    disk_bytes: int
    """Bytes of the weights as stored."""

    @classmethod
    def of(cls, figures: dict[str, Any]) -> "Measured":
        """What eval.json says of a model."""
        return cls(**{f.name: figures[f.name] for f in fields(cls)})


@dataclass(frozen=True, repr=False, eq=False)
class Pruned:
    """A finished run: the pruned model and what is known of it."""

    folder: Path
    """Folder of the run, which every command takes: `secateur report FOLDER`."""
    tokenizer: PreTrainedTokenizerBase
    dense: Measured
    """Figures of the unpruned model."""
    pruned: Measured
    """Figures of the pruned one, as exported."""
    gates: Gates
    """What was learned, of each unit of the dense model."""
    plan: Plan
    """Which units were kept, and with which scales."""
    results: dict[str, Any]
    """All that eval.json holds."""
    run: Run
    """Where all files are, and the settings."""
    device: torch.device
    dtype: torch.dtype
    sizes: tuple[dict[str, Any], ...] = ()
    """The sizes of its sweep, as sizes.json has them, where there was one; this is the one picked."""

    @classmethod
    def of(cls, session: Session, results: dict[str, Any], sizes: Iterable[dict[str, Any]] = ()) -> "Pruned":
        """What a session has made, `results` being the content of its eval.json."""
        run, groups = session.run, session.loaded.description.groups
        plan, _rounding = planned(run, groups, session.architecture)
        return cls(
            run.folder,
            session.loaded.tokenizer,
            Measured.of(results["dense"]),
            Measured.of(results["pruned"]),
            load_gates(run.gates, groups, session.architecture),
            plan,
            results,
            run,
            next(session.loaded.model.parameters()).device,
            session.loaded.checkpoint_dtype,
            tuple(sizes),
        )

    @cached_property
    def model(self) -> PreTrainedModel:
        """The pruned model, read from the export when first asked for; in eval mode, on the dense one's device."""
        return read_export(checked_export(self.run), self.dtype).to(self.device)

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.run.report

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A row a learning step, for a plot or a table; none where nothing was learned."""
        path = self.run.metrics
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def warnings(self) -> list[str]:
        """What to know before trusting the model."""
        return warnings(self.results)

    def __repr__(self) -> str:
        before, after = self.dense, self.pruned
        return (
            f"Pruned({self.folder}: parameters {human(before.parameters)} → {human(after.parameters)}, "
            f"perplexity {before.perplexity:.2f} → {after.perplexity:.2f})"
        )

    def _repr_html_(self) -> str:
        caption = f"{self.run.config.model}, pruned {asked(self.run.config)}: {self.run.model}"
        notes = [f"Perplexity: {protocol(self.results)}, {self.results['text']}.", f"Report: {self.report}"]
        notes += [f"Mind: {warning}" for warning in self.warnings]
        return html_table(caption, ("", "dense", "pruned", "change"), summary(self.results), notes)


@dataclass(frozen=True, repr=False)
class Inspection:
    """What can be pruned in a model, and what stays whole and why."""

    name: str
    description: Description
    config: PreTrainedConfig

    @property
    def unit_parameters(self) -> int:
        """Parameters that belong to units, by default: sparsity is a share of these."""
        return self.description.only(()).unit_parameters

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Sublayers that stay whole, each with the reason."""
        return self.description.refusals

    def __repr__(self) -> str:
        kinds = ", ".join(sorted(self.description.kinds))
        return f"Inspection({self.name}: {kinds}, {human(self.unit_parameters)} parameters in units)"

    def _repr_html_(self) -> str:
        notes = [f"{self.unit_parameters:,} parameters belong to units that are pruned by default; sparsity is a share "
                 "of these."]  # fmt: skip
        notes += [f"{refusal.where} stays whole: {refusal.reason}" for refusal in self.refusals]
        caption = title(self.name, self.description, self.config)
        return html_table(caption, COLUMNS, unit_rows(self.description), notes)


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A plain HTML table, every text escaped."""

    def row(tag: str, cells: Sequence[str]) -> str:
        sides = ("left", *("right" for _ in cells[1:]))
        said = (
            f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
            for side, cell in zip(sides, cells, strict=True)
        )
        return f"<tr>{''.join(said)}</tr>"

    return (
        f'<table><caption style="text-align: left">{html.escape(caption)}</caption>'
        f"<thead>{row('th', columns)}</thead><tbody>{''.join(row('td', cells) for cells in rows)}</tbody></table>"
        + "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    )
