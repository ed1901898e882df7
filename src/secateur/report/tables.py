"""The words and tables of a report: warnings, headline figures, runs side by side, settings, versions, stages."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from secateur.card import asked, human, public_name, summary
from secateur.card import warnings as figures_to_mind
from secateur.report.drawn import Cell, Table, figure
from secateur.report.reading import Record


@dataclass(frozen=True)
class Card:
    """A headline figure."""

    title: str
    value: str
    change: str = ""
    note: str = ""
    command: str = ""
    """What to run for it."""
    good: bool | None = None
    """Whether it is good news; None: neither."""


def warnings(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(runs, what to know) before anything else. What is true of several runs is said once, of a folder RUN."""
    labels: dict[str, list[str]] = {}
    own: dict[str, str] = {}
    for record in records:
        said = list(record.problems)
        if record.evaluation is not None:
            said += figures_to_mind(record.evaluation)
            if not record.ratio[0] < 10:
                said.append(
                    f"the perplexity is {record.ratio[0]:.3g} times the dense model's: it is of no use as it is"
                )
        for equal in record.equivalences:
            if not equal["passed"]:
                said.append(f"{equal['runtime']} does not compute what {equal['reference']} computes of this export")
        for line in said:
            alike = line.replace(str(record.run.folder), "RUN")
            labels.setdefault(alike, []).append(record.label)
            own[alike] = line
    return [(", ".join(runs), own[line] if len(runs) == 1 else line) for line, runs in labels.items()]


def cards(record: Record) -> list[Card]:
    """What one run came to: size, quality, speed, proof."""
    found: list[Card] = []
    if record.evaluation is not None:
        dense, pruned = record.evaluation["dense"], record.evaluation["pruned"]
        found.append(_shrunk("Parameters", dense, pruned, "parameters", ""))
        windows = f"{dense['windows']:,} × {dense['length']:,} tokens of {public_name(record.evaluation['text'])}"
        found.append(
            Card("Perplexity", f"{figure(dense['perplexity'])} → {figure(pruned['perplexity'])}",
                 times(record), windows)
        )  # fmt: skip
        found.append(_shrunk("Weights on disk", dense, pruned, "disk_bytes", "B"))
        found.append(_shrunk("KV cache a token", dense, pruned, "kv_bytes_per_token", "B"))
    found += _speeds(record)
    tasks = (record.evaluation or {}).get("tasks") or {}
    scored = [task for task in tasks.values() if "acc" in task["dense"]]
    if scored:
        means = [sum(task[model]["acc"] for task in scored) / len(scored) for model in ("dense", "pruned")]
        title = "Accuracy" if len(scored) == 1 else f"Accuracy, mean of {len(scored)} tasks"
        change = f"{means[1] - means[0]:+.3f}".replace("-", "−")
        found.append(Card(title, f"{means[0]:.3f} → {means[1]:.3f}", change))
    if record.verification is not None:
        exact = record.verification["comparisons"][-1]
        passed = record.verification["passed"]
        note = f"{exact['dtype']} logits differ by {exact['max_difference']:.2g} at most"
        found.append(Card("Verification", "passed" if passed else "FAILED", note=note, good=passed))
    return found


def _shrunk(title: str, dense: Mapping[str, Any], pruned: Mapping[str, Any], key: str, unit: str) -> Card:
    change = "as before" if dense[key] == pruned[key] else f"−{1 - pruned[key] / dense[key]:.1%}"
    before, after = human(dense[key], unit), human(pruned[key], unit)
    if before.partition(" ")[2] == after.partition(" ")[2]:
        before = before.partition(" ")[0]
    return Card(title, f"{before} → {after}", change.replace("−-", "+"))


def _speeds(record: Record) -> Iterator[Card]:
    for bench in record.benches:
        for row in bench["timings"]:
            if row["metric"] in ("decode", "between_tokens") and row["batch_size"] == bench["timings"][0]["batch_size"]:
                low, high = row["speedup"]["low"], row["speedup"]["high"]
                note = f"{row['batch_size']} at a time, {low:.2f} to {high:.2f}; ideal {row['ideal']['speedup']:.2f} ×"
                yield Card(f"Decoding, {bench['runtime']}", f"{row['speedup']['median']:.2f} ×", "as fast", note)
    if record.evaluation is not None and not record.benches:
        dense, pruned = record.evaluation["dense"], record.evaluation["pruned"]
        yield Card("Speed", "not measured", f"−{1 - pruned['flops_per_token'] / dense['flops_per_token']:.1%} FLOPs",
                   command=f"secateur bench {record.run.folder}")  # fmt: skip


def beside(records: Sequence[Record]) -> Table:
    """The runs side by side, a row each."""
    columns = ["run", "method", "removed", "steps × tokens", "parameters", "perplexity", "× dense", "on disk",
               "KV cache a token", "decoding, × dense", "verified", "state"]  # fmt: skip
    table = Table("runs", "Runs side by side", columns, filters=True)
    for record in records:
        c, done, empty = record.run.config, record.evaluation, [Cell("–", float("nan"))] * 5
        figures = empty
        if done is not None:
            pruned = done["pruned"]
            figures = [
                Cell(human(pruned["parameters"]), pruned["parameters"]),
                Cell(f"{pruned['perplexity']:.2f}", pruned["perplexity"]),
                Cell(times(record), record.ratio[0]), Cell(human(pruned["disk_bytes"], "B"), pruned["disk_bytes"]),
                Cell(human(pruned["kv_bytes_per_token"], "B"), pruned["kv_bytes_per_token"]),
            ]  # fmt: skip
        speeds = [
            r["speedup"]["median"] for bench in record.benches for r in bench["timings"] if r["metric"] == "decode"
        ]
        missing = [stage.name for stage in record.stages if not stage.done]
        state = "finished" if done is not None else f"stopped before {missing[0]}" if missing else "finished"
        verified = "not yet" if record.verification is None else "yes" if record.verification["passed"] else "FAILED"
        spent = Cell(f"{c.steps:,} × {c.batch_size * c.seq_len:,}", float(c.steps * c.batch_size * c.seq_len))
        label, removed = f"{record.number + 1} {record.label}", Cell(asked(c), c.sparsity)
        speed = Cell(f"{speeds[0]:.2f} ×", speeds[0]) if speeds else empty[0]
        table.add(label, c.method, removed, spent, *figures, speed, verified, state, run=record.number)
    return table


