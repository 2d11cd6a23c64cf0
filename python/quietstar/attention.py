"""The attention function that lets an unmodified Hugging Face decoder think.

It is registered with transformers' AttentionInterface. Without a layout it hands over to the model's
ordinary attention; with one it splits the rows: text rows are ordinary causal attention, slot rows go
to :func:`quietstar_ext.thought_attention`, which never sees or builds a mask.

What makes a model silently wrong is refused here: a family that does not hand the layout down, layers
that are no softmax attention, windows that live in a mask only, and rotary embeddings that change with
the longest position.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from quietstar_ext import thought_attention

from .layout import LayerKeys, ThoughtLayout

# Neutral names: transformers dispatches on names that contain "sdpa", "flash", "flex" or "paged".
_FALLBACKS = {"thought": "sdpa", "thought_plain": "eager"}

# Layer types that are ordinary softmax attention over a prefix or a window of it.
_KNOWN_LAYER_TYPES = ("full_attention", "sliding_attention")
# Rotary embeddings whose frequencies depend on the largest position id of the pass.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def _attention(fallback: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        thought_layout: ThoughtLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if thought_layout is None:
            function = _fallback_function(module, fallback)
            return function(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        if dropout:
            raise ValueError(
                f"attention dropout is {dropout}; expected 0 with thoughts, because a thought has to be"
                " scored by the network that sampled it, and with several documents in a row"
                " (disable_dropout: true switches it off)"
            )
        return _with_thoughts(module, query, key, value, scaling, thought_layout, kwargs), None

    return forward


def _fallback_function(module: nn.Module, fallback: str) -> Callable[..., Any]:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return AttentionInterface().get_interface(fallback, eager)


def _with_thoughts(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    layout: ThoughtLayout,
    kwargs: dict[str, Any],
) -> Tensor:
    """query [B, Hq, L, D], key/value [B, Hkv, L, D] -> [B, L, Hq, D], L as the layout's phase says."""
    layer = _note_layer(module, layout)
    window = kwargs.get("sliding_window")
    _check_window(module, layer, window)
    options: dict[str, Any] = {
        "scale": scaling,
        "sliding_window": window,
        "softcap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
    }
    n = layout.text_length
    if layout.phase == "slot":
        return _slot_step(layout, layout.keys[layer], query, key, value, options)
    text = _text_rows(module, layout, query[:, :, :n], key[:, :, :n], value[:, :, :n], options)
    if layout.phase == "text":
        layout.keys[layer] = LayerKeys(key, value)
        return text
    columns = (layout.num_slots, layout.num_columns)
    slots = thought_attention(
        query[:, :, n:].unflatten(2, columns),
        key[:, :, :n],
        value[:, :, :n],
        key[:, :, n:].unflatten(2, columns),
        value[:, :, n:].unflatten(2, columns),
        layout.text_start,
        layout.text_stop,
        every_position=layout.every_position,
        **options,
    )
    return torch.cat([text, slots.flatten(2, 3).transpose(1, 2)], dim=1)


