"""Everything a run decides, in one dataclass: the source of `--help`, of RUN/config.yaml and of the docs.

`Config` is what a user sets; how the gates are learned, its recipe, is in recipes.py.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import ConfigDict

from secateur.files import InputError
from secateur.guard import read_guards
from secateur.policy import policy_of
from secateur.recipes import EQUAL_WIDTHS, ONE_SHOT, WHOLE_EXPERTS, Method, Recipe, recipe_of, remeasured_at
from secateur.selection import AttentionUnit, Depth, Kind, check_selection, kept_words
from secateur.wanted import read_sweep, what_is_asked

Log = Literal["tensorboard", "wandb"]
Scope = Literal["model", "kind", "layer", "expert"]

_SAID = tyro.conf.arg(metavar="ragged|uniform|padded|aligned:N|tp:K")
Shape = Annotated[str, _SAID]
"""Words that policy.py reads."""
AnyShape = Annotated[str | None, _SAID]
"""The same where the option may be left out."""
Words = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KIND=VALUE")]
"""Words that wanted.py reads."""


IN_MEMORY = "in memory: "
"""What `model` begins with where Python code gave the model itself: `in memory: NAME, weights HASH`."""


def name_in_memory(model: str) -> str:
    """NAME of a `model` that was given in memory; any other as it is."""
    return model.removeprefix(IN_MEMORY).rpartition(", weights ")[0] if model.startswith(IN_MEMORY) else model


@dataclass
class Config:
    """Settings of a pruning run. RUN/config.yaml holds all of them, as resolved."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    model: tyro.conf.Positional[str]
    """Local folder, hub id, or GGUF file of a causal language model."""
    sparsity: float | None = None
    """Share of the parameters that belong to units (heads, channels; see `--units`) to remove, between 0 and 1."""
    budget: Words = ()
    """What may be left, at most: a share of what the unpruned model has (`params=0.7`), or a figure (`params=90M`,
    `bytes=200MB`). Kinds: `units`, the parameters in units (units=0.7 is --sparsity 0.3); `params`, those that a token
    meets: of a mixture's experts as many as it is routed to; `total-params`, all that are stored, tied ones once;
    `flops` a token, without attention over the context; `kv`, bytes of KV cache a token; `bytes` of the weights, in the
    checkpoint's dtype; `latency`, the time from a token to the next, and `prefill-latency`, to the first one
    (`latency=12ms`, `latency@8=0.7` for 8 at a time), as --latency-table predicts it. Say it several times for several
    budgets (`--budget params=0.7 --budget kv=0.5`): all are met, from below, and nothing that was removed would still
    fit."""
    latency_table: Path | None = None
    """Times of the model's sublayers, as `secateur bench MODEL --table FILE` measures them; RUN keeps a copy."""
    sweep: str | None = None
    """Learn several sizes in one run, in the place of `--sparsity`: `0.1:0.6` (0.1 apart), `0.1:0.6:0.05`, `0.2,0.35`,
    or shares to keep, `params=0.9:0.5`. Each goes on from the next larger one and lies in it, for a part of the steps,
    and is a run of its own in RUN/sizes; `secateur sizes` compares them."""
    pick: str | None = None
    """Of a sweep, export the smallest size that is good enough: `loss<=1.05` (times the unpruned model's on held-out
    text), `perplexity<=1.3`; or the best that is small enough: `params<=0.7`, `flops<=0.7`; or both, with commas."""
    method: Method | Literal["auto"] = "auto"
    """How the units to keep are found. `auto`: `deterministic`, the paper's method; with `--recover`, `sensitivity`
    (but for `--gates`, `--guard`, `--sweep` and the paper's recipe): weights gain more than gates. The others are
    baselines over the same units, budget and text. Gates are learned otherwise with `hard-concrete` (noise),
    `hard-concrete-deterministic` (none), `hard-concrete-expanded` (gates above 1) and `grasprune` (a hard mask at every
    step). Units are scored once, and nothing is learned, with `sensitivity` (what learning starts from), `magnitude`,
    `wanda-sp`, `flap`, `taylor-element` and `taylor-vector`; of mixtures, experts with `frequency` and `reap`, their
    channels with `camera`."""
    units: Annotated[tuple[Kind, ...], tyro.conf.arg(aliases=("--only",))] = ()
    """What to prune: `heads` (or what `--attention-unit` says), `channels` of MLPs, `expert_channels`,
    `shared_channels` of shared experts; or `attention`, and `mlp` for all channels that there are. Default: the
    experts' channels of a mixture, all of any other model."""
    attention_unit: AttentionUnit | None = None
    """What goes at once where query heads share keys and values (GQA): `kv-groups`, a KV head and its query heads,
    which shrinks the KV cache too; `heads`, single query heads, of each KV head of a layer as many; `nested`, both: a
    layer keeps some KV heads, and as many query heads of each. Where all heads share one KV head or a latent there are
    `heads` only; where every head has its own all three are the same. Default: `kv-groups`, else `heads`. To leave
    attention whole: `--only mlp`."""
    depth: Depth = "off"
    """Remove whole attention and MLP sublayers, by gates of their own, learned as those of units are: `joint`, beside
    the units' gates, so that width and depth compete for one budget; `alone`, whole sublayers only, all widths stay. A
    mixture's experts have none: their router could not go. Default: sublayers go with their last unit."""
    keep: tuple[str, ...] = ()
    """Layers, or sublayers, that stay whole, with commas or spaces between: `layers.0,layers.-1` (from the end),
    `layers.3.mlp`, `layers.3.attention`. `--sparsity` is a share of all units still, and goes from the others."""
    gates: Path | None = None
    """Begin with gates of another run (its gates.safetensors), maybe of a sibling: a base model, a fine-tune. What is
    kept, at any size, follows from them; `--steps` tunes their values, and 0 takes them as they are."""
    data: str = "self"
    """Calibration text: a file or folder (.txt, .jsonl, .parquet; .gz, .zst), a dataset on the hub, or `self` for text
    that the model itself writes."""
    guard: tuple[str, ...] = ()
    """Other texts (code, another language, chats) whose loss may rise by so many nats a token only, e.g. `code/:0.1`:
    each step learns from a batch of them, too, as much as their bounds need, and recovery takes them in turns. Costs as
    much again for each. What could not be held is said at the end."""
    out: Path | None = None
    """Folder of the run; by default a new folder under runs/."""
    steps: int = 1000
    """Learning steps (with `--gates` also 0). Steps × batch size × sequence length is the number of tokens spent."""
    seq_len: int = 2048
    """Tokens a sequence."""
    batch_size: int = 4
    """Sequences a step."""
    micro_batch_size: int | None = None
    """Sequences that go through the model at once in learning and recovery: less memory, the same gates but for
    rounding. Several ranks take such micro-batches in turns, and with equal ones the gates are the same on any number
    of ranks. Default: the batch, or each rank's share of it."""
    seed: int = 0
    """Seed of the order of the data, and of the noise of methods that have any."""
    recipe: Literal["auto", "paper"] = "auto"
    """`auto` fits step sizes and schedules to the number of steps; `paper` is the released recipe to the letter."""
    lr: float | None = None
    """Step size of the gates (default: the recipe's)."""
    kd_weight: float | None = None
    """Weight η of the distillation term (default: the recipe's)."""
    kd_temperature: float | None = None
    """Temperature τ of the distillation term (default: the recipe's)."""
    binarise: bool = True
    """Press undecided gates to a side: the term λ₃ of the deterministic method, which the others do not have."""
    remeasure: bool = True
    """Measure sensitivity again where a quarter or more of the units' parameters goes: at a fifth, and at each further
    tenth, on the model that is left. Each time takes up to 24 batches, a fifth of the first one's from 120 steps on.
    Further sizes of a sweep and `--gates` do without."""
    per: Scope | None = None
    """One budget over the whole model, one for each kind of unit (of `--sparsity` only), or equal widths in all layers
    (`layer`), and in all experts of a layer, too (`expert`, and `layer` with `--budget`). Default: `expert` when the
    shape is uniform, `layer` for `magnitude`, `wanda-sp`, `taylor-*` and the methods for experts, whose papers do so,
    `kind` with the paper's recipe of gates held by multipliers, else `model`."""
    shape: Shape = "ragged"
    """Widths of the export: `ragged` lets every layer have its own, `uniform` gives a stock configuration, no code.
    The experts of a layer are stored equally wide in both; `padded` lets each keep what it learned to keep, and fills
    them up to the widest with zeros. `aligned:N` is ragged in multiples of N channels, which kernels and the groups of
    quantisation want (32, 64, 128; GGUF's q8_0: 32); `tp:K` lets every layer divide over K ranks of tensor parallelism.
    They combine: `tp:2,aligned:64`, `uniform,aligned:64`. The budget is the same; units move between layers."""
    refit: bool = False
    """Solve the output projections anew after pruning, in closed form, so that what is kept reproduces what the dense
    model computes; nothing changes unless it lowers the held-out loss."""
    refit_rounds: int = 1
    """Times to solve for them; between two rounds, gate values are learned again in a tenth of the steps."""
    refit_tokens: int | None = None
    """Calibration tokens that a round of refit is solved on (default: an eighth of them)."""
    recover: Literal["lora", "full"] | None = None
    """Train the weights that are left, after pruning, with the dense model as teacher: low-rank updates of all linear
    maps, merged into them (`lora`), or all weights of the layers (`full`)."""
    recover_steps: int | None = None
    """Steps of recovery, on the calibration tokens once more, or several times (default: as many as `steps`, and twice
    as many where no gates were learned)."""
    recover_lr: float | None = None
    """Peak step size of recovery (default: 3e-3 for `lora`, 3e-4 for `full`)."""
    recover_rank: int = 16
    """Rank of the updates that `lora` learns."""
    text_column: str = "text"
    """Column of JSONL, Parquet or hub data that holds the text."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin every sequence with BOS; `auto`: if the model's loss is clearly lower with it, as Gemma's is."""
    epochs: int = 1
    """How many times each calibration token may be used, for small data."""
    held_out_tokens: int = 8192
    """Tokens of held-out documents on which losses before and after are measured."""
    eval_data: str | None = None
    """Text for the perplexities of the final table (default: the held-out part of the data)."""
    eval_join: Literal["raw", "lines"] = "raw"
    """What `eval_data` is joined from: `raw`, text files as they are; `lines`, every line a row, rows joined by a blank
    line: the papers' WikiText-2 protocol for the raw file. Rows of other files are joined by a blank line always."""
    eval_windows: int = 20
    """Windows of `eval_data`, non-overlapping, from its start; 0 takes all of it."""
    eval_length: int = 512
    """Tokens a window of `eval_data`."""
    tasks: tuple[str, ...] = ()
    """Zero-shot tasks for the final table: names of lm-eval's tasks, or files of items (.jsonl; .gz, .zst)."""
    task_limit: int | None = None
    """Items a task, a random sample by `seed` (default: all)."""
    device: str = "auto"
    """Device to learn on: `cuda`, `cuda:1`, `mps`, `cpu`; `auto` takes the first accelerator."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the frozen weights while learning; `auto`: the checkpoint's on an accelerator, float32 on CPU. Gates are
    float32 always; the export keeps the checkpoint's dtype."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the passes that gates or weights are learned by: `bfloat16` by autocast, or that of the weights'
    own dtype (`float32`). `auto` is bfloat16 where the processor multiplies in it. What is planned, verified and
    evaluated is always measured in the weights' own dtype."""
    teacher: Literal["live", "cache"] = "live"
    """`cache`: keep what the unpruned model says of each batch in RUN/teacher, cut down to its likeliest words and the
    mass of all others, and read it from there when the batch comes again: in a resumed run, a sweep, further epochs.
    What that costs in exactness is said at the end."""
    teacher_top_k: int = 64
    """Words a position that `--teacher cache` keeps; each takes 8 bytes."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """Leave the decoder layers' weights in the processor's memory, or on disk (in the model's own files, if these hold
    them as they are used), and bring each to the device when it is needed: for models that do not fit there. Implies
    --gradient-checkpointing. Planning, verification and evaluation leave the layers there, too, of both models; --refit
    and --recover change weights, which takes both in memory."""
    gradient_checkpointing: bool = False
    """In learning and recovery, compute layers once more in the backward pass instead of keeping what they computed:
    less memory, more time, the same gates."""
    shard: bool = False
    """While gates are learned on several ranks, spread the weights of the layers over them (FSDP2), for models that one
    device cannot hold. Rank 0 has the whole model in memory, where all other stages then run, on the CPU."""
    max_shard_size: str = "5GB"
    """Largest safetensors file of the export."""
    checkpoint_every: int = 50
    """Steps between checkpoints, from which a run resumes that was interrupted or killed; the last two and the best are
    kept until it is done. Ctrl-C and SIGTERM save one more."""
    measure_every: int = 0
    """Every so many steps, measure the held-out loss with the gates as trained and as deployed, for metrics.jsonl; 0:
    never. Changes nothing else."""
    log: tuple[Log, ...] = ()
    """Curves to watch beside metrics.jsonl, under the same names: `tensorboard` (RUN/tensorboard), `wandb` (Weights &
    Biases, RUN/wandb; WANDB_MODE=offline sends nothing), or both."""
    trust_remote_code: bool = False
    """Run modelling code that comes with the checkpoint."""
    learning: tyro.conf.Suppress[Recipe | None] = None
    """The recipe as resolved for these settings; written to config.yaml, which repeats it exactly."""

    def __post_init__(self) -> None:
        """Settles the method. Raises InputError for settings that are out of range or contradict each other."""
        if self.method == "auto":
            learned = not self.recover or self.gates or self.guard or self.sweep or self.recipe == "paper"
            self.method = "deterministic" if learned else "sensitivity"
        timed = self.latency_table is not None
        self.sparsity, self.budget = what_is_asked(self.sparsity, self.budget, timed, self.sweep)
        if self.per == "kind" and not self.by_sparsity:
            raise InputError("--per kind asks for the same share of every kind, so it needs --sparsity; leave it out")
        if self.method == "flap" and (said := [w for w in self.budget if w.startswith(("params", "total", "bytes"))]):
            raise InputError(f"--method flap adds biases, which --budget {said[0]} does not count; use flops or kv")
        counts = ("batch_size", "micro_batch_size", "epochs", "checkpoint_every", "refit_rounds", "recover_steps",
                  "recover_rank", "teacher_top_k")  # fmt: skip
        for name in (*(() if self.gates and self.steps == 0 else ("steps",)), *counts):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.micro_batch_size is not None:
            self.rows_a_pass(1)
        for name in ("seq_len", "eval_length"):
            if getattr(self, name) < 2:
                raise InputError(f"--{name.replace('_', '-')} must be at least 2 tokens, not {getattr(self, name)}")
        if self.eval_windows < 0:
            raise InputError(f"--eval-windows must be at least 1, or 0 for the whole text, not {self.eval_windows}")
        if self.task_limit is not None and self.task_limit < 1:
            raise InputError(f"--task-limit must be at least 1 item, not {self.task_limit}")
        if self.held_out_tokens < self.seq_len:
            self.held_out_tokens = self.seq_len
        for name in ("lr", "kd_temperature", "recover_lr"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise InputError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")
        if self.kd_weight is not None and self.kd_weight < 0:
            raise InputError(f"--kd-weight must be at least 0, not {self.kd_weight}")
        if not re.fullmatch(r"\d+(\.\d+)? *([KMGT]i?B|B)?", self.max_shard_size, flags=re.IGNORECASE):
            raise InputError(f"--max-shard-size is a size such as 5GB or 500MB, not {self.max_shard_size!r}")
        self.gradient_checkpointing = self.gradient_checkpointing or self.offload != "none"  # autograd keeps weights
        for option, wanted in (("--offload", self.offload != "none"), ("--teacher cache", self.teacher == "cache")):
            if self.shard and wanted:
                raise InputError(f"--shard has all ranks compute the same layers at once; leave it or {option} out")
        changes = [name for name in ("refit", "recover") if getattr(self, name)]
        if changes and self.offload != "none":
            raise InputError(
                f"--{changes[0]} changes weights, which takes the whole model in memory, so --offload contradicts it; "
                f"leave it out here, and run `secateur {changes[0]} RUN` where there is memory"
            )
        policy = policy_of(self.shape)
        self.shape = str(policy)
        self.keep = kept_words(self.keep)
        self.guard = tuple(map(str, read_guards(self.guard)))
        check_selection(self, self.method in ONE_SHOT)
        if policy.uniform and self.per not in (None, "layer", "expert"):
            raise InputError(
                f"--shape {policy} needs equal widths, so --per {self.per} contradicts it; use --per expert"
            )
        if policy.uniform and self.method == "flap":
            raise InputError(f"--method flap adds biases, which --shape {policy} has no place for; use --shape ragged")
        if self.refit_tokens is not None and self.refit_tokens < self.seq_len:
            raise InputError(f"--refit-tokens must be at least one sequence of {self.seq_len}, not {self.refit_tokens}")
        if self.measure_every < 0:
            raise InputError(f"--measure-every must be at least 0, not {self.measure_every}")
        if not (self.remeasure or self.measures_sensitivity):
            of = "--recipe paper" if self.recipe == "paper" else f"--method {self.method}"
            raise InputError(f"{of} measures no sensitivity, so --no-remeasure has nothing to leave out")
        self._check_learns_nothing()

    def _check_learns_nothing(self) -> None:
        """Raises InputError for settings of learning where nothing is learned."""
        if self.method not in ONE_SHOT:
            return
        said = {
            "--no-binarise": not self.binarise,
            "--offload": self.offload != "none",
            "--teacher cache": self.teacher == "cache",
        }
        of_recovery = () if self.recover else ("kd_weight", "kd_temperature", "guard")
        for name in ("lr", "measure_every", *of_recovery):
            said[f"--{name.replace('_', '-')}"] = bool(getattr(self, name))
        if option := next((option for option, is_said in said.items() if is_said), None):
            raise InputError(
                f"{option} is a setting of learning, and --method {self.method} learns nothing; leave it out, or say "
                "--method deterministic"
            )
        if self.method == "sensitivity" and self.recipe == "paper":
            raise InputError("--recipe paper measures no sensitivity, so --method sensitivity contradicts it")

    @property
    def by_sparsity(self) -> bool:
        """Whether a share of the units is asked for, which may be that of each kind."""
        return self.sparsity is not None or (self.sweep is not None and "=" not in self.sweep)

    def rows_a_pass(self, ranks: int) -> int | None:
        """Sequences that go through the model at once on each of so many ranks; None: all of the batch.

        Raises InputError where batches do not come out even.
        """
        batch, micro = self.batch_size, self.micro_batch_size
        if micro is None:
            if batch % ranks:
                fewer = max(n for n in range(1, ranks) if batch % n == 0)
                raise InputError(
                    f"--batch-size {batch} cannot be shared evenly by {ranks} ranks; say --batch-size "
                    f"{-(-batch // ranks) * ranks}, or start {fewer}"
                )
            return batch // ranks if ranks > 1 else None
        if batch % (micro * ranks):
            fitting = [str(n) for n in range(1, batch + 1) if batch % (n * ranks) == 0]
            instead = f"--micro-batch-size {' or '.join(fitting)}" if fitting else "fewer ranks"
            on = f" on {ranks} ranks" if ranks > 1 else ""
            raise InputError(
                f"--batch-size {batch} does not come out even in parts of --micro-batch-size {micro}{on}; take "
                f"{instead}, or --batch-size {-(-batch // (micro * ranks)) * micro * ranks}"
            )
        return micro

    @property
    def measures_sensitivity(self) -> bool:
        """Whether gates start from a sensitivity, or units are scored by it."""
        return self.recipe != "paper" and (self.method not in ONE_SHOT or self.method == "sensitivity")

    @property
    def scored_rows(self) -> int:
        """Calibration sequences on which units are scored or their sensitivity is measured; needs resolved settings."""
        assert self.learning is not None
        if self.method in ONE_SHOT and self.method != "sensitivity":
            return 0 if self.method == "magnitude" else self.steps * self.batch_size
        return self.learning.sensitivity_batches * self.batch_size

    @property
    def recovery_steps(self) -> int:
        """Steps of recovery. Where no gates were learned, they take the time that learning would have taken, too."""
        return self.recover_steps or self.steps * (2 if self.method in ONE_SHOT else 1)

    @property
    def first_removed(self) -> float | None:
        """The share of the units' parameters that goes first: `--sparsity`, or the largest model of a `--sweep`. None
        where budgets say it."""
        if self.sweep is None or "=" in self.sweep:
            return self.sparsity
        return float(read_sweep(self.sweep)[0])

    def remeasured_rows(self, removed: float) -> int:
        """Calibration sequences on which sensitivity is measured again where such a share goes; needs resolved
        settings."""
        assert self.learning is not None
        if self.gates is not None or not self.measures_sensitivity:
            return 0
        return len(remeasured_at(removed)) * self.learning.remeasured_batches * self.batch_size

    def resolved(self) -> "Config":
        """The same settings with every default filled in, the recipe included."""
        recipe = self.learning or recipe_of(self.method, self.recipe, max(1, self.steps), self.binarise, self.remeasure)
        recipe = replace(
            recipe,
            lr=recipe.lr if self.lr is None else self.lr,
            kd_weight=recipe.kd_weight if self.kd_weight is None else self.kd_weight,
            kd_temperature=recipe.kd_temperature if self.kd_temperature is None else self.kd_temperature,
        )
        per: Scope = "model"
        if policy_of(self.shape).uniform:
            per = "expert"
        elif self.method in EQUAL_WIDTHS and self.depth == "off" and not (self.budget and self.method in WHOLE_EXPERTS):
            per = "layer"
        elif recipe.name == "paper" and self.method not in (*ONE_SHOT, "grasprune") and self.by_sparsity:
            per = "kind"
        return replace(self, per=self.per or per, learning=recipe)


LEARNING_FIELDS = ("method", "recipe", "steps", "lr", "kd_weight", "kd_temperature", "binarise", "remeasure")
"""Settings that the recipe follows from: changing one of them over a config file resolves the recipe anew."""
