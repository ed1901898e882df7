"""A model in a process of its own, as `secateur bench` sees it: requests and answers are lines of JSON.

What ends badly ends in one line: a process that dies, with the last it said; one that does not answer in time.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from secateur.files import InputError

LAST_LINES = 4
"""Lines of its output that are shown of a process that died."""

PATIENCE = 20
"""Seconds that a process has to end by itself once it is asked to."""


class Worker:
    """A context: the process runs while it is open, and its children no longer than it."""

    def __init__(
        self, module: str, name: str, options: Mapping[str, Any], *, timeout: float, python: Path | None = None
    ) -> None:
        """Starts `python -m module`, which loads a model as `options` say; `name` is what messages call it."""
        self.name, self.timeout = name, timeout
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        package = str(Path(__file__).parents[2])  # another environment need not have Secateur installed
        paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self.process = subprocess.Popen(
            [str(python or sys.executable), "-m", module, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            encoding="utf-8",
            env={**os.environ, **_threads(options.get("threads")), "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # so that what it starts can be ended with it, and Ctrl-C reaches only us
        )
        self.answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def loaded(self) -> dict[str, Any]:
        """Waits until the model is loaded; what the process says of it."""
        return self._answer("loading")

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        """Has the process do something; its answer. Raises InputError when it dies, fails or takes too long."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has died: the answer says so
            self.process.stdin.write(json.dumps({"do": do, **options}) + "\n")
            self.process.stdin.flush()
        at = f" at batch size {options['batch']}" if "batch" in options else ""
        return self._answer(f"{do}{at}")

    def close(self) -> None:
        """Ends the process and its children."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.said.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.process.kill()
        self.close()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def _answer(self, task: str) -> dict[str, Any]:
        try:
            line = self.answers.get(timeout=self.timeout)
        except queue.Empty:
            self.process.kill()
            raise InputError(
                f"the {self.name} model did not answer within {self.timeout:g} s ({task}); raise --timeout"
                f"{self._last_said()}"
            ) from None
        if line is None:
            code = self.process.wait()
            raise InputError(f"the {self.name} model's process died ({task}, exit code {code}){self._last_said()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise InputError(f"the {self.name} model: {answer['error']}")
        return answer

    def _last_said(self) -> str:
        self.said.seek(0)
        lines = [" ".join(line.split()) for line in self.said if line.strip()][-LAST_LINES:]
        return "; it said last: " + " | ".join(line[:300] for line in lines) if lines else ""


def _threads(count: int | None) -> dict[str, str]:
    """Variables that OpenMP reads before a process can say how many threads it wants."""
    return {} if count is None else {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}