def _text_rows(
    module: nn.Module,
    layout: ThoughtLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """Text rows [B, Hq, N, D] -> [B, N, Hq, D]: the stock causal kernel where it is exact and enough."""
    window = options["sliding_window"]
    special = options["softcap"] is not None or options["sinks"] is not None
    if layout.plain_text and not special and (window is None or window >= layout.text_length):
        out, _ = _fallback_function(module, "sdpa")(
            module, query, key, value, None, dropout=0.0, scaling=options["scale"], is_causal=True
        )
        return out
    # A text token is a column without slots that ends with itself.
    batch, heads, _, dim = key.shape
    nothing = key.new_empty(batch, heads, 0, layout.text_length, dim)
    out = thought_attention(
        query[:, :, None],
        key,
        value,
        nothing,
        nothing,
        layout.row_start,
        layout.row_stop,
        **options,
    )
    return out[:, :, 0].transpose(1, 2)


def _slot_step(
    layout: ThoughtLayout,
    keys: LayerKeys,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """One slot of every column: query [B, Hq, M, D] -> [B, M, Hq, D]; keeps the slot's key and value."""
    batch, heads, columns, dim = key.shape
    if keys.k_thought is None or keys.v_thought is None:
        shape = (batch, heads, layout.num_slots, columns, dim)
        keys.k_thought, keys.v_thought = key.new_empty(shape), value.new_empty(shape)
    keys.k_thought[:, :, layout.slot] = key
    keys.v_thought[:, :, layout.slot] = value
    seen = layout.slot + 1
    start, stop = layout.text_start, layout.text_stop
    if keys.offset:
        start, stop = (start - keys.offset).clamp(min=0), (stop - keys.offset).clamp(min=0)
    out = thought_attention(
        query[:, :, None],
        keys.k_text,
        keys.v_text,
        keys.k_thought[:, :, :seen],
        keys.v_thought[:, :, :seen],
        start,
        stop,
        **options,
    )
    return out[:, :, 0].transpose(1, 2)


def _note_layer(module: nn.Module, layout: ThoughtLayout) -> int:
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ValueError(
            f"{type(module).__name__} has no layer_idx; this model family cannot be used with thoughts"
        )
    layout.layers_seen[layer] = layout.layers_seen.get(layer, 0) + 1
    return layer


def _check_window(module: nn.Module, layer: int, window: int | None) -> None:
    """Refuse a window that the configuration announces but the layer does not hand over."""
    config = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if types is not None:
        announced = types[layer] == "sliding_attention"
    else:
        announced = getattr(config, "sliding_window", None) is not None
    if announced and window is None:
        raise ValueError(
            f"{type(module).__name__} applies its sliding window in the attention mask only; such a"
            " model family cannot be used with thoughts (or set sliding_window to None in its"
            " configuration, if your texts are shorter than the window)"
        )


def check_layers(layout: ThoughtLayout, config: PretrainedConfig) -> None:
    """After a pass: every layer must have used the layout exactly once, or thoughts were ignored."""
    layers = config.num_hidden_layers
    once = all(count == 1 for count in layout.layers_seen.values())
    if len(layout.layers_seen) != layers or not once:
        raise ValueError(
            f"model type {config.model_type!r}: {len(layout.layers_seen)} of {layers} layers used the"
            " thought layout once each; this model family does not pass it on to its attention and"
            " would silently run without thoughts"
        )
    layout.layers_seen.clear()


def check_supported(model: PreTrainedModel) -> None:
    """Refuse, with the reason, a decoder that cannot think in this way (what can be known up front).

    What only a pass can show (a family that drops the layout) is checked by :func:`check_layers`.

    Raises:
        ValueError: for layers other than softmax attention, chunked or bidirectional attention,
            or a family outside transformers' attention interface.
    """
    config = model.config
    kind = f"model type {config.model_type!r}"
    types = getattr(config, "layer_types", None) or []
    for layer_type in types:
        if layer_type not in _KNOWN_LAYER_TYPES:
            raise ValueError(
                f"{kind} has layers of type {layer_type!r}; only full and sliding softmax attention"
                " can be used with thoughts"
            )
    if getattr(config, "attention_chunk_size", None) is not None and types:
        raise ValueError(f"{kind} attends in chunks, which cannot be used with thoughts")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"{kind} attends in both directions; expected a causal decoder")
    if not type(model)._can_set_attn_implementation():
        raise ValueError(
            f"{kind} does not use transformers' attention interface; it would silently run without"
            " thoughts"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{kind} has no output embeddings; expected a causal language model")


def check_length(config: PretrainedConfig, longest: int) -> None:
    """Refuse positions that a decoder's position embedding cannot reach without side effects.

    Args:
        config: the decoder's configuration.
        longest: the number of positions needed, text length plus slots.
    """
    learned = getattr(config, "n_positions", None)
    if learned is not None and longest > learned:
        raise ValueError(
            f"text and thought need {longest} positions; {config.model_type!r} has {learned} learned"
            " ones"
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    groups = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for group in groups:
        kind = group.get("rope_type", group.get("type"))
        if kind not in _LENGTH_DEPENDENT_ROPE:
            continue
        limit = group.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", config.max_position_embeddings
        )
        if longest > limit:
            raise ValueError(
                f"text and thought need {longest} positions; with {kind!r} rotary embeddings a slot"
                f" past {limit} would change the text's own predictions, so it is refused"
            )


def implementation_name(model: PreTrainedModel) -> str:
    """The registered name for a decoder: torch's fused attention, or plain products, serve its text.

    Some families lack the first, and some releases of transformers let a model with a soft-cap on its
    attention take it, which leaves the cap out.
    """
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    fused = getattr(type(model), "_supports_sdpa", False) and not capped
    return "thought" if fused else "thought_plain"


for _name, _fallback in _FALLBACKS.items():
    AttentionInterface.register(_name, _attention(_fallback))
    # Without a mask function transformers drops 2-D padding masks silently in ordinary passes.
    AttentionMaskInterface.register(_name, {"sdpa": sdpa_mask, "eager": eager_mask}[_fallback])
