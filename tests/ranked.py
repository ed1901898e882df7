"""The command line in several real processes that find each other over gloo, as a launcher starts them."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs import secateur

LONGEST = 300
"""Seconds after which processes are taken to hang."""


def _rank(arguments: list[str], variables: dict[str, str], output: str, first: Callable[[], Any] | None) -> None:
    """What a process does: all that it says goes to a file."""
    with Path(output).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    import torch

    torch.set_num_threads(1)
    if first is not None:
        first()
    code = secateur(*arguments)
    sys.stdout.flush()
    sys.exit(code)


@dataclass
class Launched:
    """Processes that were started, by rank."""

    processes: list[Any]
    outputs: list[Path]

    def ended(self) -> list[int]:
        """Exit codes, or minus the signals, by rank."""
        until = time.monotonic() + LONGEST
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
        assert None not in codes, f"hanging: {codes}\n{self.said()}"
        return codes

    def said(self, rank: int = 0) -> str:
        return self.outputs[rank].read_text(encoding="utf-8")

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.processes[rank].pid, number)

    def after_step(self, run: Path, step: int) -> "Launched":
        """Waits until so many steps have been learned."""
        until = time.monotonic() + LONGEST
        while time.monotonic() < until and any(process.is_alive() for process in self.processes):
            with contextlib.suppress(FileNotFoundError):
                if (run / "metrics.jsonl").read_bytes().count(b"\n") >= step:
                    return self
            time.sleep(0.02)
        raise AssertionError(self.said())


def launch(
    count: int, arguments: list[Any], folder: Path, first: Callable[[], Any] | None = None, **variables: Any
) -> Launched:
    """Starts so many ranks; each calls `first` before the command."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["secateur.stages", "secateur.cli", "secateur.ranks", "secateur.progress"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": count}
    processes, outputs = [], []
    for rank in range(count):
        own = environment | {"RANK": rank, "LOCAL_RANK": rank} | variables
        outputs.append(folder / f"rank-{count}-{rank}.txt")
        own_arguments = ([str(a) for a in arguments], {k: str(v) for k, v in own.items()}, str(outputs[-1]), first)
        processes.append(context.Process(target=_rank, args=own_arguments))
        processes[-1].start()
    return Launched(processes, outputs)
