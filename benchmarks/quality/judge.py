"""What every model of the study is judged by: perplexity on two texts, three tasks, and the worth of its gate values.

Perplexities follow the project's protocol (evaluate.py), 20 windows of 512 tokens; neither text is calibrated on.
Tasks are scored by lm-eval on a seeded sample of their items, as many for the dense model: what tells is the difference
item by item.
"""

import hashlib
import json
import statistics
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.metrics import mean_stderr
from lm_eval.evaluator import evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.evaluate import mean_loss, perplexity, windows
from secateur.files import InputError
from secateur.load import autocast
from secateur.plan import load_plan
from secateur.recipes import ONE_SHOT
from secateur.session import Session
from secateur.tasks import LOGITS_AT_ONCE, Model, Tasks, load_tasks, seeded
from secateur.text import evaluation_text

CALIBRATION = ("openstax_calib_0.jsonl.gz", "openwebtext_calib.jsonl.gz", "wikipedia_calib.jsonl.gz")
"""Files below text/ that gates are learned on, together: textbooks, web pages, encyclopedia."""
TEXTS = {
    "wikitext2-test": "text/wikitext2_raw_test.txt.gz",
    "c4": "text/c4_calib.jsonl.gz",
}
"""Name of a text → its file below the data folder."""
assert not {f"text/{file}" for file in CALIBRATION} & set(TEXTS.values()), "a text that gates are learned on"

WINDOWS, LENGTH = 20, 512

TASKS = {"arc_easy": "acc_norm", "openbookqa": "acc_norm", "copa": "acc"}
"""Task, of tasks/NAME.jsonl.gz → lm-eval's metric that is reported of it, the one that papers report."""
TASK_ITEMS = 100
"""Items a task."""


def linked_calibration(data: Path, folder: Path) -> Path:
    """`folder` with links to the calibration files, which `--data` reads as one text. InputError if one is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in CALIBRATION:
        source, link = (data / "text" / name).resolve(), folder / name
        if not source.exists():
            raise InputError(f"{data} holds no text/{name}; --data is the folder with text/ and tasks/")
        if not link.exists():
            link.symlink_to(source)
    return folder


@dataclass
class Judge:
    """The texts as tokens, and the tasks."""

    tokenizer: PreTrainedTokenizerBase
    bos: int | None
    data: Path

    @cached_property
    def texts(self) -> dict[str, torch.Tensor]:
        """Windows of every text, shape (N, T)."""
        return {name: self.windows(file) for name, file in TEXTS.items()}

    def windows(self, name: str) -> torch.Tensor:
        """The first windows of a file below the data folder, shape (N, T)."""
        file = str(self.data / name)
        text = evaluation_text(file, characters=WINDOWS * LENGTH * 12)
        tokens_T = self.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        return windows(tokens_T, WINDOWS, LENGTH, file, self.bos)

    @cached_property
    def tasks(self) -> Tasks:
        """The tasks with the items that are asked."""
        return load_tasks([str(self.data / "tasks" / f"{name}.jsonl.gz") for name in TASKS], TASK_ITEMS, seed=0)

    def figures(self, model: PreTrainedModel, dense: dict[str, Any] | None = None) -> dict[str, Any]:
        """Perplexities and tasks of a model; with `dense`, the dense model's own figures, what became of them.

        In the arithmetic of `--precision auto`, as learning is: in bfloat16 where the processor multiplies in it.
        """
        with autocast(model.device, "auto"):
            return self._figures(model, dense)

    def _figures(self, model: PreTrainedModel, dense: dict[str, Any] | None) -> dict[str, Any]:
        perplexities = {name: asdict(perplexity(model, ids_NT)) for name, ids_NT in self.texts.items()}
        tasks = self._answered(model)
        figures = {"perplexity": perplexities, "tasks": tasks}
        if dense is None:
            return figures
        for name, figure in perplexities.items():
            figure["times_dense"] = figure["perplexity"] / dense["perplexity"][name]["perplexity"]
        for name, answers in tasks.items():
            before = dense["tasks"][name]
            assert answers["asked"] == before["asked"], f"dense.json was measured on other items of {name}"
            gaps = [int(new) - int(old) for new, old in zip(answers["right"], before["right"], strict=True)]
            answers |= {"difference": statistics.fmean(gaps), "difference_se": float(mean_stderr(gaps))}
        return figures

    def _answered(self, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """Accuracy by task, and which items were answered right, so that any two models can be compared item by item.

        secateur.tasks compares a pair of models; here many are held against one, which should answer but once.
        """
        self.tasks.check(model, self.tokenizer, self.bos)
        rows = max(1, LOGITS_AT_ONCE // (4 * self.tasks.longest * model.config.vocab_size))
        lm = Model(model, self.tokenizer, self.bos, rows, lambda _rows: None)
        with seeded():
            asked = self.tasks.samples or None
            samples = evaluate(lm, {"tasks": self.tasks.loaded}, samples=asked, bootstrap_iters=0)["samples"]
        return {name: _accuracy(samples[name], metric) for name, metric in TASKS.items()}


def _accuracy(samples: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    right = [int(sample[metric]) for sample in samples]
    asked = hashlib.sha256("".join(sample["doc_hash"] for sample in samples).encode()).hexdigest()[:16]
    return {
        "accuracy": statistics.fmean(right), "se": float(mean_stderr(right)), "metric": metric, "items": len(right),
        "asked": asked, "right": "".join(map(str, right)),
    }  # fmt: skip


def with_ones(session: Session, judge: Judge) -> dict[str, float] | None:
    """The same kept set with every gate at 1, as losses in nats a token: what the learned values are worth.

    None for one-shot methods, whose gates are 1 anyway. Gates are attached to the dense model, no export is needed.
    """
    if session.config.method in ONE_SHOT:
        return None
    loaded, groups = session.loaded, session.loaded.description.groups
    plan, _rounding = load_plan(session.run.plan, groups, session.architecture)
    gates = replace(plan, scales={name: torch.ones_like(scale) for name, scale in plan.scales.items()}).gates(groups)
    rows = {"held_out": session.blocks.held_out_NT, "wikitext2-test": judge.texts["wikitext2-test"]}
    with autocast(loaded.model.device, "auto"):
        return {name: mean_loss(loaded.model, ids_NT, groups, gates) for name, ids_NT in rows.items()}


def curve_of(metrics: Path) -> list[dict[str, float]]:
    """The steps of a run at which held-out losses were measured, with the gates as trained and as deployed."""
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    names = ("step", "held_out_trained", "held_out_deployed", "kept")
    return [{name: step[name] for name in names} for step in steps if step.get("held_out_trained") is not None]
