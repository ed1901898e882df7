"""vLLM, offline, in this process, in float32, without compilation."""

import gc
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import vllm
from vllm.distributed import cleanup_dist_env_and_memory

from secateur.files import InputError
from secateur.own_code import brings_own_code
from secateur.runtimes import Continuation
from secateur.workers.vllm import attention, load

CACHE_BYTES = 2**28
"""Room for the keys and values of the prompts of `verify`."""


def version() -> str:
    """Name and version."""
    return f"vLLM {vllm.__version__}"


def greedy(model: Path, prompts: list[list[int]], new_tokens: int) -> list[Continuation]:
    """The most likely tokens after each prompt, by the checkpoint in the folder `model`, all prompts in one batch.

    Raises InputError where vLLM does not load it.
    """
    params = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, logprobs=0, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    try:
        requests = _load(model, max(map(len, prompts)) + new_tokens).generate(asked, params, use_tqdm=False)
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()
    return [_continuation(request.prompt_token_ids, request.outputs[0]) for request in requests]


def _load(model: Path, length: int) -> vllm.LLM:
    try:
        return load(
            model=str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=length,
            kv_cache_memory_bytes=CACHE_BYTES,
            use_tqdm_on_load=False,
            seed=0,
            trust_remote_code=brings_own_code(model),
            **attention("float32"),
        )
    except (ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"vLLM {vllm.__version__} does not load {model}: {reason}") from error


def _continuation(prompt: list[int], output: Any) -> Continuation:
    tokens = list(output.token_ids)
    return Continuation(
        list(prompt), tokens, [step[t].logprob for step, t in zip(output.logprobs, tokens, strict=True)]
    )
