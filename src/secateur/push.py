"""A finished run onto the Hugging Face Hub: checkpoint, card, gates. Serves `secateur push RUN --repo OWNER/NAME`.

What goes there is the verified export as it is, the card with its figures as the Hub reads them (`model-index`), and,
in `secateur/`, what the run was told and found: config.yaml, gates.safetensors (for `--gates`), plan.json. Local paths
stay here: of each only the last part is told, as in the card.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from html import escape
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save

from secateur.card import human, public_name
from secateur.exported import checked_export
from secateur.files import InputError
from secateur.gates import read_gates
from secateur.guard import read_guards
from secateur.report.files import Evaluation, Plan, checked, evaluation, verification
from secateur.run import Run
from secateur.text import one_line
from secateur.updates import refitted, updates_of

Content = Path | bytes
"""A file as it is, or what is sent in its place."""
OF_AN_EXPORT = ("*.safetensors", "*.safetensors.index.json", "*.py")
"""What an earlier push may have left in the repository that this one has not: other shards, a modelling file."""
OWN = "secateur"
"""Folder of the repository for what is not the checkpoint."""


@dataclass(frozen=True)
class Pushed:
    """What was sent, or would be."""

    sizes: dict[str, int]
    """Path in the repository → bytes."""
    url: str | None
    """Where it is; None where nothing was sent."""

    def lines(self) -> list[str]:
        """A line a file, and how much that is."""
        width = max(map(len, self.sizes))
        listed = [f"{path:<{width}}  {human(size, 'B')}" for path, size in sorted(self.sizes.items())]
        return [*listed, f"{len(self.sizes)} files, {human(sum(self.sizes.values()), 'B')}"]


def push(run: Run, repo: str, private: bool, revision: str | None, with_report: bool, dry_run: bool) -> Pushed:
    """Uploads a run, in one commit. Raises InputError for a run that is not finished, and for what the Hub refuses."""
    check_finished(run)
    with _errors_of(repo):
        validate_repo_id(repo)
    token = get_token()
    if token is None and not dry_run:
        raise InputError("no token for the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")
    files = contents(run, repo, with_report)
    sizes = {path: len(of) if isinstance(of, bytes) else of.stat().st_size for path, of in files.items()}
    if dry_run:
        return Pushed(sizes, None)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token, library_name="secateur")
    with _errors_of(repo):
        name = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        there = api.list_repo_files(name, revision=revision)
        stale = [path for path in there if any(fnmatch(path, of) for of in OF_AN_EXPORT) and path not in files]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(path) for path in stale if "/" not in path),
            *(CommitOperationAdd(path, of if isinstance(of, bytes) else str(of)) for path, of in files.items()),
        ]
        said = "Model pruned by Secateur"
        done = api.create_commit(name, operations, commit_message=said, revision=revision)
    return Pushed(sizes, str(done.repo_url))


def check_finished(run: Run) -> None:
    """Raises InputError for a run whose export is not there, not verified, or not yet what its settings ask for."""
    again = f"go on with `secateur prune --resume {run.folder}`"
    model = checked_export(run)
    if not run.verify.exists():
        raise InputError(f"{model} is not verified; run `secateur verify {run.folder}` first")
    if not (verification(run.verify) or {"passed": False})["passed"]:
        raise InputError(f"{model} failed verification (see {run.verify}); it is not pushed")
    recovery = f"recover-{run.config.recover}"
    if run.config.refit and not refitted(model, run.refit):
        raise InputError(f"{run.folder} stopped half-way, before refit; {again}")
    if run.config.recover and recovery not in updates_of(model):
        raise InputError(f"{run.folder} stopped half-way, before {recovery}; {again}")
    if not run.eval.exists() or not run.plan.exists():
        missing = [path.name for path in (run.plan, run.eval) if not path.exists()]
        raise InputError(f"{run.folder} stopped half-way, it has no {missing[0]} yet; {again}")
    planned = checked(run.plan, Plan, f"secateur plan {run.folder}")["rounding"]
    if planned != (evaluation(run.eval) or {}).get("rounding"):
        raise InputError(f"{run.plan} is newer than {model}; run `secateur export {run.folder}`, then verify and eval")


def contents(run: Run, repo: str, with_report: bool = False) -> dict[str, Content]:
    """Path in the repository → content."""
    model, names = checked_export(run), _public_names(run)
    files: dict[str, Content] = {
        path.relative_to(model).as_posix(): path for path in sorted(model.rglob("*")) if path.is_file()
    }
    settings = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    files |= {
        "README.md": card(run, repo).encode(),
        f"{OWN}/config.yaml": yaml.safe_dump(_public(settings, names), sort_keys=False, allow_unicode=True).encode(),
        f"{OWN}/plan.json": run.plan,
        f"{OWN}/gates.safetensors": _gates(run, names),
    }
    if with_report:
        if not run.report.exists():
            raise InputError(f"{run.report} is missing; `secateur report {run.folder}` writes it")
        page = run.report.read_text(encoding="utf-8")
        files[f"{OWN}/report.html"] = _public(page, {escape(k): escape(v) for k, v in names.items()} | names).encode()
    return files


# --- card ------------------------------------------------------------------------------------------------------------


def card(run: Run, repo: str) -> str:
    """The export's card with its figures as metadata, and the repository's name where it says how to load the model."""
    written = ModelCard.load(checked_export(run) / "README.md")
    written.data.model_name = repo.rpartition("/")[2]
    written.data.eval_results = eval_results(checked(run.eval, Evaluation, f"secateur eval {run.folder}"))
    written.text = written.text.replace('from_pretrained("PATH"', f'from_pretrained("{repo}"')
    return str(written)


def eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    """Perplexity and the tasks' figures of the pruned model, from eval.json; the dense model's, and errors, beside."""
    dense, pruned = results["dense"], results["pruned"]
    about = {"dense": dense["perplexity"], "windows": pruned["windows"], "length": pruned["length"]}
    if pruned.get("loss_stderr") is not None:  # of exp(loss), to first order
        about["stderr"] = pruned["perplexity"] * pruned["loss_stderr"]
    found = [_result(*_text_dataset(results["text"]), "perplexity", "perplexity", pruned["perplexity"], about)]
    for name, task in results.get("tasks", {}).items():
        dataset = task.get("dataset") or {}
        where = dataset.get("path") or name, name, dataset.get("config"), dataset.get("split")
        for metric in (key for key in task["pruned"] if not key.endswith("_stderr")):
            about = {"dense": task["dense"][metric], "num_fewshot": task["fewshot"], "items": task["items"]}
            if (error := task["pruned"][f"{metric}_stderr"]) is not None:
                about["stderr"] = error
            kind = "accuracy" if metric.startswith("acc") else metric
            found.append(_result(*where, kind, metric, task["pruned"][metric], about))
    return found


def _result(
    path: str, name: str, config: str | None, split: str | None, kind: str, metric: str, value: float, about: Any
) -> EvalResult:
    return EvalResult(
        task_type="text-generation", dataset_type=path, dataset_name=name, dataset_config=config, dataset_split=split,
        metric_type=kind, metric_name=metric, metric_value=value, metric_args=about,
    )  # fmt: skip


def _text_dataset(text: str) -> tuple[str, str, str | None, str | None]:
    """Dataset on the hub, name to read, configuration and split of the evaluation text.

    Other texts get an identifier made of their name: the Hub puts figures together whose identifiers are equal.
    """
    said = public_name(text)
    name, config, split = (*said.split(":", 2), "", "")[:3]
    if said != text or "/" not in name or " " in name:
        return re.sub(r"[^\w.]+", "-", said), said, None, None
    return name, said, config or None, split or "train"


# --- what stays here -------------------------------------------------------------------------------------------------


def _public_names(run: Run) -> dict[str, str]:
    """What the run's settings name on this machine → what others are told, the longest first."""
    c = run.config
    guards = [guard.data for guard in read_guards(c.guard)]
    named = [c.model, c.data, c.eval_data, c.latency_table, c.gates, *guards, *c.tasks, run.folder]
    sources = {str(source) for source in named if source is not None}
    sources |= {str(Path(source).expanduser().absolute()) for source in sources if public_name(source) != source}
    sources |= {str(run.folder.absolute()), str(run.folder.resolve())}
    local = {source: public_name(source) for source in sources if "/" in source or os.sep in source}
    return {source: local[source] for source in sorted(local, key=len, reverse=True) if source != local[source]}


