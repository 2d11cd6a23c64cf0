"""Which decoders can think, as far as it can be known up front."""

from __future__ import annotations

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from quietstar.thinking.linear_layers import embedding_rows
from quietstar.thinking.recurrent.mixers import (
    ALONE,
    ATTENTION,
    BOTH,
    KNOWN_RECURRENCES,
    RECURRENT,
    mixer_of,
)
from quietstar.thinking.text_part import decoder_layers, kind_of, text_body, text_config_of

# What layers hand on, or share, in a way that passes with thoughts do not know, by their classes' names.
_NOT_KNOWN = {
    "MiniMaxLightningAttention": "lightning attention",
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer", "JambaMambaMixer", "ZambaMambaMixer"), "Mamba-1"),
    "Zamba2HybridLayer": "attention that several layers share",
    "RecurrentGemmaRecurrentBlock": "the RG-LRU recurrence",
    "RwkvSelfAttention": "RWKV's time mixing",
    "xLSTMLayer": "mLSTM",
    "ZayaCCAProjection": "compressed convolutional attention",
    **dict.fromkeys(
        (f"Inkling{version}ShortConvolution" for version in ("", "2", "2Loop")),
        "convolutions beside their attention",
    ),
}
_KNOWN = f"only full and sliding softmax attention, {KNOWN_RECURRENCES} can be used with thoughts"


def check_supported(model: PreTrainedModel) -> None:
    """Reject a decoder that cannot think, with the reason, as far as it can be known up front.

    What only a pass can show (a family that drops the layout) is checked by
    :func:`quietstar.thinking.attention.check_layers`.

    Raises:
        ValueError: for layers that neither attend by softmax nor hand states on in a known way, chunked
            or bidirectional attention, or a family outside transformers' attention interface.
    """
    config = text_config_of(model.config)
    kind = kind_of(model)
    types = getattr(config, "layer_types", None) or []
    layers = decoder_layers(model)
    for layer in layers:
        for part in layer.modules():
            name = type(part).__name__
            if name in _NOT_KNOWN:
                raise ValueError(f"{kind} has layers with {_NOT_KNOWN[name]} ({name}); {_KNOWN}")
    for index, layer_type in enumerate(types):
        if layer_type in RECURRENT + BOTH:
            known = index < len(layers) and mixer_of(layers[index]) is not None
        else:
            known = layer_type in ATTENTION + ALONE
        if not known:
            raise ValueError(f"{kind} has layers of type {layer_type!r}; {_KNOWN}")
    if types and not set(types) & set(ATTENTION + BOTH):
        raise ValueError(
            f"{kind} has no attention layer, by whose keys a cache counts its tokens; expected a decoder"
            " that has one"
        )
    if getattr(config, "attention_chunk_size", None) is not None and types:
        raise ValueError(f"{kind} attends in chunks, which cannot be used with thoughts")
    # "vision": the tokens of an image alone, and a text has none.
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):
        raise ValueError(f"{kind} attends in both directions; expected a causal decoder")
    if getattr(config, "hidden_size_per_layer_input", None):
        raise ValueError(
            f"{kind} has token embeddings for each layer (hidden_size_per_layer_input is"
            f" {config.hidden_size_per_layer_input}), and a slot that holds a meta token has none;"
            " expected a decoder without them"
        )
    body = text_body(model)
    if body is model:
        raise ValueError(
            f"{type(model).__name__} has no body apart from its output layer (base_model); this model"
            " family cannot be used with thoughts"
        )
    if embedding_rows(model.get_input_embeddings()) is None:
        raise ValueError(
            f"{type(model).__name__} does not embed its tokens by one table; expected a decoder of text"
        )
    if not type(body)._can_set_attn_implementation():
        raise ValueError(
            f"{kind} does not use transformers' attention interface; it would silently run without"
            " thoughts"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{kind} has no output embeddings; expected a causal language model")


def check_reopens(model: PreTrainedModel) -> None:
    """Reject a decoder that a saved Quiet-STaR model could not be opened with.

    Raises:
        ValueError: transformers' Auto classes do not lead from its configuration to its class.
    """
    config = model.config
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and config.model_type in CONFIG_MAPPING
    known = known and CONFIG_MAPPING[config.model_type] is type(config)
    if known:
        opened = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        opened = opened if isinstance(opened, tuple | list) else (opened,)
        # FSDP2 puts a class of its own, without code of the model's, in front of a module's.
        kinds = [kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.")]
        own = next((kind for kind in kinds if not kind.__name__.startswith("FSDP")), type(model))
        known = own in opened
    if not known:
        raise ValueError(
            f"{type(model).__name__} could not be opened again after saving: AutoConfig and"
            f" AutoModelForCausalLM do not know its {type(config).__name__} (model type"
            f" {config.model_type!r}); expected a decoder of transformers, or one that was"
            " registered with both"
        )
