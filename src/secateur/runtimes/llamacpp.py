"""llama.cpp, by its server in this process (the xllamacpp package), in float32.

The checkpoint becomes a GGUF file without a tokenizer: token ids go in and come out. With one, the server would stop at
ends of text, and keep back the probabilities of tokens that end within a character.
"""

from pathlib import Path
from typing import Any

import torch
import xllamacpp

from secateur.files import scratch_folder
from secateur.gguf_file import write_gguf
from secateur.runtimes import Continuation
from secateur.workers.llamacpp import complete, start


def version() -> str:
    """Name and version."""
    return f"llama.cpp of xllamacpp {xllamacpp.__version__}"


def greedy(model: Path, prompts: list[list[int]], new_tokens: int) -> list[Continuation]:
    """The most likely tokens after each prompt, by the checkpoint in the folder `model`.

    Writes a float32 GGUF file beside it, gone at the end. Raises InputError where llama.cpp has no place for the model.
    """
    with scratch_folder(model.parent, "gguf") as folder:
        path = folder / "model.gguf"
        write_gguf(model, path, "f32", tokenizer=False)
        server = serve(path, max(map(len, prompts)) + new_tokens)
        written = [_greedy(server, prompt, new_tokens) for prompt in prompts]
        del server
    return written


def serve(path: Path, context: int) -> Any:
    """A server on a GGUF file, with keys and values cached in float32, too."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.fit_params = params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity = -1
    return start(params)


def _greedy(server: Any, prompt: list[int], new_tokens: int) -> Continuation:
    request = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "logprobs": 1, "cache_prompt": False}
    steps = complete(server, request)["choices"][0]["logprobs"]["content"]
    assert len(steps) == new_tokens, f"llama.cpp wrote {len(steps)} tokens of {new_tokens}"
    return Continuation(list(prompt), [step["id"] for step in steps], [step["logprob"] for step in steps])
