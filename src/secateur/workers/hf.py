"""Times a model in transformers, as `generate` runs it. `python -m secateur.workers.hf OPTIONS`.

Shape suffixes: B sequences, T tokens, V vocabulary.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, StoppingCriteria

from secateur.experts import is_fused
from secateur.ideal import CONTEXT, HEAD, MAPS
from secateur.load import load_config_of, pick_device, read_model
from secateur.workers.child import memory_bytes, peak_bytes, prompts, rates, serve

REST = "norms, rope, dispatch"
"""What no part that has a price on paper takes."""


class Stamps(StoppingCriteria):
    """Notes when each token is there, and never stops."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        synchronise(self.device)
        self.at.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


class Model:
    """A model in transformers."""

    def __init__(self, options: dict[str, Any]) -> None:
        transformers.logging.set_verbosity_error()
        if options["threads"]:
            torch.set_num_threads(options["threads"])
        torch.set_flush_denormal(True)
        self.device = pick_device("auto")
        name, trust = options["model"], options["trust_remote_code"]
        model = read_model(name, load_config_of(name, trust), getattr(torch, options["dtype"]), trust)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.model.generation_config = GenerationConfig(pad_token_id=0)  # no end of text: all run to their length
        self.vocabulary = self.model.get_input_embeddings().num_embeddings
        self.about = {
            "implementation": type(self.model).__name__,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def measure(self, batch: int, prompt_tokens: int, new_tokens: int, seed: int) -> dict[str, float]:
        """Tokens a second."""
        start, at = self._generate(batch, prompt_tokens, new_tokens, seed)
        return rates(batch, prompt_tokens, new_tokens, at[0] - start, at[-1] - at[0])

    def profile(
        self, batch: int, prompt_tokens: int, new_tokens: int, seed: int, layers: str
    ) -> dict[str, dict[str, float]]:
        """Seconds of each part of the model in each phase; `layers` names the list of its decoder layers."""
        with self._watched(layers) as events:
            start, at = self._generate(batch, prompt_tokens, new_tokens, seed)
        phases = {"prefill": (start, at[0]), "decode": (at[0], at[-1])}
        return {phase: seconds_of(events, *span) for phase, span in phases.items()}

    def memory(self) -> dict[str, Any]:
        """Peak, and how many tokens' keys and values fit beside the weights."""
        cuda = self.device.type == "cuda"
        total = torch.cuda.get_device_properties(self.device).total_memory if cuda else memory_bytes()
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else peak_bytes()
        return {"peak_bytes": peak, "device_bytes": total}

    @torch.inference_mode()
    def _generate(self, batch: int, prompt_tokens: int, new_tokens: int, seed: int) -> tuple[float, list[float]]:
        """When it began, and when each token was there."""
        ids_BT = torch.tensor(prompts(batch, prompt_tokens, self.vocabulary, seed), device=self.device)
        stamps = Stamps(self.device)
        synchronise(self.device)
        start = time.perf_counter()
        self.model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=new_tokens + 1,
            do_sample=False,
            stopping_criteria=[stamps],
        )
        assert len(stamps.at) == new_tokens + 1
        return start, stamps.at

    @contextmanager
    def _watched(self, layers: str) -> Iterator[list[tuple[str, float, float]]]:
        """Notes (part, begin, end) whenever a part has run. Attention contains maps: `seconds_of` takes these out."""
        events: list[tuple[str, float, float]] = []
        handles = []

        def watch(part: str, module: nn.Module) -> None:
            begun: list[float] = []

            def before(*_: Any) -> None:
                synchronise(self.device)
                begun.append(time.perf_counter())

            def after(*_: Any) -> None:
                synchronise(self.device)
                events.append((part, begun.pop(), time.perf_counter()))

            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))

        modules = dict(self.model.named_modules())
        within = {name for name in modules if name.startswith(f"{layers}.")}
        attentions = [name for name in within if hasattr(modules[name], "is_causal")]
        for name, module in modules.items():
            if name in attentions:
                watch(CONTEXT, module)
            elif isinstance(module, nn.Linear) or is_fused(module):
                inside = any(name.startswith(f"{attention}.") for attention in attentions)
                watch(HEAD if name not in within else f"{MAPS} in attention" if inside else MAPS, module)
        try:
            yield events
        finally:
            for handle in handles:
                handle.remove()


def seconds_of(events: list[tuple[str, float, float]], begin: float, end: float) -> dict[str, float]:
    """Seconds between `begin` and `end` that each part took; what no part took is the rest."""
    took: dict[str, float] = {}
    for part, start, stop in events:
        if begin <= start and stop <= end:
            took[part] = took.get(part, 0.0) + stop - start
    inside = took.pop(f"{MAPS} in attention", 0.0)
    parts = {HEAD: took.get(HEAD, 0.0), MAPS: took.get(MAPS, 0.0) + inside, CONTEXT: took.get(CONTEXT, 0.0) - inside}
    return parts | {REST: end - begin - sum(parts.values())}


if __name__ == "__main__":
    serve(Model)
