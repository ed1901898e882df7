"""Runs that are killed and resumed end in the files of a run that was never interrupted. `make test-kills`.

    python tests/kills.py --kills 100           kill -9 at random moments of every stage
    python tests/kills.py --kills 20 --cold     the same, each time in a fresh interpreter, which takes its time
    python tests/kills.py --windows 0           die at every single operation on files, half-written ones included
    python tests/kills.py --full 0              the disk is full from every single such operation on

Processes are forked from one that has imported all and done nothing, but for --cold. A process that was killed may be
killed once more while it resumes. All files are compared byte for byte, but for what says how long something took:
timings.json, report.html, which shows them, and `seconds` in eval.json. Prints a line a fault; exit code 1 if any file
differs.
"""

import argparse
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}

from runs import leftovers, prune_arguments, secateur, write_checkpoint, write_texts

CASES: dict[str, dict[str, Any]] = {
    "lora": {
        "data": "self",
        "method": "deterministic",
        "recover": "lora",
        "recover_lr": 1e-2,
        "refit_rounds": 2,
        "measure_every": 4,
    },
    "full": {"recover": "full", "shape": "uniform", "max_shard_size": "30KB", "recipe": "paper", "recover_steps": 17},
}
"""Runs that have all stages between them, with several rounds, shards and epochs."""
STAGES = ("start", "load", "data", "learn", "plan", "export", "verify", "refit", "recover", "eval")
LONGEST = 300
"""Seconds after which a process is taken to hang."""


def arguments_of(case: str, folder: Path, out: Path) -> list[str]:
    options = {"data": folder / "text.jsonl", "steps": 14, "checkpoint_every": 5, **CASES[case]}
    return [*prune_arguments(folder / "dense", options.pop("data"), out, **options), "--refit"]


def again(arguments: list[str], run: Path) -> list[str]:
    """What is typed after an interruption: what was typed first where the run had not even begun."""
    return ["prune", "--resume", str(run)] if (run / "config.yaml").is_file() else arguments


# --- processes -------------------------------------------------------------------------------------------------------


