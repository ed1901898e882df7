"""A sweep beside runs that learn one of its sizes each, with as many tokens as the whole sweep.

    python benchmarks/quality/sweeps.py MODEL --data FOLDER [--sizes 0.2,0.35,0.5] [--steps 400] [--seed 0] [--work DIR]
        [--no-remeasure]

Both kinds learn and plan as `secateur prune` does, in run folders below DIR, where an interrupted comparison goes on;
then each plan's gates are put on the model, which computes what the export would. Judged on texts that settings were
chosen on (docs/study.md): WikiText-2 raw validation and C4, 20 windows of 512 tokens each, and on held-out tokens of
the calibration's kind; as multiples of the unpruned model's perplexity. A sweep measures sensitivity again for its
first size alone; `--no-remeasure` leaves that out of all runs.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from judge import Judge, linked_calibration
from secateur.bos import leading_bos
from secateur.config import Config
from secateur.evaluate import mean_loss
from secateur.files import InputError
from secateur.load import Loaded, autocast, load
from secateur.plan import load_plan
from secateur.progress import Screen
from secateur.run import Run, new_run, open_run
from secateur.session import Session
from secateur.sizes import session_on
from secateur.stages import learn_stage, plan_stage
from secateur.sweep import is_done, learn_sizes, swept_runs

TEXTS = {"WikiText-2 validation": "text/wikitext2_raw_valid.txt.gz", "C4": "text/c4_calib.jsonl.gz"}
console = Console(highlight=False, soft_wrap=True)


class Beside:
    """One model, its texts, and the runs on it."""

    def __init__(self, model: str, data: Path, work: Path) -> None:
        self.loaded: Loaded = load(model, "auto", "auto", trust_remote_code=False)
        self.bos = leading_bos(self.loaded.model, self.loaded.tokenizer)
        self.model, self.work = model, work
        self.calibration = linked_calibration(data, work / "calibration")
        judge = Judge(self.loaded.tokenizer, self.bos, data)
        self.texts = {name: judge.windows(file) for name, file in TEXTS.items()}
        self.dense: dict[str, float] | None = None

    def run(self, name: str, **settings: Any) -> Run:
        """The run folder of that name, begun now or earlier."""
        config = Config(self.model, data=str(self.calibration), out=self.work / name, seq_len=256, batch_size=2,
                        held_out_tokens=4096, **settings)  # fmt: skip
        return open_run(self.work / name) if (self.work / name / "config.yaml").exists() else new_run(config)

    def session(self, run: Run, screen: Screen) -> Session:
        """A session on the model that is loaded."""
        session = Session(run, screen)
        session.loaded, session.bos = self.loaded, self.bos
        return session

    def times_dense(self, session: Session) -> dict[str, float]:
        """Perplexities with the gates of a planned run, over the unpruned model's."""
        groups = self.loaded.description.groups
        plan, _rounding = load_plan(session.run.plan, groups, session.architecture)
        rows = self.texts | {"held-out": session.blocks.held_out_NT}
        with autocast(self.loaded.model.device, "auto"):
            if self.dense is None:
                self.dense = {name: mean_loss(self.loaded.model, ids_NT) for name, ids_NT in rows.items()}
            losses = {
                name: mean_loss(self.loaded.model, ids_NT, groups, plan.gates(groups)) for name, ids_NT in rows.items()
            }
        return {name: math.exp(loss - self.dense[name]) for name, loss in losses.items()}


def compare(beside: Beside, sizes: str, steps: int, seed: int, remeasure: bool) -> None:
    """Learns what is not learned yet and prints a row a size."""
    settings: dict[str, Any] = {"steps": steps, "seed": seed, "remeasure": remeasure}
    ending = f"{steps}-seed{seed}" + ("" if remeasure else "-once")
    swept = beside.run(f"sweep-{sizes}-{ending}", sweep=sizes, **settings)
    with Screen(console, swept.config) as screen:
        session = beside.session(swept, screen)
        if not is_done(swept):
            learn_sizes(session)
        found = {}
        for size in swept_runs(swept):
            inside = session_on(session, size)
            if not size.plan.exists():
                plan_stage(inside)
            found[size.config.sparsity] = beside.times_dense(inside)
    for sparsity, of_sweep in found.items():
        alone = beside.run(f"alone-{sparsity:g}-{ending}", sparsity=sparsity, **settings)
        with Screen(console, alone.config) as screen:
            session = beside.session(alone, screen)
            if not alone.gates.exists():
                learn_stage(session)
            if not alone.plan.exists():
                plan_stage(session)
            of_run = beside.times_dense(session)
        cells = [f"{name} {of_sweep[name]:.3f}, alone {of_run[name]:.3f}, {of_sweep[name] / of_run[name] - 1:+.1%}"
                 for name in of_run]  # fmt: skip
        console.print(f"{sparsity:.0%} removed, {steps} steps: {'; '.join(cells)}")


def main() -> int:
    """Exit codes: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the unpruned model, as `secateur prune` takes it")
    parser.add_argument("--data", type=Path, required=True, help="the folder with text/ (judge.py names the files)")
    parser.add_argument("--sizes", default="0.2,0.35,0.5")
    parser.add_argument("--steps", type=int, default=400, help="of 2 × 256 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/sweeps"))
    parser.add_argument("--no-remeasure", action="store_true", help="measure sensitivity on the unpruned model only")
    options = parser.parse_args()
    try:
        beside = Beside(options.model, options.data, options.work)
        compare(beside, options.sizes, options.steps, options.seed, not options.no_remeasure)
    except InputError as error:
        print(f"sweeps: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
