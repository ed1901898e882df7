"""vLLM's entry point to pruned checkpoints: `vllm serve RUN/model` only needs Secateur installed beside it.

vLLM calls `register` in every one of its processes (entry point `vllm.general_plugins`). Each causal LM that vLLM has
gets a pruned sibling, `Pruned` + its name, which is what `config.json` of a ragged export says; it is built when a
checkpoint asks for it (`vllm_model`), so that vLLM's own models load as before. Uniform exports are stock
checkpoints and need no plugin.
"""

PREFIX = "Pruned"
MODULE = "secateur.vllm_model"


def register() -> None:
    """Tells vLLM of the pruned sibling of each causal LM, and of configurations that transformers lacks."""
    from vllm import ModelRegistry

    for name in list(ModelRegistry.get_supported_archs()):
        if name.endswith("ForCausalLM") and not name.startswith((PREFIX, "Transformers")):
            ModelRegistry.register_model(PREFIX + name, f"{MODULE}:{PREFIX}{name}")
    _know_families()


def _know_families() -> None:
    """Lets transformers read the configurations of Secateur's own families without code from the checkpoint."""
    from transformers import AutoConfig

    from secateur.families import FAMILIES

    for model_type, (config_class, _, _) in FAMILIES.items():
        AutoConfig.register(model_type, config_class, exist_ok=True)
