"""vLLM's entry point to pruned checkpoints: `vllm serve RUN/model` only needs Secateur installed beside it.

vLLM calls `register` in every one of its processes (entry point `vllm.general_plugins`). Each causal LM that vLLM has
gets a pruned sibling, `Pruned` + its name, which is what `config.json` of a ragged export says; it is built when a
checkpoint asks for it (`vllm_model`), so that vLLM's own models load as before. Uniform exports are stock
checkpoints and need no plugin.
"""

from typing import Any

PREFIX = "Pruned"

TESTED = ("0.32", "0.33")
"""vLLM from the first version up to, and without, the second."""


def register() -> None:
    """Tells vLLM of the pruned sibling of each causal LM, and of configurations that it or transformers lacks."""
    from vllm import ModelRegistry

    for name in list(ModelRegistry.get_supported_archs()):
        if name.endswith("ForCausalLM") and not name.startswith((PREFIX, "Transformers")):
            ModelRegistry.register_model(PREFIX + name, f"{__name__}:{PREFIX}{name}")
            _check_early(name)
    _know_families()
    _know_latent_attention()


def __getattr__(name: str) -> Any:
    """The pruned sibling of a model of vLLM's, by its name: where vLLM looks for what was registered."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_version()
    from secateur.vllm_model import sibling

    return sibling(name)


def check_version() -> None:
    """Raises ValueError where this vLLM is not one that `vllm_model` was tested with."""
    import vllm
    from packaging.version import Version

    first, end = map(Version, TESTED)
    if not first <= Version(vllm.__version__) < end:
        raise ValueError(
            f"secateur serves pruned models in vLLM {first} up to, not including, {end}; this is {vllm.__version__}. "
            "Install another of the two, or export with `--shape uniform`, which needs no plugin"
        )


def check(vllm_config: Any) -> None:
    """Raises ValueError where this checkpoint is not one that the plugin can serve as it is asked to."""
    from secateur.export import EXPORT_FORMAT

    check_version()
    model_config = vllm_config.model_config
    config, ranks = model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
    written = (getattr(config, "secateur", None) or {}).get("format", 0)
    if not 1 <= written <= EXPORT_FORMAT:
        raise ValueError(
            f"{model_config.model} has export format {written}, and this secateur reads up to {EXPORT_FORMAT}: "
            + ("update secateur" if written else "no export of `secateur prune`")
        )
    for index, layer in enumerate(config.per_layer_config):
        for key in config.per_layer_attributes or ():
            replicated = key == "num_key_value_heads" and ranks % (getattr(layer, key) or 1) == 0
            if getattr(layer, key) % ranks and not replicated:
                raise ValueError(
                    f"tensor parallel size {ranks} does not divide {key} {getattr(layer, key)} of layer {index}; "
                    f"export with `--shape tp:{ranks}`"
                )


def _check_early(name: str) -> None:
    """Has vLLM check a pruned model in the process of the command, before others are begun; then do what it does for
    the stock one."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    stock = MODELS_CONFIG_MAP.get(name, VerifyAndUpdateConfig)

    class Checked(stock):  # type: ignore[valid-type,misc]
        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            check(vllm_config)
            super().verify_and_update_config(vllm_config)

    MODELS_CONFIG_MAP[PREFIX + name] = Checked


def _know_families() -> None:
    """Lets transformers read the configurations of Secateur's own families without code from the checkpoint."""
    from transformers import AutoConfig

    from secateur.families import FAMILIES

    for model_type, (config_class, _, _) in FAMILIES.items():
        AutoConfig.register(model_type, config_class, exist_ok=True)


def _know_latent_attention() -> None:
    """Lets vLLM read pruned models with latent attention, which it refuses where layers differ in anything at all."""
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    class Latent(ModelArchConfigConvertorBase):
        """What vLLM asks of a whole model: its layers' attention is alike, or it cannot be served."""

        def get_per_layer_hf_configs(self) -> None:
            if "num_attention_heads" in (getattr(self.hf_text_config, "per_layer_attributes", None) or ()):
                raise ValueError(
                    "vLLM has no place for latent attention whose head count varies by layer; export with "
                    "`--shape uniform`, or prune experts and channels only (`--units`)"
                )

    for model_type in ("deepseek_v2", "deepseek_v3"):
        MODEL_ARCH_CONFIG_CONVERTORS.setdefault(model_type, Latent)
