"""What the study runs: one `Cell` a row of its tables, in the order in which they tell most for the time they take.

A cell is one call of `secateur prune` with everything decided but where the files are. The id of a cell is the name of
its result file, so it must never change its meaning: what is to differ gets a variant of its own.
"""

from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from secateur.config import Config
from secateur.recipes import OF_EXPERTS, ONE_SHOT

BATCH_SIZE, SEQ_LEN = 2, 256
"""512 tokens a step: what two cores do in a few seconds."""

HELD_OUT_TOKENS = 4096
"""Of held-out text, on which losses are measured; the same documents for all cells of a seed."""

STUDIED = "smollm2"
"""The model that the whole study runs on; any other one repeats the main rows."""

MIXTURE = "smollm2-moe"
"""The mixture of experts that benchmarks/moe/upcycle.py makes: experts' channels, and baselines for them."""

MIXTURE_AGAIN = "smollm2-moe-2"
"""Another one, as each making of it differs: what measuring sensitivity again does to a mixture, both ways."""

STEPS_25K, STEPS_100K, STEPS_400K = 50, 200, 800

AFTERWARDS: dict[str, dict[str, Any]] = {
    "refit": {"refit": True},
    "lora": {"recover": "lora"},
    "full": {"recover": "full"},
}
"""Changes of the weights after pruning: the gates are those of the cell without them."""

TWICE = "twice"
"""Of a variant with recovery: over all tokens twice."""

CHANGES: dict[str, dict[str, Any]] = {
    "once": {"remeasure": False},
    "no-kd": {"kd_weight": 0.0},
    "no-binarise": {"binarise": False},
    "paper": {"recipe": "paper"},
    "per-layer": {"per": "layer"},
    "per-expert": {"per": "expert"},
    "uniform": {"shape": "uniform"},
    "padded": {"shape": "padded"},
    **AFTERWARDS,
    TWICE: {},
}
"""Name of a change → the settings in which it differs from the defaults. A variant is one, or several joined by +."""

BASELINES = ("sensitivity", "flap", "wanda-sp", "taylor-vector", "taylor-element", "magnitude")
RELAXATIONS = ("hard-concrete", "hard-concrete-deterministic", "hard-concrete-expanded", "grasprune")
LEARNED = ("deterministic", *RELAXATIONS)
assert {*BASELINES, *OF_EXPERTS} == set(ONE_SHOT), "a one-shot method has no cell"


