"""The text decoder inside a causal language model, which may be one for several modalities."""

from __future__ import annotations

from weakref import WeakValueDictionary

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

# Configurations that are their own text part, by id: every pass asks several times, and transformers
# looks for parts of many names. Composite ones are asked anew, as their part may be another by now.
_whole: WeakValueDictionary[int, PretrainedConfig] = WeakValueDictionary()


def text_config_of(config: PretrainedConfig) -> PretrainedConfig:
    """The text decoder's configuration: itself, or the part that describes it."""
    if _whole.get(id(config)) is config:
        return config
    found = config.get_text_config(decoder=True)
    if type(found) is not type(config):
        return text_config_of(found)
    if found is config and type(config).get_text_config is PretrainedConfig.get_text_config:
        _whole[id(config)] = config
    return config


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
    count = getattr(text_config_of(decoder.config), "num_hidden_layers", None)  # blt has none
    for module in text_body(decoder).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def freeze_other_parts(decoder: PreTrainedModel) -> None:
    """Freeze the parts of a model for several modalities that no text reaches: they could not learn."""
    text = [text_body(decoder), decoder.get_input_embeddings(), decoder.get_output_embeddings()]
    reached = {id(p) for module in text for p in module.parameters()}
    for parameter in decoder.parameters():
        if id(parameter) not in reached:
            parameter.requires_grad_(False)
