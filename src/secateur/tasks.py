"""Zero-shot tasks by lm-eval itself, on the dense and on the exported model; serves `--tasks`. Needs secateur[eval].

A task is one of lm-eval's, by its name, or a JSON Lines file of items, which needs no network:

    {"query": "Question: …\\nAnswer:", "choices": [" yes", " no"], "gold": 0, "id": 7}
    {"query": null, "queries": ["… so Ann", "… so Bea"], "choices": [" won.", " won."], "gold": 1, "id": 8}

Choice i is scored by log P(choices[i] | query), or given queries[i]; acc takes the best one, acc_norm the best per
character, a choice's first space not counted. Prompts are as given: no examples before them, no chat template.

Both models answer the same items, so the difference is measured item by item, and its standard error is that of the
mean of these differences: far smaller than what the two accuracies' own standard errors suggest.

lm-eval scores those tokens of query + choice that come after as many tokens as the query has by itself. They are the
choice only if the tokens of query + choice begin with those of the query; a file where they do not is refused.
"""

import copy
import difflib
import logging
import random
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from lm_eval.api.metrics import mean, mean_stderr
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from secateur.files import InputError
from secateur.text import COMPRESSION, JSON_LINES, encodable, file_type, json_rows

logging.getLogger("lm_eval").setLevel(logging.ERROR)

LOGITS_AT_ONCE = 2**28
"""Bytes of float32 logits that a forward pass of lm-eval may make, all at once (256 MiB)."""


@contextmanager
def seeded() -> Iterator[None]:
    """lm-eval's own seeds, as some of its tasks shuffle choices when they are read; afterwards all is as before."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class FileTask(ConfigurableTask):
    """A multiple-choice task of lm-eval whose items come from a file."""

    def __init__(self, name: str, items: list[dict[str, Any]]) -> None:
        metrics = ({"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm"))
        config = {
            "task": name, "custom_dataset": lambda **_: {"test": Dataset.from_list(items)}, "test_split": "test",
            "output_type": "multiple_choice", "doc_to_text": lambda item: item["queries"][0], "doc_to_target": "gold",
            "doc_to_choice": "unspaced", "target_delimiter": "", "num_fewshot": 0, "metric_list": list(metrics),
            "metadata": {"version": 1},
        }  # fmt: skip
        super().__init__(config=config)

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **kwargs: Any) -> list[Any]:
        """A request a choice, each with its own query, which lm-eval's own tasks cannot have."""
        requests = super().construct_requests(doc, ctx, **kwargs)
        for request, query, choice in zip(requests, doc["queries"], doc["choices"], strict=True):
            request.arguments = (query, choice)
        return list(requests)


def read_items(path: Path) -> list[dict[str, Any]]:
    """The items of a file. Raises InputError that names the line which is none."""
    items: list[dict[str, Any]] = []
    for place, row in json_rows(path):
        if fault := _fault(row):
            raise InputError(f"{place} is no item of a task: {fault}")
        choices = [encodable(choice) for choice in row["choices"]]
        queries = row["queries"] if row.get("query") is None else [row["query"]] * len(choices)
        queries = [encodable(query) for query in queries]
        items.append({
            "id": encodable(str(row.get("id", len(items)))),
            "queries": queries, "choices": choices, "gold": row["gold"],
            "unspaced": [choice.removeprefix(" ") for choice in choices],
        })  # fmt: skip
    if not items:
        raise InputError(f"{path} holds no items; a task file has one a line, as JSON")
    return items


def _fault(row: dict[str, Any]) -> str | None:
    choices, gold = row.get("choices") or [], row.get("gold")
    if not _texts(choices) or len(choices) < 2:
        return '"choices" must be two or more texts that are not empty'
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        return f'"gold" must be the number of the right choice, 0 to {len(choices) - 1}, not {gold!r}'
    if row.get("query") is None and not (_texts(row.get("queries")) and len(row["queries"]) == len(choices)):
        return '"query" must be a text, or null with a text for each choice in "queries"'
    if row.get("query") is not None and not _texts([row["query"]]):
        return '"query" must be a text that is not blank'
    return None


def _texts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) and v.strip() for v in values)