@dataclass(frozen=True)
class Cell:
    """One pruning run, to be measured."""

    model: str
    """Short name of the model: the folder of its results."""
    method: str
    sparsity: float
    steps: int = STEPS_25K
    seed: int = 0
    variant: str = ""
    curve: bool = False
    """Measure the held-out loss ten times along the run; costs time and changes nothing else."""

    @property
    def label(self) -> str:
        """Method and variant, as the tables name them."""
        return f"{self.method}+{self.variant}" if self.variant else self.method

    @property
    def tokens(self) -> int:
        """Calibration tokens that learning may use; recovery comes on top."""
        return self.steps * BATCH_SIZE * SEQ_LEN

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the changes that the variant joins."""
        return tuple(filter(None, self.variant.split("+")))

    @property
    def recovery_tokens(self) -> int:
        """Tokens that weights are trained on after pruning: as many again, the same ones, or those twice."""
        return self.recovery_steps * BATCH_SIZE * SEQ_LEN

    @property
    def recovery_steps(self) -> int:
        """Steps of recovery; none where nothing recovers."""
        return self.steps * (2 if TWICE in self.parts else 1) if "recover" in self.changes else 0

    @property
    def measured_once(self) -> bool:
        """Whether the default would have measured sensitivity again, and this does not."""
        return "once" in self.parts

    @property
    def changes(self) -> dict[str, Any]:
        """Settings in which the cell's variant differs from the defaults."""
        changes: dict[str, Any] = {}
        for name in self.parts:
            changes |= CHANGES[name]
        return changes

    @property
    def name(self) -> str:
        """Id within the model."""
        return f"{self.label}-s{self.sparsity:g}-t{self.tokens}-seed{self.seed}"

    @property
    def id(self) -> str:
        """Id, and path of the result without its suffix."""
        return f"{self.model}/{self.name}"

    @property
    def learns_as(self) -> "Cell":
        """The cell with the same gates: itself without what only changes weights afterwards."""
        return replace(self, variant="+".join(name for name in self.parts if name not in (*AFTERWARDS, TWICE)))

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of `Config` that the cell decides."""
        measured = {"measure_every": max(1, self.steps // 10)} if self.curve else {}
        own = {"method": self.method, "sparsity": self.sparsity, "steps": self.steps, "seed": self.seed}
        sizes = {"batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "held_out_tokens": HELD_OUT_TOKENS}
        recovery = {"recover_steps": self.recovery_steps} if self.recovery_steps else {}
        return own | sizes | measured | recovery | self.changes


def cells_of(model: str) -> tuple[Cell, ...]:
    """The cells of a model, first what tells most. A cell that is named twice runs once; one waits that needs a setting
    which this version has not."""
    planned = {STUDIED: _study, MIXTURE: _mixture, MIXTURE_AGAIN: _mixture_again}.get(model, _main_rows)
    cells = dict.fromkeys(planned(model))
    known = {field.name for field in fields(Config)}
    return tuple(cell for cell in cells if cell.settings.keys() <= known)


def _study(model: str) -> list[Cell]:
    low_high = (0.2, 0.5)
    cells = [Cell(model, "deterministic", s, STEPS_100K, variant=v) for s, v in product(low_high, ("", "lora"))]
    cells += [Cell(model, m, s, curve=_curve(m, s)) for s, m in product(low_high, ("deterministic", *BASELINES))]
    cells += [Cell(model, "deterministic", s, seed=seed) for s, seed in product(low_high, (1, 2))]
    cells += [Cell(model, m, s, curve=_curve(m, s)) for s, m in product(low_high, RELAXATIONS)]
    cells += [Cell(model, "deterministic", s, variant=v) for v, s in product(("refit", "lora"), low_high)]
    cells += [Cell(model, "deterministic", s, variant=v) for v, s in product(("no-kd", "no-binarise"), low_high)]
    cells += [Cell(model, "deterministic", s, STEPS_100K, variant="refit") for s in low_high]
    cells += [Cell(model, m, s, seed=seed) for m, s, seed in product(RELAXATIONS, low_high, (1, 2))]
    cells += [Cell(model, "deterministic", s, variant=v) for v, s in product(("full", "refit+lora"), low_high)]
    matter = ("hard-concrete", "grasprune", "sensitivity")
    cells += [Cell(model, m, s, STEPS_100K) for m, s in product(matter, low_high)]
    cells += [Cell(model, "deterministic", 0.2, STEPS_100K, variant="paper")]
    cells += [Cell(model, "sensitivity", s, seed=seed) for s, seed in product(low_high, (1, 2))]
    cells += [Cell(model, "sensitivity", s, variant=v) for v, s in product(("refit", "lora"), low_high)]
    cells += [Cell(model, "deterministic", 0.35), Cell(model, "sensitivity", 0.35)]
    cells += [Cell(model, "deterministic", 0.35, STEPS_100K)]
    cells += [Cell(model, m, 0.5, STEPS_100K, seed=seed) for m, seed in product(("deterministic", "grasprune"), (1, 2))]
    cells += [Cell(model, "deterministic", s, STEPS_400K) for s in low_high]
    cells += [Cell(model, "sensitivity", s, STEPS_100K, variant="lora") for s in (0.5, 0.2)]
    return _both_ways(cells) + _recovered(model)


def _recovered(model: str) -> list[Cell]:
    """What weights are trained from, by another seed, and from scored sets for as long as learning would have taken."""
    sides = product((0.5, 0.2), ("sensitivity", "deterministic"))
    cells = [Cell(model, m, s, seed=1, variant="lora") for s, m in sides]
    cells += [Cell(model, "sensitivity", 0.5, seed=1, variant="lora+twice")]
    cells += [Cell(model, "sensitivity", s, STEPS_100K, variant="lora+twice") for s in (0.5, 0.2)]
    variants = product((1, 2), ("", "lora+twice"))
    return cells + [Cell(model, "sensitivity", 0.5, STEPS_100K, seed=n, variant=v) for n, v in variants]


def _both_ways(cells: list[Cell]) -> list[Cell]:
    """Of cells whose budget takes so much that sensitivity is measured again, what each way tells: all that was there
    before is compared with `once`, and the main rows are there in both."""
    found = []
    for cell in cells:
        again = _measures_again(cell)
        if not again or _is_main(cell):
            found.append(cell)
        if again and not _is_later(cell):
            found.append(replace(cell, variant="+".join(("once", *cell.parts))))
    return found


def _measures_again(cell: Cell) -> bool:
    return Config(cell.model, **cell.settings).resolved().remeasured_rows(cell.sparsity) > 0


def _is_main(cell: Cell) -> bool:
    if cell.method == "hard-concrete":
        return cell.steps == STEPS_25K
    if cell.variant == "lora":
        return cell.method in ("deterministic", "sensitivity")
    if cell.variant:
        return False
    return cell.method in ("deterministic", "grasprune", "sensitivity")


def _is_later(cell: Cell) -> bool:
    """What was not there when sensitivity was measured once only."""
    if cell.variant == "refit+lora" or (cell.method, cell.variant) == ("sensitivity", "lora"):
        return True
    seeds = cell.method == "grasprune" and cell.seed > 0
    return cell.steps == STEPS_100K and (cell.method == "sensitivity" or cell.sparsity == 0.35 or seeds)


def _main_rows(model: str) -> list[Cell]:
    methods = ("deterministic", "sensitivity", "flap", "wanda-sp", "hard-concrete", "grasprune")
    return _both_ways([Cell(model, m, s) for s, m in product((0.2, 0.5), methods)])


def _mixture(model: str) -> list[Cell]:
    shares = (0.2, 0.4, 0.6)
    cells = [Cell(model, m, s) for s, m in product(shares, ("deterministic", "sensitivity", *OF_EXPERTS))]
    cells += [Cell(model, "deterministic", s, variant=v) for v, s in product(("per-layer", "per-expert"), shares)]
    cells += [Cell(model, "deterministic", 0.4, variant=v) for v in ("uniform", "padded")]
    cells += [Cell(model, m, 0.4) for m in ("magnitude", "wanda-sp", "grasprune")]
    return [cell for cell in _both_ways(cells) if not _measures_again(cell)]


def _mixture_again(model: str) -> list[Cell]:
    return _both_ways([Cell(model, m, 0.4) for m in ("deterministic", "sensitivity")])


def _curve(method: str, sparsity: float) -> bool:
    return method in LEARNED and sparsity == 0.2
