"""Results → the tables in benchmarks/quality/README.md, between its markers, and the plots beside it.

    python benchmarks/quality/report.py [--results DIR] [--readme FILE] [--no-plots]

Reads nothing but result files, so it can be run at any time, also beside a study under way.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cells import STUDIED, cells_of
from results import Results, read_results
from secateur.files import InputError, write_text
from tables import (
    DEFAULT,
    ONCE,
    convergence_table,
    expressiveness_table,
    main_table,
    margins_table,
    mismatch_table,
    percent,
    tokens_title,
)

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: written by report.py -->", "<!-- end of results -->"


def models_in(folder: Path) -> list[str]:
    """The models that have results, the studied one first."""
    found = {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()
    return [STUDIED, *sorted(found - {STUDIED})]


def section(results: Results, plots: Sequence[str] = ()) -> str:
    """All that is known of a model."""
    sparsities = sorted({entry.cell.sparsity for entry in results.entries})
    shortest = min(entry.cell.tokens for entry in results.entries)
    parts = [f"### {results.model}", _measured_with(results), _not_run(results)]
    parts += [f"![{results.model}: {Path(plot).stem}]({plot})" for plot in plots]
    for sparsity in sparsities:
        parts += [f"**{percent(sparsity)} removed**", main_table(results, sparsity)]
    parts += ["**Margins against noise**, perplexity at equal tokens and seeds"]
    for sparsity in sparsities:
        parts += [f"{percent(sparsity)} removed, {tokens_title(shortest)} tokens:"]
        if again := results.entry(DEFAULT, sparsity, shortest):
            parts += [margins_table(results, sparsity)]
        if results.entry(ONCE, sparsity, shortest):
            parts += ["The same, with sensitivity measured once:"] if again else []
            parts += [margins_table(results, sparsity, ONCE)]
    if results.model == STUDIED:
        parts += [
            "**Claim 1, mismatch**: held-out loss as deployed less as trained, nats a token, "
            f"20 % removed, {tokens_title(shortest)} tokens",
            mismatch_table(results, 0.2, shortest),
            "**Claim 2, convergence**: held-out loss above the dense model's, 20 % removed",
            convergence_table(results, 0.2),
            "**Claim 3, expressiveness**: confined against free gates; learned values against ones, for one kept set",
            expressiveness_table(results),
        ]
    return "\n\n".join(parts)


def _measured_with(results: Results) -> str:
    def distinct(key: str) -> list[dict[str, str]]:
        return [dict(pairs) for pairs in dict.fromkeys(tuple(result[key].items()) for result in results.all)]

    if not results.all:
        return "Nothing has been measured yet."
    machines = (
        f"{m['cpu']}, {m['cores']} cores ({m['threads']} threads used), {m['ram_gb']} GB of memory"
        + (f", {m['precision']}" if "precision" in m else "")
        for m in distinct("machine")
    )
    packages: dict[str, dict[str, None]] = {}
    for found in distinct("versions"):
        for package, version in found.items():
            packages.setdefault(package, {})[version] = None
    dates = sorted({result["date"] for result in results.all})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    with_ = "; ".join(f"{package} {', '.join(versions)}" for package, versions in packages.items())
    return f"Measured on {'; '.join(machines)}; {with_}; {span}."


def _not_run(results: Results) -> str:
    missing: dict[tuple[float, int], list[str]] = {}
    count = 0
    for entry in results.entries:
        for seed in entry.planned:
            if seed not in entry.by_seed:
                name = entry.cell.label + (f" (seed {seed})" if seed else "")
                missing.setdefault((entry.cell.sparsity, entry.cell.tokens), []).append(name)
                count += 1
    total = len(cells_of(results.model))
    if not missing:
        return f"All {total} cells have been run."
    groups = (f"{percent(s)}, {tokens_title(t)}: {', '.join(names)}" for (s, t), names in sorted(missing.items()))
    return f"**Not run yet**, {count} of {total} cells: {'; '.join(groups)}."


def write_report(folder: Path, readme: Path, with_plots: bool = True) -> None:
    """Rewrites what lies between the markers of `readme`, and the plots in plots/ beside it."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"{readme} must have the lines {BEGIN!r} and {END!r}, once each")
    sections = []
    for model in models_in(folder):
        results = read_results(folder, model)
        plots: list[str] = []
        if with_plots:
            from plots import draw  # matplotlib is an extra

            plots = [path.relative_to(readme.parent).as_posix() for path in draw(results, readme.parent / "plots")]
        sections.append(section(results, plots))
    before, _, rest = text.partition(BEGIN)
    write_text(readme, "\n\n".join([before + BEGIN, *sections, END + rest.partition(END)[2]]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    parser.add_argument("--no-plots", action="store_true", help="tables only; needs no matplotlib")
    options = parser.parse_args(arguments)
    try:
        write_report(options.results, options.readme, not options.no_plots)
    except InputError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
