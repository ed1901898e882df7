"""What a person reads of a run: the table of figures, dense against pruned, and the model card of the export."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from secateur.config import IN_MEMORY, Config, name_in_memory
from secateur.plan import COSTLY, Rounding
from secateur.policy import policy_of
from secateur.recipes import ONE_SHOT
from secateur.run import Run
from secateur.text import HELD_OUT, READERS, file_type

PAPER = "Deterministic Differentiable Structured Pruning for Large Language Models (arXiv 2603.08065)"

Row = tuple[str, str, str, str]


def human(count: float, unit: str = "") -> str:
    """1,234,567 → `1.23 M`; with a unit such as B for bytes."""
    for size, prefix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f} {prefix}{unit}"
    return f"{count:.0f} {unit}".strip()


def summary(results: Mapping[str, Any]) -> list[Row]:
    """Rows of (figure, dense, pruned, change) from the content of eval.json."""
    dense, pruned = results["dense"], results["pruned"]
    figures = (
        ("parameters", "parameters", ""),
        ("active parameters a token", "active_parameters", ""),
        ("parameters in units", "block_parameters", ""),
        ("FLOPs a token", "flops_per_token", "FLOP"),
        ("KV cache a token", "kv_bytes_per_token", "B"),
        ("weights on disk", "disk_bytes", "B"),
    )
    rows: list[Row] = [
        ("perplexity", f"{dense['perplexity']:.2f}", f"{pruned['perplexity']:.2f}",
         f"{pruned['perplexity'] / dense['perplexity']:.2f} ×")
    ]  # fmt: skip
    for label, key, unit in figures:
        if key == "active_parameters" and dense.get(key, dense["parameters"]) == dense["parameters"]:
            continue  # not a mixture of experts
        change = "" if pruned[key] == dense[key] else f"−{1 - pruned[key] / dense[key]:.1%}"
        rows.append((label, human(dense[key], unit), human(pruned[key], unit), change))
    rows += _guard_rows(results.get("guards", ()))
    return rows + _budget_rows(results["rounding"].get("budgets", ())) + _task_rows(results.get("tasks", {}))


def _guard_rows(guards: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row a guard: its held-out loss, and how far it rose."""
    return [
        (f"loss of {public_name(g['data'])}, at most +{g['tolerance']:g}", f"{g['dense']:.3f}", f"{g['pruned']:.3f}",
         _signed(f"{g['pruned'] - g['dense']:.3f}"))
        for g in guards
    ]  # fmt: skip


