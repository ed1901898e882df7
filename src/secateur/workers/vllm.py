"""Times a model in vLLM, offline: its engine here, step by step. `python -m secateur.workers.vllm OPTIONS`."""

import os
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from secateur.workers.child import peak_bytes, prompts, rates, serve


def engine_options(options: dict[str, Any]) -> dict[str, Any]:
    """What both ways to run vLLM set, by the names of its engine's arguments: room for a batch of prompts in one step,
    the same cache for both models, and no cache of prefixes."""
    batch, length = max(options["batch_sizes"]), options["prompt_tokens"] + options["new_tokens"] + 1
    return {
        "model": options["model"],
        "dtype": options["dtype"],
        "trust_remote_code": options["trust_remote_code"],
        "enforce_eager": options["eager"],
        "max_model_len": length,
        "max_num_seqs": batch,
        "max_num_batched_tokens": batch * length,
        "kv_cache_memory_bytes": options["kv_cache_bytes"],
        "enable_prefix_caching": False,
    } | attention(options["dtype"])


def attention(dtype: str) -> dict[str, Any]:
    """The kernels of attention that must be asked for, by the names of the engine's arguments: where a processor has
    AMX, vLLM 0.32 takes those for DeepSeek's attention that know bfloat16 only, whatever the dtype."""
    from vllm.platforms import current_platform

    return {"attention_backend": "CPU_MLA"} if dtype != "bfloat16" and current_platform.is_cpu() else {}


def fitting(sequences: float | None, length: int, blocks: int, block: int) -> int:
    """Tokens that the cache holds: of so many `sequences` of that length, in whole blocks; where vLLM does not say how
    many, of its blocks, which is too many where layers have several kinds of cache."""
    return blocks * block if sequences is None else round(sequences * -(-length // block) * block)


def load(**options: Any) -> Any:
    """A `vllm.LLM` in this process, fed with token ids; `options` are its own."""
    import vllm

    from secateur.vllm_plugin import register

    register()  # where Secateur is not installed beside vLLM, its entry point is not found
    return vllm.LLM(**options, skip_tokenizer_init=True, distributed_executor_backend="uni", disable_log_stats=True)


class Model:
    """A model in vLLM."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        import vllm

        self.engine = load(**engine_options(options)).llm_engine
        self.asked = 0
        self.config = self.engine.vllm_config
        self.vocabulary = self.config.model_config.get_vocab_size()
        self.cuda = torch.cuda.is_available()
        self.about = {
            "implementation": self.config.model_config.architecture,
            "device": self.config.device_config.device_type,
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "vllm": vllm.__version__},
        }

    def measure(self, batch: int, prompt_tokens: int, new_tokens: int, seed: int) -> dict[str, float]:
        """Tokens a second."""
        from vllm import SamplingParams

        drawn = prompts(batch, prompt_tokens, self.vocabulary, seed)
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens + 1, ignore_eos=True, detokenize=False)
        begun: set[str] = set()
        first = start = time.perf_counter()
        for ids in drawn:
            self.asked += 1
            self.engine.add_request(str(self.asked), {"prompt_token_ids": ids}, params)
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            if len(begun) < batch:
                begun |= {output.request_id for output in outputs}
                first = time.perf_counter()
        return rates(batch, prompt_tokens, new_tokens, first - start, time.perf_counter() - first)

    def memory(self) -> dict[str, Any]:
        """Peak, and how many tokens' keys and values the engine found room for."""
        import torch

        cache = self.config.cache_config
        tokens = fitting(
            cache.kv_cache_max_concurrency,
            self.config.model_config.max_model_len,
            cache.num_gpu_blocks,
            cache.block_size,
        )
        return {"peak_bytes": torch.cuda.max_memory_allocated() if self.cuda else peak_bytes(), "kv_tokens": tokens}


if __name__ == "__main__":
    serve(Model)
