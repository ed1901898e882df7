"""The study's results as Markdown: the main tables, margins against noise, and the method's three claims.

A figure that has not been measured is a –.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

from cells import LEARNED, STEPS_25K, Cell
from judge import TASKS, TEXTS
from results import Entry, Margin, Read, Result, Results, accuracy, held_out_rise, times_dense

NONE = "–"
DEFAULT = "deterministic"
ONCE = f"{DEFAULT}+once"
"""The default with sensitivity measured once, from which all other such rows differ in one thing."""
TEXT_TITLES = {"wikitext2-test": "WikiText-2", "c4": "C4"}
CONFINED, FREE = "hard-concrete-deterministic", "hard-concrete-expanded"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tokens_title(tokens: int) -> str:
    """25,600 → `25 k`: the thousands, cut off."""
    return f"{tokens // 1000} k" if tokens >= 1000 else str(tokens)


def percent(share: float) -> str:
    """0.2 → `20 %`."""
    return f"{share:.0%}".replace("%", " %")


# --- main tables -----------------------------------------------------------------------------------------------------


def main_table(results: Results, sparsity: float) -> str:
    """Methods × tokens at a sparsity: perplexities as multiples of the dense model's, held-out loss, tasks, seconds."""
    titles = [f"{TEXT_TITLES[text]} ×" for text in TEXTS]
    header = ["method", "tokens", *titles, "held-out +", *TASKS, "learning"]
    rows = [_main_row(entry) for entry in results.entries if entry.cell.sparsity == sparsity]
    return table(header, [_dense_row(results.dense), *rows])


def _dense_row(dense: Result | None) -> list[str]:
    if dense is None:
        return ["dense", "", *[NONE] * (len(TEXTS) + 1 + len(TASKS)), ""]
    perplexities = [f"({dense['perplexity'][text]['perplexity']:.2f})" for text in TEXTS]
    return ["dense (perplexity)", "", *perplexities, "", *(_task(dense, task) for task in TASKS), ""]


def _main_row(entry: Entry) -> list[str]:
    figures = [_spread(entry, times_dense(text), "{:.2f}") for text in TEXTS]
    tasks = [_task(r, task) if (r := entry.by_seed.get(0)) else NONE for task in TASKS]
    seconds = _spread(entry, lambda r: r["seconds"]["learn"] / 60, "{:.1f} min", spread=False)
    held_out = _held_out(entry)
    spent = [t for t in (entry.cell.tokens, entry.cell.recovery_tokens) if t]
    return [entry.cell.label, " + ".join(map(tokens_title, spent)), *figures, held_out, *tasks, seconds]


def _spread(entry: Entry, read: Read, form: str, spread: bool = True) -> str:
    """Mean over seeds, with the standard deviation where there are several."""
    values = entry.values(read)
    if not values:
        return NONE
    deviation = f" ± {form.format(statistics.stdev(values))}" if spread and len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + deviation


def _held_out(entry: Entry | None) -> str:
    """Of seed 0 alone: each seed holds other documents out, and losses on them rise by other amounts."""
    return NONE if (result := _seed0(entry)) is None else f"{held_out_rise(result):.3f}"


def _task(result: Result, task: str) -> str:
    difference = result["tasks"][task].get("difference")
    change = "" if difference is None else f" ({100 * difference:+.1f})".replace("-", "−")
    return f"{100 * accuracy(task)(result):.1f}{change}"


# --- margins against noise -------------------------------------------------------------------------------------------


