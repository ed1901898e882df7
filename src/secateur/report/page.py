"""The page: what was read of the runs, drawn and put into the template page.html with its style and its script."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from secateur.bench_report import lines as bench_lines
from secateur.card import arrival, asked, protocol, public_name, task_protocol
from secateur.files import InputError, write_text
from secateur.report import curves, kept, outcome, tables
from secateur.report.drawn import Drawn, Table
from secateur.report.reading import Record, read_runs
from secateur.report.svg import SERIES

HERE = Path(__file__).parent

ERRORS = "Errors, where there are any, are standard errors over the windows, that of a change window by window."

OPENED = 3
"""Runs whose details are open when the page is; where there are more, all are folded."""


SECTIONS = {
    "warnings": "Mind first", "headline": "Result", "kept": "What was kept", "learning": "Learning",
    "evaluation": "Evaluation", "text": "Text", "proof": "Verification and speed", "made": "How it was made",
}  # fmt: skip
"""Id → name of the page's sections, in their order."""


@dataclass(frozen=True)
class Details:
    """What is shown of one run beside what it shares with the others."""

    record: Record
    cards: list[tables.Card]
    maps: list[Drawn]
    histogram: Drawn | None
    tasks: Drawn | None
    evaluation: Table | None
    said: list[str]
    samples: list[dict[str, str]]
    verification: Table | None
    benches: list[tuple[Drawn, list[str]]]


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the report of the runs in these folders; by default RUN/report.html, of several ./report.html.

    Raises InputError for a folder that is no run.
    """
    if not folders:
        raise InputError("a report of what? Give the folder of a run: secateur report RUN")
    records = read_runs(folders)
    target = out or (records[0].run.report if len(records) == 1 else Path("report.html"))
    write_text(target, page(records))
    return target


def page(records: Sequence[Record], now: datetime | None = None) -> str:
    """The HTML of a report."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["code"] = _code
    many = len(records) > 1
    single = records[0].run.config
    details = [_details(record) for record in records]
    sampled = any(one.samples for one in details)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    title = f"{len(records)} runs" if many else f"{public_name(single.model)}, pruned {asked(single)}"
    text = environment.get_template("page.html").render(
        title=title,
        records=records,
        many=many,
        opened=len(records) <= OPENED,
        series=SERIES,
        written=(now or datetime.now(timezone.utc)).strftime("%Y-%m-%d %H:%M UTC"),
        written_with=tables.written_with(),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{b64encode(sha256(script.encode()).digest()).decode()}",
        sections=[(name, text) for name, text in SECTIONS.items() if name != "text" or sampled],
        sampled=sampled,
        learns=any(record.learns for record in records),
        warnings=tables.warnings(records),
        beside=tables.beside(records) if many else None,
        pareto=outcome.pareto(records) if many else [],
        curves=curves.learning_curves(records),
        recovery=curves.recovery_curves(records),
        widths=kept.widths(records),
        widths_table=kept.widths_table(records),
        details=details,
        settings=tables.settings(records),
        provenance=tables.provenance(records),
    )
    return text.lstrip()


def _code(text: str) -> Markup:
    """Text in which what stands between backticks is code."""
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(Markup(f"<code>{part}</code>") if i % 2 else part for i, part in enumerate(parts))


def _details(record: Record) -> Details:
    done = record.evaluation
    said = []
    if done is not None:
        said = [
            f"Perplexity: {protocol(done)}; {done['text']}. {ERRORS}",
            f"B{arrival(done)[1:]}.",
        ]
        said += [f"Tasks: {told}."] if (told := task_protocol(done)) else []
    for number, refit in enumerate(record.refits, 1):
        ridge = "no ridge lowered it" if refit["ridge"] is None else f"ridge {refit['ridge']:g}"
        before, after = refit["held_out_before"], refit["held_out_after"]
        said.append(f"Refit {number}: held-out loss {before:.4f} → {after:.4f} ({ridge}).")
    return Details(
        record=record,
        cards=tables.cards(record),
        maps=kept.maps(record),
        histogram=kept.histogram(record),
        tasks=outcome.task_figure(record),
        evaluation=tables.evaluation(record),
        said=said,
        samples=(done or {}).get("samples") or [],
        verification=tables.verification(record),
        benches=[
            (outcome.bench_figure(bench, f"bench-{record.number}-{place}"), list(bench_lines(bench)))
            for place, bench in enumerate(record.benches)
        ],
    )
