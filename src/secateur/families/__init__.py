"""Models that transformers lacks, each in a file that travels in the checkpoints of its pruned forms.

They are not registered with transformers' Auto classes: what is registered there comes before the code in a checkpoint,
and a pruned one needs its own.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from secateur.families.modeling_deepseek import DeepseekConfig, DeepseekForCausalLM, DeepseekModel

FAMILIES: dict[str, tuple[type[PreTrainedConfig], Any, Any]] = {
    "deepseek": (DeepseekConfig, DeepseekForCausalLM, DeepseekModel),
}
"""`model_type` → the classes of its configuration, of its causal LM and of the model within."""


def config_class(values: dict[str, Any]) -> Any:
    """What reads a checkpoint with such a config.json: a family's configuration, or AutoConfig, also for pruned models,
    which bring their code."""
    own, *_ = FAMILIES.get(values.get("model_type", ""), (AutoConfig, None, None))
    pruned = any("modeling_pruned" in place for place in values.get("auto_map", {}).values())
    return AutoConfig if pruned else own


def model_class(config: PreTrainedConfig) -> Any:
    """The causal LM of a configuration: a family's, or AutoModelForCausalLM."""
    return next((model for own, model, _ in FAMILIES.values() if type(config) is own), AutoModelForCausalLM)


def build(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration, without weights from a checkpoint."""
    found = model_class(config)
    if found is AutoModelForCausalLM:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    built: PreTrainedModel = found(config)
    return built