def margins_table(results: Results, sparsity: float, reference: str = DEFAULT, steps: int = STEPS_25K) -> str:
    """How much higher or lower each method's perplexity is than the default's, at equal tokens and seeds. Rows
    whose sensitivity was measured once are held against `ONCE`, all rows where it is the only default that was run.

    Bold where the margin exceeds the noise: for rows of one seed that of the default, which the first row states; for
    rows of several seeds that of their pairs, whose standard deviation follows the mean.
    """
    tokens = Cell("", DEFAULT, sparsity, steps).tokens
    reads = [times_dense(text) for text in TEXTS]
    default = results.entry(reference, sparsity, tokens)
    assert default is not None
    alone = results.entry(DEFAULT, sparsity, tokens) is None
    noises = [default.noise(read) for read in reads]
    rows = [["noise of one seed", *(NONE if noise is None else _percent(noise) for noise in noises)]]
    for entry in results.entries:
        alike = alone or entry.cell.label == ONCE or entry.cell.measured_once == default.cell.measured_once
        if (entry.cell.sparsity, entry.cell.tokens) == (sparsity, tokens) and entry is not default and alike:
            margins = (entry.margin(default, read) for read in reads)
            rows.append([entry.cell.label, *map(_margin, margins, noises)])
    return table([f"against {reference}", *(TEXT_TITLES[text] for text in TEXTS)], rows)


def _margin(margin: Margin | None, noise: float | None) -> str:
    if margin is None:
        return NONE
    said = _percent(margin.mean)
    if margin.deviation is not None:
        said = said.replace(" %", f" ± {100 * margin.deviation:.1f} %")
    return f"**{said}**" if margin.counts(noise) else said


def _percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.1f} %".replace("-", "−")


# --- the three claims ------------------------------------------------------------------------------------------------


def mismatch_table(results: Results, sparsity: float, tokens: int) -> str:
    """Claim 1: held-out loss with the gates as deployed less that with the gates as trained, along the run."""
    header = ["gates", "before the kept set is fixed, mean", "largest", "at the end"]
    rows = []
    for method in LEARNED:
        gaps = _gaps(_seed0(results.entry(method, sparsity, tokens)))
        rows.append([method, *(NONE if gap is None else f"{gap:+.3f}".replace("-", "−") for gap in gaps)])
    return table(header, rows)


def _gaps(result: Result | None) -> tuple[float | None, float | None, float | None]:
    if result is None or not result["curve"]:
        return None, None, None
    gaps = {point["step"]: point["held_out_deployed"] - point["held_out_trained"] for point in result["curve"]}
    fixed_at = result["fixing"]["step"] if result["fixing"] else math.inf
    before = [gap for step, gap in gaps.items() if step <= fixed_at]
    last = gaps[max(gaps)]
    return (statistics.fmean(before), max(before, key=abs), last) if before else (None, None, last)


def convergence_table(results: Results, sparsity: float) -> str:
    """Claim 2: rise of the held-out loss over the dense model's, at equal tokens."""
    tokens = sorted({e.cell.tokens for e in results.entries if e.cell.sparsity == sparsity})
    rows = [
        [method, *(_held_out(results.entry(method, sparsity, t)) for t in tokens)]
        for method in (*LEARNED, "sensitivity")
    ]
    return table(["held-out +, nats a token", *map(tokens_title, tokens)], rows)


def expressiveness_table(results: Results) -> str:
    """Claim 3: gates confined to [0, 1] against free ones; and learned values against ones, for the same kept set."""
    header = ["method", "sparsity", "tokens", "WikiText-2 ×, learned", "with ones", "held-out +, learned", "with ones"]
    first = (CONFINED, FREE, DEFAULT)
    entries = [e for e in results.entries if (r := _seed0(e)) and r.get("ones")]
    entries.sort(
        key=lambda e: (e.cell.sparsity, e.cell.tokens, first.index(e.cell.label) if e.cell.label in first else 3)
    )
    rows = []
    for entry in entries:
        result = entry.by_seed[0]
        perplexity, ones = result["perplexity"]["wikitext2-test"], result["ones"]
        rise = ones["held_out"] - result["held_out"]["dense"]
        ratio = perplexity["times_dense"] * math.exp(ones["wikitext2-test"] - perplexity["loss"])
        row = [f"{perplexity['times_dense']:.2f}", f"{ratio:.2f}", f"{held_out_rise(result):.3f}", f"{rise:.3f}"]
        rows.append([entry.cell.label, percent(entry.cell.sparsity), tokens_title(entry.cell.tokens), *row])
    return table(header, rows or [[NONE] * len(header)])


def _seed0(entry: Entry | None) -> Result | None:
    return entry.by_seed.get(0) if entry else None
