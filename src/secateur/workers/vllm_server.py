"""Times vLLM's OpenAI server under concurrent requests that stream. `python -m secateur.workers.vllm_server OPTIONS`.

This process is the client; the server is its child, and ends with it.
"""

import contextlib
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from secateur.workers.child import peak_bytes, prompts, serve
from secateur.workers.vllm import engine_options, fitting

REQUESTS = 2
"""Requests a client sends, one after the other."""


class Model:
    """A model behind a server."""

    def __init__(self, options: dict[str, Any]) -> None:
        vllm = version_of("vllm")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        arguments = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "model"]
        engine = engine_options(options)
        self.length = engine["max_model_len"]
        for name, value in engine.items():
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                arguments.append(option if value else option.replace("--", "--no-", 1))
            else:
                arguments += [option, str(value)]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
        self.server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2)
        self.vocabulary = options["vocabulary"]
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        self.about = {
            "implementation": "vLLM's OpenAI server",
            "device": "",
            "threads": options["threads"],
            "versions": {"vllm": vllm},
        }

    def measure(self, batch: int, prompt_tokens: int, new_tokens: int, seed: int) -> dict[str, float]:
        """Seconds to the first token and between tokens, medians over requests, and requests a second."""
        drawn = prompts(batch * REQUESTS, prompt_tokens, self.vocabulary, seed)
        start = time.perf_counter()
        with ThreadPoolExecutor(batch) as clients:
            times = list(clients.map(lambda ids: self._complete(ids, new_tokens), drawn))
        seconds = time.perf_counter() - start
        return {
            "first_token": statistics.median(first for first, _ in times),
            "between_tokens": statistics.median(between for _, between in times),
            "requests": len(drawn) / seconds,
        }

    def memory(self) -> dict[str, Any]:
        """Peak of the server's processes together, and how many tokens' keys and values they found room for."""
        with self._get("/metrics") as response:
            text = response.read().decode()
        info = dict(re.findall(r'(\w+)="([^"]*)"', next(re.finditer(r"vllm:cache_config_info\{.*\}", text))[0]))
        said = info.get("kv_cache_max_concurrency", "None")
        sequences = None if said == "None" else float(said)
        tokens = fitting(sequences, self.length, int(info["num_gpu_blocks"]), int(info["block_size"]))
        return {"peak_bytes": sum(map(peak_bytes, self._processes())), "kv_tokens": tokens}

    def close(self) -> None:
        """Ends the server."""
        self.server.terminate()
        try:
            self.server.wait(15)
        except subprocess.TimeoutExpired:
            self.server.kill()

    def _wait(self) -> None:
        while self.server.poll() is None:
            with contextlib.suppress(OSError), self._get("/health") as response:
                if response.status == 200:
                    return
            time.sleep(0.5)
        sys.exit(1)  # what the server said last is said by the parent

    def _complete(self, ids: list[int], new_tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and between tokens on average."""
        asked = {
            "model": "model", "prompt": ids, "max_tokens": new_tokens + 1, "ignore_eos": True, "temperature": 0,
            "stream": True,
        }  # fmt: skip
        start, at = time.perf_counter(), []
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        with contextlib.closing(connection):
            body = json.dumps(asked)
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"the server refuses a request: {response.read().decode()[:300]}")
            for line in response:
                if line.startswith(b"data: {") and json.loads(line[6:]).get("choices"):
                    at.append(time.perf_counter())
        return at[0] - start, (at[-1] - at[0]) / new_tokens

    @contextlib.contextmanager
    def _get(self, path: str) -> Iterator[http.client.HTTPResponse]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            connection.request("GET", path)
            yield connection.getresponse()

    def _processes(self) -> list[int]:
        """The server and all that descends from it (Linux)."""
        parents: dict[int, int] = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        found = [self.server.pid]
        for process in found:
            found += [child for child, parent in parents.items() if parent == process]
        return found


def version_of(package: str) -> str:
    """Version of a runtime. Raises ModuleNotFoundError when it is not there."""
    module = __import__(package)
    return str(getattr(module, "__version__", None) or version(package))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    serve(Model)