class Process:
    """The command line in a process of its own; its output, both streams, in `lines`."""

    def __init__(self, arguments: list[str], cold: bool = False, first: Callable[[], Any] = lambda: None) -> None:
        reader, writer = os.pipe()
        if cold:
            code = "from secateur.cli import main; main()"
            self.pid = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=writer, stderr=writer).pid
        elif not (pid := os.fork()):
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            signal.alarm(LONGEST)
            status = 1
            try:
                first()
                status = secateur(*arguments)
                sys.stdout.flush()
            finally:
                os._exit(status)
        else:
            self.pid = pid
        os.close(writer)
        self.lines = os.fdopen(reader, encoding="utf-8", errors="replace")

    def until(self, stage: str) -> None:
        """Waits for the line that announces a stage, or the end."""
        while stage != "start" and (line := self.lines.readline()) and not line.startswith(f"{stage}  "):
            pass

    def ended(self, kill: bool = False) -> tuple[int, str]:
        """Exit code, or minus the signal, and the rest of the output."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        said = self.lines.read()
        self.lines.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), said


# --- files -----------------------------------------------------------------------------------------------------------


def contents(run: Path) -> dict[str, bytes]:
    """All files of a run but for times."""
    files = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    for name in ("timings.json", "report.html"):  # the page shows times
        files.pop(name, None)
    if "eval.json" in files:
        results = json.loads(files["eval.json"])
        del results["seconds"]
        files["eval.json"] = json.dumps(results).encode()
    return files


def broken(run: Path) -> list[str]:
    """Files that look whole and are not."""
    from safetensors import safe_open

    found = []
    for path in sorted(run.rglob("*")):
        if path.is_file() and ".tmp" not in str(path.relative_to(run)):
            try:
                if path.suffix == ".json":
                    json.loads(path.read_text(encoding="utf-8"))
                elif path.suffix == ".safetensors":
                    with safe_open(path, framework="pt") as file:
                        file.keys()
            except Exception as error:
                found.append(f"{path.relative_to(run)}: {error}")
    return found


# --- operations on files ---------------------------------------------------------------------------------------------


class Operations:
    """Counts what is done to files below a folder, and acts at the `at`-th; `full` from there on, as a full disk."""

    def __init__(self, folder: Path, at: int = 0, full: bool = False) -> None:
        self.folder, self.at, self.full, self.names = str(folder), at, full, []

    def watch(self) -> None:
        """From here on in this process, which cannot stop watching."""
        import safetensors.torch

        serialise, fsync = safetensors.torch.serialize_file, os.fsync

        def half(tensors: Any, path: Any, metadata: Any = None) -> None:
            def cut() -> None:  # as safetensors does it: in a file of another name
                own = Path(path).with_name(".tmpHaLf00")
                serialise(tensors, own, metadata=metadata)
                os.truncate(own, own.stat().st_size // 2)

            self.done("write", path)
            self.done("write half of", path, cut)
            serialise(tensors, path, metadata=metadata)

        def sync(descriptor: int) -> None:
            self.done("fsync", self.folder)
            fsync(descriptor)

        safetensors.torch.serialize_file, os.fsync = half, sync
        sys.addaudithook(self.heard)

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, str) and (
                flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(mode or "") & set("wax+")
            ):
                self.done("open", path)
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.copyfile"):
            self.done(event.partition(".")[2], arguments[0])

    def done(self, what: str, path: Any, cut: Callable[[], None] = lambda: None) -> None:
        path = os.fsdecode(path) if not isinstance(path, int) else self.folder
        if not path.startswith(self.folder) and "/" in path:  # names without a folder are those of rmtree
            return
        self.names.append(f"{what} {re.sub(r'[.]?[0-9]+[.]', '.', path.removeprefix(self.folder))}")
        if len(self.names) == self.at and not self.full:
            cut()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.full and len(self.names) >= self.at > 0 and what in ("open", "mkdir", "write", "write half of"):
            if what.startswith("write"):
                from safetensors import SafetensorError

                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def operations_of(arguments: list[str], run: Path) -> list[str]:
    """What a whole run does to files."""
    log = run.with_suffix(".operations")
    operations = Operations(run)

    def first() -> None:
        operations.watch()
        exits = os._exit
        os._exit = lambda code: (log.write_text(json.dumps(operations.names)), exits(code))  # type: ignore[assignment]

    code, said = Process(arguments, first=first).ended()
    assert code == 0, said
    return list(json.loads(log.read_text()))


# --- faults ----------------------------------------------------------------------------------------------------------


class Faults:
    """Faults done to runs of every case, and what came of them."""

    def __init__(self, folder: Path, seed: int, cold: bool) -> None:
        self.folder, self.random, self.cold = folder, random.Random(seed), cold
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        if not (folder / "dense").exists():
            os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
            write_checkpoint(folder / "dense", num_key_value_heads=4)
            write_texts(folder / "text.jsonl", documents=120)
        self.whole, self.took, self.operations = {}, {}, {}
        for case in CASES:
            run = folder / f"{case}-whole"
            shutil.rmtree(run, ignore_errors=True)
            self.operations[case] = operations_of(arguments_of(case, folder, run), run)
            assert not leftovers(run) and not broken(run)
            self.whole[case], self.took[case] = contents(run), json.loads((run / "timings.json").read_text())

    def kill_at_times(self, kills: int) -> None:
        """kill -9 at random moments, of every stage as many."""
        for number in range(kills):
            case, stage = list(CASES)[number // len(STAGES) % len(CASES)], STAGES[number % len(STAGES)]
            run, arguments = self.fresh(case)
            process = Process(arguments, self.cold)
            process.until(stage)
            time.sleep(self.random.uniform(0.0, 1.1 * self.took[case].get(stage, 0.05)))
            code, _ = process.ended(kill=True)
            moment = "after the end" if code == 0 else stage
            if self.random.random() < 0.3:
                process = Process(again(arguments, run), self.cold)
                time.sleep(self.random.uniform(0.0, sum(self.took[case].values())))
                moment += " and again" * (process.ended(kill=True)[0] != 0)
            self.resume(case, arguments, run, f"kill {number + 1}: {case}, {moment}", stage)

    def die_at_operations(self, count: int) -> None:
        """Death just before an operation on files, or amid the writing of one."""
        for case, at in self.some(count):
            run, arguments = self.fresh(case)
            code, said = Process(arguments, first=Operations(run, at).watch).ended()
            name = f"{case}, operation {at} ({self.operations[case][at - 1]})"
            if code != -signal.SIGKILL:
                self.wrong.append(f"{name}: ended by itself, {code}: {said}")
            self.resume(case, arguments, run, name, self.operations[case][at - 1].partition(" ")[0])

    def fill_the_disk(self, count: int) -> None:
        """A disk that is full from an operation on: one line, nothing half-written, and all goes on later."""
        for case, at in self.some(count):
            run, arguments = self.fresh(case)
            code, said = Process(arguments, first=Operations(run, at, full=True).watch).ended()
            name = f"{case}, full disk at operation {at} ({self.operations[case][at - 1]})"
            complaint = said.strip().splitlines()[-1]
            if code == 0:
                complaint = "ended well: nothing was to be written after that"
            elif code != 2 or "No space left on device" not in complaint or "Traceback" in said or leftovers(run):
                self.wrong.append(f"{name}: ended with {code}, {leftovers(run)}, {said}")
            self.resume(case, arguments, run, f"{name}: {complaint}", "full disk")

    def some(self, count: int) -> list[tuple[str, int]]:
        """Operations by case and number, in order: a random choice of so many, or all for 0."""
        every = [(case, at + 1) for case, names in self.operations.items() for at in range(len(names))]
        return sorted(self.random.sample(every, count)) if count else every

    def fresh(self, case: str) -> tuple[Path, list[str]]:
        run = self.folder / f"{case}-run"
        shutil.rmtree(run, ignore_errors=True)
        return run, arguments_of(case, self.folder, run)

    def resume(self, case: str, arguments: list[str], run: Path, name: str, kind: str) -> None:
        """Goes on to the end and compares."""
        wrong = broken(run)
        code, said = Process(again(arguments, run), self.cold).ended()
        found = contents(run) if run.exists() else {}
        wrong += [f"resumed: exit code {code}: {said}"] * (code != 0)
        wrong += [f for f in sorted(found.keys() | self.whole[case].keys()) if found.get(f) != self.whole[case].get(f)]
        print(f"{name}: {'the same files' if not wrong else 'WRONG: ' + '; '.join(wrong)}", flush=True)
        self.wrong += [f"{name}: {'; '.join(wrong)}"] * bool(wrong)
        self.counts[kind] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--full", type=int)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"))
    options = parser.parse_args()
    import torch
    from transformers.utils import logging

    if not options.cold:  # forked processes have it then, and what it imports
        import peft  # noqa: F401

        import secateur.stages  # noqa: F401
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    start = time.monotonic()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ["HF_MODULES_CACHE"] = str(options.folder / "modules")
    faults = Faults(options.folder.resolve(), options.seed, options.cold)
    for count, act in (
        (options.kills, faults.kill_at_times),
        (options.windows, faults.die_at_operations),
        (options.full, faults.fill_the_disk),
    ):
        if count is not None:
            act(count)
    took = time.monotonic() - start
    print(f"{sum(faults.counts.values())} faults ({dict(faults.counts)}), {len(faults.wrong)} wrong, {took:.0f} s")
    sys.exit(bool(faults.wrong))


if __name__ == "__main__":
    main()