def _budget_rows(budgets: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row a budget: what the models have of what it counts, and how much of it is spent."""
    rows: list[Row] = []
    for b in budgets:
        counts = b["counts"].removeprefix("bytes of ").removeprefix("microseconds ")
        bound, dense, pruned = (_amount(b, b[name]) for name in ("bound", "dense", "pruned"))
        label = f"budget {b['budget']}: at most {bound} {counts}"
        if "predicted_for" in b:
            label += f", predicted for {b['predicted_for']}"
        rows.append((label, dense, pruned, f"{b['pruned'] / b['bound']:.1%} of it"))
    return rows


def _amount(budget: Mapping[str, Any], count: float) -> str:
    """So much of what a budget counts."""
    if budget["counts"].startswith("microseconds"):
        return f"{count / 1e3:,.2f} ms"
    return human(count, {"kv": "B", "bytes": "B", "flops": "FLOP"}.get(budget["budget"].partition("=")[0], ""))


def _task_rows(tasks: Mapping[str, Any]) -> list[Row]:
    """A row a task and metric, with standard errors, and the mean accuracy of several tasks."""
    rows: list[Row] = []
    columns = ("dense", "pruned", "difference")
    for name, task in tasks.items():
        for metric in (key for key in task["dense"] if not key.endswith("_stderr")):
            dense, pruned, change = (_figure(task[c][metric], task[c][f"{metric}_stderr"]) for c in columns)
            rows.append((f"{name}, {metric}", dense, pruned, _signed(change)))
    known = [task for task in tasks.values() if task["dense"].get("acc_stderr") is not None]
    if len(known) > 1:
        means = (sum(task[c]["acc"] for task in known) / len(known) for c in columns)
        errors = (sum(task[c]["acc_stderr"] ** 2 for task in known) ** 0.5 / len(known) for c in columns)
        dense, pruned, change = map(_figure, means, errors)
        rows.append((f"mean of {len(known)} tasks, acc", dense, pruned, _signed(change)))
    return rows


def _figure(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _signed(figure: str) -> str:
    return "−" + figure[1:] if figure.startswith("-") else f"+{figure}"


def task_protocol(results: Mapping[str, Any]) -> str | None:
    """How the tasks were measured; None if there are none."""
    if not results.get("tasks"):
        return None
    counts = ", ".join(f"{name} {t['items']:,} of {t['of']:,}" for name, t in results["tasks"].items())
    used = next(iter(results["tasks"].values()))["versions"]["lm_eval"]
    return f"zero-shot by lm-eval {used}, ± standard error, change paired over the items: {counts} items"


def protocol(results: Mapping[str, Any]) -> str:
    """How the perplexity was measured: windows, stride, tokens that count, and what the text was joined from."""
    measured = results["dense"]
    joins = {"packed": "documents packed, EOS between them", "raw": "text as it is, rows joined by a blank line",
             "lines": "lines joined by a blank line, as in papers on WikiText-2"}  # fmt: skip
    return (
        f"{measured['windows']:,} windows of {measured['length']:,} tokens without overlap, {measured['tokens']:,} "
        f"tokens predicted, {joins[results['join']]}"
    )


def arrival(results: Mapping[str, Any]) -> str:
    """How far the learned gates were from the budget before they were held to it, and what that cost."""
    before, after, opened, when = _last_step(results)
    allowed = results["rounding"]["allowed"]
    budgets = ", ".join(b["budget"] for b in results["rounding"].get("budgets", ()))
    units = "units' parameters" + outside(results.get("keep", ()))
    may_stay = f"{allowed:.2%} of the {units} may stay" + (f" for {budgets}" if budgets else "")
    kept = f"budget: {may_stay}, {results['rounding']['kept']:.2%} do"
    if before is None or after is None:
        return f"{kept}; the held-out loss was not measured"
    if results.get("method") in ONE_SHOT:
        return f"{kept}; held-out loss {after:.4f}"
    return (
        f"budget: {may_stay}, {opened:.2%} were open as learned; holding the gates to it {when} changed the held-out "
        f"loss from {before:.4f} to {after:.4f} nats a token"
    )


def warnings(results: Mapping[str, Any]) -> list[str]:
    """What a user should know before trusting the model, from the content of eval.json."""
    before, after, _opened, _when = _last_step(results)
    found = []
    if before is not None and after is not None and after - before > COSTLY:
        remedy = "more steps, or the default recipe, arrive closer by themselves"
        if results.get("other_size"):
            remedy = "they were learned for another size, and `secateur prune MODEL --gates FILE --steps N` tunes them"
        found.append(
            f"holding the gates to the budget raised the held-out loss by {after - before:.3f} nats a token; {remedy}"
        )
    found += _guard_warnings(results.get("guards", ()))
    return found + _overlap_warnings(results.get("overlap")) + _task_warnings(results.get("tasks", {}))


def _guard_warnings(guards: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"the loss of {public_name(g['data'])} rose by {g['pruned'] - g['dense']:.3f} nats a token, --guard allows "
        f"{g['tolerance']:g}; remove less, spend more steps, or allow more"
        for g in guards
        if not g["held"]
    ]


def _overlap_warnings(overlap: Mapping[str, Any] | None) -> list[str]:
    if overlap is None:
        return []
    found, text, words = [], overlap["text"], overlap["run_words"]
    if text["runs"]:
        found.append(
            f"calibration and evaluation text share {text['runs']:,} runs of {words} words, which cover "
            f"{text['covered'] / text['words']:.2%} of the evaluation text: perplexities may look better than they are"
        )
    for name, task in overlap["tasks"].items():
        if task["hit"]:
            found.append(
                f"{task['hit']:,} of {task['items']:,} items of {name} share a run of {words} words with the "
                "calibration text: the accuracies may look better than they are"
            )
    return found


def _task_warnings(tasks: Mapping[str, Any]) -> list[str]:
    found = []
    for name, task in tasks.items():
        if task["cut"]:
            found.append(
                f"{task['cut']:,} items of {name} are longer than the model's context; lm-eval cut their beginning"
            )
        if task["joined"]:
            found.append(
                f"in {task['joined']:,} items of {name} the tokenizer joins query and choice, so lm-eval scores them "
                "on other tokens than those of their text"
            )
    return found


def _last_step(results: Mapping[str, Any]) -> tuple[float | None, float | None, float, str]:
    """Held-out loss before and after the gates are held to the budget, the share open before, and when that was."""
    fixing, rounding = results["fixing"], results["rounding"]
    if fixing is not None:
        when = f"after step {fixing['step']}"
        return fixing["held_out_before"], fixing["held_out_after"], fixing["kept_before"], when
    return rounding["held_out_learned"], rounding["held_out_planned"], rounding["open_gates"], "at the end"


def outside(keep: Sequence[str]) -> str:
    """What is not meant where shares are of the units that have gates."""
    return f" outside {', '.join(keep)}" if keep else ""


def _units(kinds: Collection[str]) -> str:
    names = {"heads": "attention heads", "kv_groups": "attention heads", "channels": "MLP channels",
             "expert_channels": "experts' channels", "shared_channels": "shared experts' channels",
             "attention": "whole attention sublayers", "mlp": "whole MLP sublayers"}  # fmt: skip
    return " and ".join(dict.fromkeys(name for kind, name in names.items() if kind in kinds))


def model_card(
    config: Config,
    shape: str,
    rounding: Rounding,
    results: Mapping[str, Any] | None,
    verified: Mapping[str, Any] | None,
    updates: Sequence[str] = (),
    kinds: Collection[str] = ("heads", "channels"),
    own_code: bool = False,
    stock: bool = False,
    steps: int | None = None,
) -> str:
    """README.md of the exported checkpoint: what was done, with which data, and the figures as far as known.

    `updates` is what was done to its weights after pruning, in words (`update_words`), `kinds` what its units are.
    `own_code`: transformers lacks the model, whose file is in the checkpoint. `stock`: its widths turned out equal.
    `steps`: that its gates were learned in, if not those of the settings: sizes of a sweep share these.
    """
    steps = config.steps if steps is None else steps
    policy = policy_of(shape)
    ragged = not (policy.uniform or stock)
    recipe = config.learning
    assert recipe is not None
    header = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["pruned", "secateur"]}
    name = public_name(config.model)
    if name == config.model:
        header["base_model"] = name
    code = ", trust_remote_code=True" if ragged or own_code else ""
    widths = (
        f"Widths differ by layer (`per_layer_config`{policy.said}); `modeling_pruned.py` in this folder builds them."
        if ragged
        else "All layers have the same widths; transformers lacks the model, so its file is in this folder."
        if own_code
        else "All layers have the same widths, so a stock class loads it and no code is needed."
    )
    lines = [
        "---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "",
        f"# {name}, pruned {asked(config)}", "",
        f"{rounding.kept:.2%} of the parameters in {_units(kinds)}{outside(config.keep)} were kept, "
        f"{_found(config.method)}. {widths}", "", "```python", "from transformers import AutoModelForCausalLM",
        f'model = AutoModelForCausalLM.from_pretrained("PATH"{code})', "```", "", "## How it was made", "",
        f"- base model: `{name}`; {_weights(updates)}",
    ]  # fmt: skip
    if config.method in ONE_SHOT:
        lines += [f"- method: `{config.method}`, one budget per {config.per}, seed {config.seed}"]
        if config.scored_rows:
            lines.append(f"- calibration data: {public_name(config.data)}")
            lines.append(f"- tokens: {config.scored_rows} × {config.seq_len} = {config.scored_rows * config.seq_len:,}")
    else:
        lines += [
            f"- calibration data: {public_name(config.data)}",
            f"- tokens: {steps} steps × {config.batch_size} × {config.seq_len} = "
            f"{steps * config.batch_size * config.seq_len:,}",
            f"- recipe: `{recipe.name}`, method `{config.method}`, one budget per {config.per}, distillation weight "
            f"{recipe.kd_weight:g}, seed {config.seed}",
        ]
        if config.gates is not None:
            lines.append(f"- gates: of another run, {'their values tuned so' if config.steps else 'as they were'}")
    if config.depth != "off":
        beside = ", beside those of their units" if config.depth == "joint" else "; all widths stayed"
        lines.append(f"- depth: whole attention and MLP sublayers had gates of their own{beside}")
    if results is not None:
        lines += [f"- {arrival(results)}"]
    lines.append("")
    if results is not None:
        lines += ["## Figures", "", "| | dense | pruned | change |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in summary(results)]
        lines += ["", f"Perplexity: {protocol(results)}; {public_name(results['text'])}.", ""]
        if told := task_protocol(results):
            lines += [f"Tasks: {told}.", ""]
        found = _guard_warnings(results.get("guards", ())) + _overlap_warnings(results.get("overlap"))
        lines += [f"Mind: {warning}.\n" for warning in found]
    if verified is not None:
        for c in verified["comparisons"]:
            lines.append(
                f"Verified on {c['tokens']:,} tokens: in {c['dtype']} the logits of the gated and the exported model "
                f"differ by at most {c['max_difference']:.1e}{' (before the weights were trained)' if updates else ''}."
            )
        lines.append("")
    return "\n".join(lines)


def update_words(updates: Sequence[str], steps: Sequence[int]) -> list[str]:
    """What was done to the weights that were kept, in words; `steps` are those of each recovery, if they are known."""
    done = {
        "refit": "the output projections were solved anew, in closed form, for the dense model's outputs",
        "recover-lora": "low-rank updates were trained with the dense model as teacher{}, and merged",
        "recover-full": "the weights of the layers were trained with the dense model as teacher{}",
    }
    known = iter([f" ({count} steps on the calibration tokens)" for count in steps])
    return [done[u].format(next(known, "") if u.startswith("recover") else "") for u in updates]


def _weights(updates: Sequence[str]) -> str:
    """What became of the weights that were kept."""
    if not updates:
        return "its weights were frozen, nothing was fine-tuned"
    return f"its weights were frozen while units were chosen; afterwards {', then '.join(updates)}"


def asked(config: Config) -> str:
    """What was asked for, for the card's title."""
    sparsity = [] if config.sparsity is None else [f"by {config.sparsity:.0%}"]
    return " and ".join([*sparsity, *([f"to {', '.join(config.budget)}"] if config.budget else [])])


def _found(method: str) -> str:
    """How the kept units were found, for the card's first sentence."""
    tool = f"[Secateur](https://arxiv.org/abs/2603.08065) ({PAPER})"
    if method == "sensitivity":
        return f"by sensitivity, which learning with {tool} begins with; no gates were learned"
    if method in ONE_SHOT:
        added = "; biases stand for the mean of what was removed" if method == "flap" else ""
        return f"by scores measured once (`{method}`, a baseline of {tool}); no gates were learned{added}"
    by = "" if method == "deterministic" else f", by its baseline `{method}`"
    return f"by gates learned with {tool}{by}; the gate values are folded into the weights"


def public_name(source: str) -> str:
    """A hub id as it is; of a local path only the last part, as others have no use for the rest."""
    if source.startswith(HELD_OUT):
        return HELD_OUT + public_name(source.removeprefix(HELD_OUT))
    if source == "self":
        return "text that the model itself wrote"
    if source.startswith(IN_MEMORY):
        return f"{name_in_memory(source)} (a model in memory)"
    path = Path(source).expanduser()
    local = path.exists() or source.startswith(("/", ".", "~")) or source.count("/") > 1 or file_type(path) in READERS
    return Path(source).name if local else source


def print_results(console: Console, run: Run, results: dict[str, Any]) -> None:
    """What the screen shows at the end of a run."""
    table = Table(title=f"{run.config.model} → {run.model}", title_justify="left")
    for column in ("", "dense", "pruned", "change"):
        table.add_column(column, justify="right" if column else "left")
    for row in summary(results):
        table.add_row(*row)
    console.print(table)
    text = f"perplexity: {protocol(results)}, {results['text']}; FLOPs without attention over the context"
    console.print(text, markup=False)
    if tasks := task_protocol(results):
        console.print(f"tasks: {tasks}", markup=False)
    console.print(arrival(results))
    seconds = ", ".join(f"{stage} {took:.0f} s" for stage, took in results["seconds"].items())
    console.print(f"time: {seconds}")
    for warning in warnings(results):
        console.print(f"[yellow]warning:[/yellow] {warning}")
