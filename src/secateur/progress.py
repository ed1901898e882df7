"""What a person sees while a run works: a line a stage, a bar with loss, sparsity, speed and time left."""

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateur.config import Config
from secateur.interrupts import check
from secateur.listeners import Progress as Listener
from secateur.optimise import Step
from secateur.recipes import ONE_SHOT
from secateur.recover import RecoveryStep

TITLES = {
    "load": "loading the model",
    "data": "reading calibration text",
    "learn": "learning gates",
    "plan": "rounding to the budget",
    "export": "writing the pruned model",
    "verify": "comparing gated and exported logits",
    "gguf": "writing the GGUF file",
    "runtime": "comparing greedy text of runtimes, pruned and dense",
    "refit": "refitting output projections",
    "recover": "training what is left",
    "eval": "measuring perplexity",
    "tasks": "reading zero-shot tasks",
    "score": "answering zero-shot tasks, dense and pruned",
    "report": "drawing the report",
}


class Screen(Listener):
    """Draws the progress of a run's stages on a terminal; elsewhere it prints a line a stage."""

    def __init__(self, console: Console, config: Config) -> None:
        self.console, self.config = console, config
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"), TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self.task: TaskID | None = None

    def __enter__(self) -> "Screen":
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def stage(self, name: str) -> None:
        """A stage begins."""
        check()
        self._end()
        scored = name == "learn" and self.config.method in ONE_SHOT
        title = f"scoring units by {self.config.method}" if scored else TITLES[name]
        self.bars.console.print(f"[bold]{name}[/bold]  {title}", soft_wrap=True)

    def step(self, step: Step) -> None:
        """A learning step is done."""
        if step.target is None:
            held = ", ".join(f"{name} {share:.1%}" for name, share in (step.budgets or {}).items())
            removed = f"removed {1 - step.kept:.1%} (of what the budgets allow: {held})"
        else:
            removed = f"removed {1 - step.kept:.1%} (score {1 - step.score:.1%}, target {1 - step.target:.1%})"
        self._train("learn", step, self.config.steps, removed)

    def size(self, name: str) -> None:
        """Another size of a sweep begins."""
        self.bars.console.print(f"size {name}", markup=False)

    def recovered(self, step: RecoveryStep) -> None:
        """A step of recovery is done."""
        self._train("recover", step, self.config.recovery_steps, "")

    def _train(self, name: str, step: Step | RecoveryStep, steps: int, more: str) -> None:
        check()
        if self.task is None:
            self.task = self.bars.add_task(name, total=steps, figures="")
        tokens = self.config.batch_size * self.config.seq_len
        speed = self.bars.tasks[-1].speed
        figures = f"loss {step.ce:.3f} kl {step.kl:.3f}  {more}" + (f"  {speed * tokens:,.0f} tok/s" if speed else "")
        self.bars.update(self.task, completed=step.step, figures=figures)
        if not self.console.is_terminal and (step.step % 10 == 0 or step.step == steps):
            self.console.print(f"  step {step.step}/{steps}  {figures}")

    def measured(self, rows: int, of: int) -> None:
        """The units have been scored on so many rows, or the sensitivity of their gates has been measured."""
        check()
        if self.task is None:
            what = f"rows, {self.config.method if self.config.method in ONE_SHOT else 'sensitivity'} of each unit"
            self.task = self.bars.add_task("measure", total=of, figures=what)
        self.bars.update(self.task, completed=rows)
        if rows == of:
            self._end()

    def written(self, tokens: int) -> None:
        """The model wrote so many more tokens of text for itself."""
        check()
        if self.task is None:
            c = self.config
            wanted = c.steps * c.batch_size * c.seq_len // c.epochs + c.held_out_tokens
            self.task = self.bars.add_task("write", total=wanted, figures="tokens")
        self.bars.advance(self.task, tokens)

    def scored(self, rows: int, of: int) -> None:
        """So many more rows of the zero-shot tasks went through a model."""
        check()
        if self.task is None:
            self.task = self.bars.add_task("score", total=of, figures="rows")
        self.bars.advance(self.task, rows)

    def told(self, line: str) -> None:
        """Something that was found out on the way."""
        self.bars.console.print(line, markup=False, soft_wrap=True)

    def warned(self, warning: str) -> None:
        """Something that is possible, and maybe not meant."""
        self.bars.console.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)

    def _end(self) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None
