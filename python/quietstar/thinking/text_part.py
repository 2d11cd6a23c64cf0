"""The text decoder inside a causal language model, which may be one for several modalities."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def text_config_of(config: PretrainedConfig) -> PretrainedConfig:
    """The text decoder's configuration: itself, or the part that describes it."""
    found = config.get_text_config(decoder=True)
    return config if type(found) is type(config) else text_config_of(found)


def kind_of(decoder: PreTrainedModel) -> str:
    """How errors name a decoder: its model type."""
    return f"model type {text_config_of(decoder.config).model_type!r}"


def text_body(decoder: PreTrainedModel) -> PreTrainedModel:
    """What turns tokens into hidden states: the causal language model without its output layer.

    Of a model for several modalities the text's part alone, which looks for no images among the tokens.
    """
    composite = text_config_of(decoder.config) is not decoder.config
    return decoder.get_decoder() if composite else decoder.base_model


def decoder_layers(decoder: PreTrainedModel) -> list[nn.Module]:
    """The layers of a decoder's body; empty where they are in no list."""
    count = text_config_of(decoder.config).num_hidden_layers
    for module in text_body(decoder).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return []