class Model(HFLM):
    """lm-eval's view of a loaded model, which also begins with BOS where asked to, and tells of rows scored."""

    def __init__(self, model: Any, tokenizer: Any, bos: int | None, rows: int, on_rows: Callable[[int], None]) -> None:
        own = copy.deepcopy(tokenizer)  # lm-eval gives it a padding token, which must not get into an export
        super().__init__(pretrained=model, tokenizer=own, backend="causal", batch_size=rows, softmax_dtype="float32")
        self.bos, self.on_rows = bos, on_rows

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text that begins a sequence, or of a continuation (`add_special_tokens=False`)."""
        ids: list[int] = super().tok_encode(string, add_special_tokens, **kwargs)
        if self.bos is None or add_special_tokens is False or ids[:1] == [self.bos]:
            return ids
        return [self.bos, *ids]

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        self.on_rows(len(inps))
        return super()._model_call(inps, *args, **kwargs)


@dataclass
class Tasks:
    """Tasks with the items that are asked."""

    loaded: dict[str, Any]
    """lm-eval's task objects by name."""
    samples: dict[str, list[int]]
    """Numbers of the items asked, in rising order; all of those tasks that are not listed."""
    files: frozenset[str]
    """The tasks that come from files."""
    limit: int | None
    cut: dict[str, int] = field(default_factory=dict)
    """Items that are longer than the model's context, of which lm-eval drops the beginning."""
    joined: dict[str, int] = field(default_factory=dict)
    """Items of lm-eval's own tasks in which a token reaches across the border of query and choice."""
    requests: int = 0
    longest: int = 1
    """Tokens of the longest request."""

    @seeded()
    def check(self, model: Any, tokenizer: Any, bos: int | None) -> None:
        """Tokenises all requests. Raises InputError for items that lm-eval cannot score, or would score wrongly.

        Where a token reaches across the border of query and choice, lm-eval gives the model a text that nobody wrote.
        In a file that is refused; in a task of lm-eval's own it is counted, as published figures have it in them.
        """
        if self.requests:
            return
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise InputError("--tasks needs a tokenizer with a BOS or an EOS token, and this model's has neither")
        lm = Model(model, tokenizer, bos, 1, lambda _rows: None)
        for name, task in self.loaded.items():
            task.build_all_requests(samples=self.samples.get(name), rank=0, world_size=1)
            self.requests += len(task.instances)
            cut, joined = set(), set()
            for request in task.instances:
                if request.request_type != "loglikelihood":
                    self.longest = lm.max_length
                    continue
                length, faithful = self._encoded(lm, name, request)
                self.longest = max(self.longest, min(length, lm.max_length))
                cut |= {request.doc_id} if length > lm.max_length + 1 else set()
                joined |= set() if faithful else {request.doc_id}
            self.cut[name], self.joined[name] = len(cut), len(joined)

    def _encoded(self, lm: Model, name: str, request: Any) -> tuple[int, bool]:
        """Tokens of a request, and whether they are those of its text."""
        query, choice = request.args[:2]
        if query:
            ids, scored = lm._encode_pair(query, choice)
            faithful = ids + scored == lm.tok_encode(query + choice)
        else:
            ids, scored = [lm.prefix_token_id], lm.tok_encode(choice, add_special_tokens=False)
            faithful = True
        where = f"{name}, item {request.doc.get('id', request.doc_id)}"
        if len(scored) > lm.max_length:
            raise InputError(f"{where}: a choice is longer than the model's context of {lm.max_length} tokens")
        if not ids or not scored or (name in self.files and not faithful):
            raise InputError(
                f"{where}: the tokenizer joins the end of the query, {query[-20:]!r}, to the beginning of the choice, "
                f"{choice[:20]!r}, or adds tokens after a query, so the choice has no score of its own; begin choices "
                "with a space and end queries without one, or leave the item out"
            )
        return len(ids) + len(scored), faithful

    def texts(self) -> dict[str, list[list[str]]]:
        """The items of the checked tasks as texts: each query with each of its choices."""
        found: dict[str, list[list[str]]] = {}
        for name, task in self.loaded.items():
            items: dict[int, list[str]] = {}
            for request in task.instances:
                items.setdefault(request.doc_id, []).append("".join(a for a in request.args if isinstance(a, str)))
            found[name] = list(items.values())
        return found

    def compare(
        self, dense: Any, pruned: Any, tokenizer: Any, bos: int | None, on_rows: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """Both models' figures on the checked tasks, by name, and their paired differences (pruned − dense).

        `on_rows` hears of rows that went through a model, and of how many there are in all, at most.
        """
        rows = max(1, LOGITS_AT_ONCE // (4 * self.longest * dense.config.vocab_size))
        results = []
        for model in (dense, pruned):
            lm = Model(model, tokenizer, bos, rows, lambda done: on_rows(done, 2 * self.requests))
            with seeded():
                results.append(evaluate(lm, {"tasks": self.loaded}, samples=self.samples or None, bootstrap_iters=0))
        return {name: self._compared(name, *results) for name in self.loaded}

    def _compared(self, name: str, dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, Any]:
        task, first, second = self.loaded[name], dense["samples"][name], pruned["samples"][name]
        if [s["doc_hash"] for s in first] != [s["doc_hash"] for s in second]:
            raise InputError(f"task {name} changes its items at every reading, so two models cannot be compared on it")
        figures: dict[str, dict[str, Any]] = {"dense": {}, "pruned": {}, "difference": {}}
        for key, value in dense["results"][name].items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = metric if kind == "none" else f"{metric} ({kind})"
            other = pruned["results"][name][key]
            items = [[s[metric] for s in samples if s["filter"] == kind and metric in s] for samples in (first, second)]
            averaged = task.aggregation().get(metric) is mean and len(items[0]) == len(items[1])
            gaps = [b - a for a, b in zip(*items, strict=True)] if averaged else []
            for figure, total, values in (
                ("dense", value, items[0]), ("pruned", other, items[1]), ("difference", other - value, gaps),
            ):  # fmt: skip
                figures[figure][label] = float(total)
                known = averaged and len(values) > 1
                figures[figure][f"{label}_stderr"] = float(mean_stderr(values)) if known else None
        count = dense["n-samples"][name]
        return figures | {
            "items": count["effective"], "of": count["original"], "limit": self.limit, "fewshot": 0,
            "cut": self.cut[name], "joined": self.joined[name],
            "dataset": None if name in self.files else _dataset(task),
            "versions": {"lm_eval": version("lm_eval"), "task": None if name in self.files else task.VERSION},
        }  # fmt: skip


def _dataset(task: Any) -> dict[str, Any]:
    """Where the items of a task of lm-eval come from."""
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    return {"path": task.DATASET_PATH, "config": task.DATASET_NAME, "split": split}


@seeded()
def load_tasks(names: Sequence[str], limit: int | None, seed: int) -> Tasks:
    """Reads the tasks and draws the items. Raises InputError for what is unknown, broken or empty."""
    disable_progress_bars()
    files = {name: Path(name).expanduser() for name in names if _is_file(name)}
    local = [FileTask(_stem(path), read_items(path)) for path in files.values()]
    named = [task for name in names if name not in files for task in _named(name)]
    loaded: dict[str, Any] = {}
    for task in (*local, *named):
        if loaded.setdefault(task.task_name, task) is not task:
            raise InputError(f"--tasks names {task.task_name} twice; leave one out, or rename the file")
    samples = {}
    for name, task in loaded.items():
        size = len(task.eval_docs)
        if limit is not None and limit < size:
            samples[name] = sorted(random.Random(f"{seed} {name}").sample(range(size), limit))
    return Tasks(loaded, samples, frozenset(task.task_name for task in local), limit)


def _is_file(name: str) -> bool:
    path = Path(name).expanduser()
    json_lines = file_type(path) in JSON_LINES
    if (json_lines or "/" in name) and not path.is_file():
        raise InputError(f"{name!r}: no such file; check the path given to --tasks")
    if "/" in name and not json_lines:
        raise InputError(f"{name}: a file of items is JSON Lines; its name ends in .jsonl, .jsonl.gz or .jsonl.zst")
    return json_lines


def _stem(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSION else path).stem


@cache
def _manager() -> TaskManager:
    return TaskManager()


def _named(name: str) -> list[Any]:
    """The task of lm-eval with this name, or all tasks of a group or tag."""
    known = _manager().all_tasks
    if name not in known:
        close = difflib.get_close_matches(name, known)
        hint = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
        raise InputError(f"lm-eval has no task {name!r}; {hint} (A file of items ends in .jsonl.)")
    try:
        tasks = list(_manager().load([name])["tasks"].values())
    except IndexError:
        raise InputError(f"task {name} has no items: its split is empty") from None
    except Exception as error:  # whatever datasets, the network, or a task's own code raises
        reason = textwrap.shorten(str(error), 300) or "no reason given"
        raise InputError(f"task {name} cannot be loaded ({type(error).__name__}: {reason})") from None
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise InputError(
                f"task {task.task_name} runs code that a model writes, or needs more than text: leave it out"
            )
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    return tasks