def _public(value: Any, names: Mapping[str, str]) -> Any:
    """The same value, its texts without local paths."""
    if isinstance(value, str):
        for private, public in names.items():
            value = value.replace(private, public)
        return value
    if isinstance(value, dict):
        return {key: _public(inside, names) for key, inside in value.items()}
    return [_public(inside, names) for inside in value] if isinstance(value, list) else value


def _gates(run: Run, names: Mapping[str, str]) -> bytes:
    """The gates as they are, with public names in what they say of themselves."""
    tensors, about = read_gates(run.gates)
    return save(tensors, metadata={"secateur": json.dumps(_public(about, names))})


@contextmanager
def _errors_of(repo: str) -> Iterator[None]:
    """Turns what the Hub and the network raise into one line."""
    try:
        yield
    except InputError:
        raise
    except HFValidationError as error:
        raise InputError(f"--repo {repo} is no name of a repository: {one_line(error)}") from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        hint = {
            401: "the token is not valid; run `hf auth login`, or set HF_TOKEN",
            403: "the token may not write there; take one with write access, or another --repo",
            404: "there is no such repository or revision, or the token may not see it",
        }.get(code, one_line(error))
        raise InputError(f"the Hub refused {repo} ({code}): {hint}") from None
    except Exception as error:  # of whichever network library the Hub's client uses
        where = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        raise InputError(f"cannot push to {repo} at {where}: {one_line(error)}") from None
