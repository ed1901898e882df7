"""Times a GGUF file in llama.cpp, by its server in this process. `python -m secateur.workers.llamacpp OPTIONS`."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp

from secateur.files import InputError
from secateur.workers.child import memory_bytes, peak_bytes, prompts, rates, serve

CONTEXT_STEP = 256
"""llama.cpp rounds the context of a sequence up to a multiple of it."""


def start(params: Any) -> Any:
    """A server on the file that the parameters name. Raises InputError where llama.cpp cannot load it."""
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise InputError(f"llama.cpp cannot load {params.model.path}: {error}") from None


def complete(server: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What the server answers to a prompt of token ids. Raises InputError where that is an error."""
    answer: dict[str, Any] = server.handle_completions(request)
    if "choices" not in answer:
        raise InputError(f"llama.cpp does not continue a prompt of {len(request['prompt'])} tokens: {answer}")
    return answer


class Model:
    """A model in llama.cpp."""

    def __init__(self, options: dict[str, Any]) -> None:
        params = xllamacpp.CommonParams()
        batch, tokens = max(options["batch_sizes"]), options["prompt_tokens"] + options["new_tokens"] + 1
        params.model.path = options["model"]
        params.n_parallel = batch
        params.n_ctx = batch * -(-tokens // CONTEXT_STEP) * CONTEXT_STEP
        params.n_batch = max(params.n_batch, batch * options["prompt_tokens"])
        params.cache_prompt = params.fit_params = params.warmup = False
        params.cache_ram_mib, params.verbosity = 0, -1
        if options["threads"]:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
        self.server = start(params)
        self.vocabulary = options["vocabulary"]
        self.about = {
            "implementation": "llama.cpp",
            "device": "cpu" if not params.n_gpu_layers else "",
            "threads": options["threads"],
            "versions": {"xllamacpp": xllamacpp.__version__},
        }

    def measure(self, batch: int, prompt_tokens: int, new_tokens: int, seed: int) -> dict[str, float]:
        """Tokens a second: prefill until all sequences have a token, decoding from then on.

        When that was is what llama.cpp's own clock says. Where it takes in prompts one after the other, the first
        sequences are a token or two ahead by then.
        """
        drawn = prompts(batch, prompt_tokens, self.vocabulary, seed)
        with ThreadPoolExecutor(batch) as clients:
            start = time.perf_counter()
            times = list(clients.map(lambda ids: self._complete(ids, new_tokens + 1), drawn))
        begun, done = max(first for first, _ in times), max(last for _, last in times)
        return rates(batch, prompt_tokens, new_tokens, begun - start, done - begun)

    def memory(self) -> dict[str, Any]:
        """Peak."""
        return {"peak_bytes": peak_bytes(), "device_bytes": memory_bytes()}

    def _complete(self, ids: list[int], tokens: int) -> tuple[float, float]:
        """When the first and when the last token was there."""
        asked = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = complete(self.server, asked)
        done = time.perf_counter()
        written = answer["timings"]["predicted_n"]
        assert written == tokens, f"llama.cpp wrote {written} tokens of {tokens}"
        return done - answer["timings"]["predicted_ms"] / 1e3, done


if __name__ == "__main__":
    serve(Model)
