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
    _know_latent_attention()


def _know_families() -> None:
    """Lets transformers read the configurations of Secateur's own families without code from the checkpoint."""
    from transformers import AutoConfig

    from secateur.families import FAMILIES

    for model_type, (config_class, _, _) in FAMILIES.items():
        AutoConfig.register(model_type, config_class, exist_ok=True)


def _know_latent_attention() -> None:
    """Lets vLLM read pruned models with latent attention, whose layers it takes for different wherever widths are."""
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    class LatentConvertor(ModelArchConfigConvertorBase):
        """What vLLM asks of a whole model: its layers' attention is alike, or it cannot be served."""

        def get_per_layer_hf_configs(self) -> None:
            if "num_attention_heads" in (getattr(self.hf_text_config, "per_layer_attributes", None) or ()):
                raise ValueError(
                    "vLLM has no place for latent attention whose head count varies by layer; export with "
                    "`--shape uniform`, or prune experts and channels only (`--units`)"
                )

    for model_type in ("deepseek_v2", "deepseek_v3"):
        MODEL_ARCH_CONFIG_CONVERTORS.setdefault(model_type, LatentConvertor)