def evaluation(record: Record) -> Table | None:
    """Dense against pruned, as the screen has it at the end of a run."""
    if record.evaluation is None:
        return None
    table = Table(f"evaluation-{record.number}", "Dense against pruned", ["", "dense", "pruned", "change"])
    for row in summary(record.evaluation):
        table.add(*row)
    dense, pruned = record.evaluation["dense"], record.evaluation["pruned"]
    change = _with_error(pruned["loss"] - dense["loss"], record.evaluation.get("loss_change_stderr"))
    losses = [_with_error(model["loss"], model.get("loss_stderr")) for model in (dense, pruned)]
    table.add("loss, nats a token", *losses, change if change.startswith("-") else f"+{change}")
    return table


def times(record: Record) -> str:
    """`1.50 ± 0.02 ×`."""
    ratio, error = record.ratio
    return f"{ratio:.2f} ×" if math.isnan(error) else f"{ratio:.2f} ± {error:.2f} ×"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def verification(record: Record) -> Table | None:
    """Gated against exported logits, and other runtimes against transformers."""
    if record.verification is None and not record.equivalences:
        return None
    columns = ["compared", "on", "largest difference", "allowed", "agreement", "passed"]
    table = Table(f"verification-{record.number}", "Verification", columns)
    for c in (record.verification or {"comparisons": []})["comparisons"]:
        allowed = figure(float(c["allowed"])) + (" on average" if c["dtype"] != "float32" else "")
        table.add(f"gated against exported logits, {c['dtype']}", f"{c['tokens']:,} tokens",
                  float(c["max_difference"]), Cell(allowed, c["allowed"]),
                  f"{c['same_top_token']:.2%} same top token", "yes" if c["passed"] else "NO")  # fmt: skip
    for e in record.equivalences:
        for model in ("pruned", "dense"):
            found = e[model]
            equal = sum(a["equal"] for a in found)
            table.add(f"greedy text in {e['runtime']} against {e['reference']}, {model}",
                      f"{len(found)} prompts, {e['new_tokens']} tokens each",
                      float(max((a["difference"] for a in found), default=0.0)), float(e["tolerance"]),
                      f"{equal} of {len(found)} equal, {sum(a['same'] for a in found)} tokens before they part",
                      "yes" if e["passed"] else "NO")  # fmt: skip
    return table


def settings(records: Sequence[Record]) -> Table:
    """Every setting, a column a run."""
    flat = [dict(_flat(asdict(record.run.config))) for record in records]
    names = ["setting", *(["value"] if len(records) == 1 else (record.label for record in records))]
    table = Table("settings", "Configuration, as resolved", names, filters=True)
    for name in dict.fromkeys(name for values in flat for name in values):
        values = [_said(one.get(name)) for one in flat]
        table.add(name, *values, same="yes" if len(set(values)) == 1 else "no")
    return table


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _said(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def provenance(records: Sequence[Record]) -> Table:
    """Versions of what made a run, and the data it was made with."""
    names = ["", *(["value"] if len(records) == 1 else (record.label for record in records))]
    table = Table("provenance", "Versions and data", names)
    found = [_made_with(record) for record in records]
    for name in dict.fromkeys(name for one in found for name in one):
        table.add(name, *(one.get(name, "–") for one in found))
    return table


def _made_with(record: Record) -> dict[str, str]:
    done, about = record.evaluation, record.about
    values = {"model": record.run.config.model}
    for where, versions in (("learned", about.get("versions")), ("evaluated", (done or {}).get("versions"))):
        if isinstance(versions, Mapping):
            values[f"{where} with"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    if "transformers_version" in record.model_config:
        values["export written by"] = f"transformers {record.model_config['transformers_version']}"
    for bench in record.benches:
        versions = bench["pruned"]["versions"] | bench["dense"]["versions"]
        machine = bench["machine"]
        values[f"timed with ({bench['runtime']})"] = ", ".join(f"{n} {v}" for n, v in versions.items())
        values["timed on"] = f"{machine.get('cpu')}, {machine.get('cores')} cores"
    data = about.get("data")
    if isinstance(data, Mapping):
        values |= {f"calibration: {name.replace('_', ' ')}": _said(value) for name, value in data.items()}
    if "tokens" in about:
        values["tokens learned or scored on"] = f"{about['tokens']:,}"
    if done is not None:
        values["evaluation text"] = done["text"]
        if overlap := done.get("overlap"):
            values["runs of words shared with calibration"] = f"{overlap['text'].get('runs', 0):,}"
    values["architecture"] = str(about.get("architecture", "–"))
    return values


def written_with() -> str:
    """What wrote the page."""
    found = []
    for name in ("secateur", "matplotlib", "jinja2"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
