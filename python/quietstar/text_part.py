"""The text decoder inside a causal language model, which may be one for several modalities."""

from __future__ import annotations

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)


def text_config_of(config: PretrainedConfig) -> PretrainedConfig:
    """The text decoder's configuration: itself, or the part that describes it."""
    found = config.get_text_config(decoder=True)
    return config if type(found) is type(config) else text_config_of(found)


def text_body(decoder: PreTrainedModel) -> PreTrainedModel:
    """What turns tokens into hidden states: the causal language model without its output layer.

    Of a model for several modalities the text's part alone, which looks for no images among the tokens.
    """
    composite = text_config_of(decoder.config) is not decoder.config
    return decoder.get_decoder() if composite else decoder.base_model


def check_reopens(model: PreTrainedModel) -> None:
    """Refuse a decoder that a saved Quiet-STaR model could not be opened with.

    Raises:
        ValueError: transformers' Auto classes do not lead from its configuration to its class.
    """
    config = model.config
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and (
        CONFIG_MAPPING[config.model_type] is type(config)
        if config.model_type in CONFIG_MAPPING
        else False
    )
    if not known:
        raise ValueError(
            f"{type(model).__name__} could not be opened again after saving: AutoConfig and"
            f" AutoModelForCausalLM do not know its {type(config).__name__} (model type"
            f" {config.model_type!r}); expected a decoder of transformers, or one that was"
            " registered with both"
        )
