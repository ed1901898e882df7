"""What the files of a run must hold, checked as they are read: a broken one is named, not stumbled over.

Only what the stages and the report's page rely on is listed; more is ignored.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from secateur.files import InputError, read_json
from secateur.untrusted import MAX_JSON, parse_json, read_bytes


class Figures(TypedDict):
    """One model in eval.json."""

    parameters: int
    block_parameters: int
    flops_per_token: int
    kv_bytes_per_token: int
    disk_bytes: int
    perplexity: float
    loss: float
    windows: int
    length: int
    tokens: int
    loss_stderr: NotRequired[float | None]


class Held(TypedDict):
    """A `--budget`, and what the unpruned and the planned model have of it."""

    budget: str
    counts: str
    bound: Annotated[int, Field(gt=0)]
    dense: int
    pruned: int
    predicted_for: NotRequired[str]


class Rounding(TypedDict):
    """What it took to meet the budget."""

    allowed: float
    open_gates: float
    kept: float
    held_out_learned: float | None
    held_out_planned: float | None
    budgets: NotRequired[list[Held]]


class Fixing(TypedDict):
    """When the kept set was fixed."""

    step: int
    kept_before: float
    held_out_before: float
    held_out_after: float


class Task(TypedDict):
    """One zero-shot task."""

    dense: dict[str, float | None]
    pruned: dict[str, float | None]
    difference: dict[str, float | None]
    items: int
    of: int
    cut: int
    joined: int
    versions: dict[str, Any]


class Shared(TypedDict):
    """How much of the evaluation text is in the calibration text, too."""

    words: int
    covered: int
    runs: int


class Hit(TypedDict):
    """How many items of a task share words with the calibration text."""

    items: int
    hit: int


class Overlap(TypedDict):
    """Text that calibration and evaluation share."""

    run_words: int
    text: Shared
    tasks: dict[str, Hit]


class Sample(TypedDict):
    """What both models wrote after the same words."""

    prompt: str
    text: str
    dense: str
    pruned: str


class Evaluation(TypedDict):
    """eval.json."""

    text: str
    join: Literal["packed", "raw", "lines"]
    dense: Figures
    pruned: Figures
    rounding: Rounding
    fixing: Fixing | None
    seconds: dict[str, float]
    updates: NotRequired[list[str]]
    tasks: NotRequired[dict[str, Task]]
    overlap: NotRequired[Overlap]
    loss_change_stderr: NotRequired[float | None]
    samples: NotRequired[list[Sample]]
    versions: NotRequired[dict[str, str]]


class Comparison(TypedDict):
    """Logits of the gated and of the exported model."""

    dtype: str
    max_difference: float
    mean_difference: float
    allowed: float
    same_top_token: float
    tokens: int
    passed: bool


class Verification(TypedDict):
    """verify.json."""

    passed: bool
    comparisons: list[Comparison]


class Agreement(TypedDict):
    """One prompt in two runtimes."""

    equal: bool
    same: int
    difference: float
    margin: float


class Equivalence(TypedDict):
    """verify-RUNTIME.json."""

    runtime: str
    reference: str
    passed: bool
    tolerance: float
    new_tokens: int
    pruned: list[Agreement]
    dense: list[Agreement]


class Plan(TypedDict):
    """plan.json."""

    shape: str
    rounding: Rounding
    kept: dict[str, list[Annotated[int, Field(gt=-(2**53), lt=2**53)]]]
    scales: dict[str, list[float]]


class Sweep(TypedDict):
    """sweep.json."""

    number: str
    done: bool


class Exported(TypedDict, total=False):
    """What config.json of an export says of it."""

    updates: list[str]
    recovery_steps: list[int]
    plan: str
    """Digest of the plan that it was cut by."""


class ExportedConfig(TypedDict, total=False):
    """config.json of an export."""

    secateur: Exported


class Refit(TypedDict):
    """One round of refit.json."""

    ridge: float | None
    held_out_before: float
    held_out_after: float
    tokens: int


class Spread(TypedDict):
    """A figure over the rounds of a bench."""

    median: float
    low: float
    high: float


class Ideal(TypedDict):
    """What a speed-up would be on paper."""

    speedup: float
    by: str


class Eaten(TypedDict):
    """What eats the difference between measured and ideal."""

    time: float
    kept: float
    by: dict[str, float]


class Timing(TypedDict):
    """One metric at one batch size."""

    metric: str
    batch_size: int
    unit: str
    dense: Spread
    pruned: Spread
    speedup: Spread
    ideal: Ideal
    eaten: NotRequired[Eaten]


class Settings(TypedDict):
    """How it was timed."""

    prompt_tokens: int
    new_tokens: int
    rounds: int


class Timed(TypedDict):
    """One model in bench-RUNTIME.json."""

    versions: dict[str, str]
    implementation: str
    peak_bytes: int
    weight_bytes: int
    kv_tokens: int | None
    kv_tokens_by: str
    kv_space_bytes: float
    parameters: int
    odd_widths: dict[str, dict[str, int]]
    widths: int


class Bench(TypedDict):
    """bench-RUNTIME.json."""

    runtime: str
    dtype: str
    settings: Settings
    machine: dict[str, Any]
    dense: Timed
    pruned: Timed
    timings: list[Timing]


class Step(TypedDict):
    """A line of metrics.jsonl."""

    step: int
    loss: float
    ce: float
    kl: float
    kept: float
    score: float
    target: NotRequired[float]
    mu: float
    lr: float
    lambda1: list[float]
    lambda2: list[float]
    lambda3: list[float]
    budgets: NotRequired[dict[str, float]]
    guard_rises: NotRequired[list[float]]
    guard_weights: NotRequired[list[float]]
    held_out_trained: NotRequired[float]
    held_out_deployed: NotRequired[float]


class RecoveryStep(TypedDict):
    """A line of recover.jsonl."""

    step: int
    loss: float
    ce: float
    kl: float
    lr: float


def checked(path: Path, form: Any, made_by: str) -> Any:
    """The content of a JSON file that has the form of one of the dictionaries above. Raises InputError if not."""
    value = read_json(path, made_by)
    try:
        TypeAdapter(form).validate_python(value, strict=True)
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error)}; run `{made_by}` again") from None
    return value


def verification(path: Path) -> dict[str, Any] | None:
    """RUN/verify.json; None where there is none."""
    return checked(path, Verification, f"secateur verify {path.parent}") if path.exists() else None


def evaluation(path: Path) -> dict[str, Any] | None:
    """RUN/eval.json; None where there is none."""
    return checked(path, Evaluation, f"secateur eval {path.parent}") if path.exists() else None


def lines(path: Path, form: Any) -> tuple[list[Any], list[str]]:
    """The lines of a JSON Lines file that have the form, and what is wrong with others: at most one complaint."""
    try:
        text = read_bytes(path, MAX_JSON).decode("utf-8")
    except UnicodeDecodeError as error:
        return [], [f"{path} is not UTF-8 text ({error.reason})"]
    except (OSError, ValueError) as error:
        return [], [f"{path} cannot be read ({error})"]
    adapter, found, wrong = TypeAdapter(form), [], []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = parse_json(line)
            adapter.validate_python(value, strict=True)
            found.append(value)
        except ValidationError as error:
            wrong.append((number, first_fault(error)))
        except ValueError as error:
            wrong.append((number, f"not readable JSON ({error})"))
    if not wrong:
        return found, []
    number, reason = wrong[0]
    count = f"line {number} is" if len(wrong) == 1 else f"{len(wrong):,} lines, the first of them {number}, are"
    return found, [f"{path}: {count} left out: {reason}"]


def first_fault(error: ValidationError) -> str:
    """Where a value has not the form that it must have, and why."""
    one = error.errors()[0]
    return f"{'.'.join(str(part) for part in one['loc']) or 'content'}: {one['msg'].lower()}"
