"""The attention function that lets an unmodified Hugging Face decoder think.

It is registered with transformers' AttentionInterface. Without a layout it hands over to the model's
ordinary attention; with one it splits the rows: text rows are ordinary causal attention, slot rows go
to :func:`quietstar_ext.thought_attention`, which never sees or builds a mask.

What would silently be wrong is rejected with an error: families that do not hand the layout down, layers
that are not softmax attention, windows that live in a mask only, masks that a layer makes for itself and
options that this function does not know. What only a comparison can show is left to
:mod:`quietstar.thinking.self_check`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from quietstar.thinking.layout import HandedKeys, LayerKeys, ThoughtLayout
from quietstar.thinking.recurrent.mixers import hand_layouts_to_mixers, layers_of_both_kinds
from quietstar.thinking.shared_start import Columns, join_rows, split_rows
from quietstar.thinking.text_part import kind_of, text_config_of
from quietstar_ext import thought_attention
from quietstar_ext.thought_attention.composed import gains_by_rationale_major

# Neutral names: transformers dispatches on names that contain "sdpa", "flash", "flex" or "paged".
# "thought_plain" serves families without torch's fused attention, "thought_eager" those that were loaded
# with attn_implementation="eager": their text rows are plain products as well.
_FALLBACKS = {"thought": "sdpa", "thought_plain": "eager", "thought_eager": "eager"}

# Options of an attention function that the thoughts' one obeys ...
_OBEYED = {"sliding_window", "softcap", "s_aux"}
# ... and those that travel along and change nothing here.
_HARMLESS = {
    "cache_position",
    "deterministic",
    "is_causal",  # checked by itself
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "token_type_ids",
    "use_cache",
}


def _attention(name: str, fallback: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        thought_layout: ThoughtLayout | HandedKeys | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(thought_layout, HandedKeys):
            thought_layout.keys[_note_layer(module, thought_layout)] = (key, value)
            thought_layout = None
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
        _check_call(module, attention_mask, kwargs)
        call = _Call(module, query, key, value, scaling, kwargs)
        run = _with_thoughts_apart if thought_layout.apart else _with_thoughts
        return run(call, thought_layout, plain_products=name == "thought_eager"), None

    return forward


def _fallback_function(module: nn.Module, fallback: str) -> Callable[..., Any]:
    homes = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)
    found = (getattr(home, "eager_attention_forward", None) for home in homes)
    function = AttentionInterface().get_interface(fallback, next(filter(None, found), None))
    if function is None:
        raise NotImplementedError(
            f"attn_implementation is {fallback!r}, and {type(module).__name__} has no function of that"
            " kind; expected a family that uses transformers' attention interface"
        )
    return function


def _check_call(module: nn.Module, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Reject what a layer asks of its attention that a pass with thoughts would ignore."""
    name = type(module).__name__
    # The mask of run_decoder is one element; cut or cast it stays one.
    if mask is not None and (not isinstance(mask, Tensor) or mask.numel() != 1):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{name} attends with a mask of its own ({shape}), which would be ignored; this model family"
            " cannot be used with thoughts"
        )
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(f"{name} has is_causal=False; expected a decoder's layer, which is causal")
    for key, given in kwargs.items():
        if given is not None and key not in _OBEYED and key not in _HARMLESS:
            raise ValueError(
                f"{name} calls its attention with {key}, which would be ignored; this model family"
                " cannot be used with thoughts"
            )


class _Call(NamedTuple):
    """What a layer calls its attention with: query [B, Hq, L, D], key [B, Hkv, L, D], value
    [B, Hkv, L, E], L as the layout's phase says."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float | None
    others: dict[str, Any]

    def options(self) -> dict[str, Any]:
        """The options of :func:`thought_attention`."""
        return {
            "scale": self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling,
            "sliding_window": self.others.get("sliding_window"),
            "softcap": self.others.get("softcap"),
            "sinks": self.others.get("s_aux"),
        }


def _with_thoughts(call: _Call, layout: ThoughtLayout, plain_products: bool) -> Tensor:
    """[B, L, Hq, E]."""
    layer = _note_layer(call.module, layout)
    _check_window(call.module, layer, call.others.get("sliding_window"))
    if layout.phase == "slot":
        return _slot_step(call, layout, layout.keys[layer])
    text_rows = _text_rows_eager if plain_products else _text_rows
    if layout.phase == "text":
        layout.keys[layer] = layer_keys(call.key, call.value)
        return text_rows(call, layout)
    columns = _columns_of(call, layout)
    (query, q), (key, k), (value, v) = (
        split_rows(tensor, layout.text_length, columns) for tensor in call[1:4]
    )
    text = text_rows(_Call(call.module, query, key, value, call.scaling, call.others), layout)
    slots = _attend(
        *(q, key, value, k, v),
        *layout.column_ranges(columns.rationale_major),
        every_position=layout.every_position,
        rationale_major=columns.rationale_major,
        **call.options(),
    )
    slots = slots[..., : value.shape[-1]]
    return join_rows(text, slots, columns)


def _columns_of(call: _Call, layout: ThoughtLayout) -> Columns:
    """How the columns are to lie for the operator, where rationales are copied anyway."""
    columns = layout.columns
    if columns.rationales == 1 or not layout.every_position:
        return columns
    options, grid = call.options(), (layout.num_slots, columns.total)
    k_text = call.key[:, :, : layout.text_length]
    gains = gains_by_rationale_major(
        call.query, k_text, grid, options["sliding_window"], options["softcap"]
    )
    return columns._replace(rationale_major=gains)


# A graph break for torch.compile, so that what it makes of a layer serves all layers and all slots.
_with_thoughts_apart = torch.compiler.disable(_with_thoughts)


def layer_keys(key: Tensor, value: Tensor, offset: int = 0) -> LayerKeys:
    """Keys and values [B, Hkv, N, D or E] for a rollout, at the one width that the operator takes."""
    width = max(key.shape[-1], value.shape[-1])
    return LayerKeys(_widened(key, width), _widened(value, width), offset)


def _attend(q: Tensor, k_text: Tensor, v_text: Tensor, *rest: Any, **options: Any) -> Tensor:
    """:func:`thought_attention` where keys and values (multi-head latent attention) differ in width.

    Zeros behind a key add nothing to its products, and behind a value nothing but columns of zeros,
    which are left in the result: the caller cuts them off.
    """
    k_thought, v_thought, *ranges = rest
    tensors = (q, k_text, v_text, k_thought, v_thought)
    width = max(tensor.shape[-1] for tensor in tensors)
    return thought_attention(*(_widened(tensor, width) for tensor in tensors), *ranges, **options)


def _widened(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


def _text_rows(call: _Call, layout: ThoughtLayout) -> Tensor:
    """Text rows [B, Hq, N, D] -> [B, N, Hq, E]: the stock causal kernel where it is exact and enough."""
    options, (query, key, value) = call.options(), call[1:4]
    window = options["sliding_window"]
    special = options["softcap"] is not None or options["sinks"] is not None
    if layout.plain_text and not special and (window is None or window >= layout.text_length):
        scale = options["scale"]
        out, _ = _fallback_function(call.module, "sdpa")(
            call.module, query, key, value, None, dropout=0.0, scaling=scale, is_causal=True
        )
        return out
    # A text token is a column without slots that ends with itself.
    batch, heads, _, dim = key.shape
    nothing = key.new_empty(batch, heads, 0, layout.text_length, dim)
    out = _attend(
        query[:, :, None], key, value, nothing, nothing, layout.row_start, layout.row_stop, **options
    )
    return out[:, :, 0, :, : value.shape[-1]].transpose(1, 2)


def _text_rows_eager(call: _Call, layout: ThoughtLayout) -> Tensor:
    """Text rows by the family's own plain products, as it was loaded to; under a mask [B, 1, N, N]."""
    query, window = call.query, call.others.get("sliding_window")
    position = torch.arange(layout.text_length, device=query.device)
    seen = position >= layout.row_start[:, :, None]
    seen &= position < layout.row_stop[:, :, None]
    if window is not None:
        seen &= position > position[:, None] - window
    hidden = torch.finfo(query.dtype).min
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(~seen, hidden)
    out, _ = _fallback_function(call.module, "eager")(
        *call[:4], mask[:, None], dropout=0.0, scaling=call.scaling, **call.others
    )
    return out


def _slot_step(call: _Call, layout: ThoughtLayout, keys: LayerKeys) -> Tensor:
    """Slots of every column, c of them: query [B, Hq, c*M, D] -> [B, c*M, Hq, E], of a start slot that
    rationales share [B, Hq, A, D] -> [B, A, Hq, E]; keeps their keys and values."""
    repeats = layout.repeats
    columns = (layout.at_once, layout.num_columns // repeats)
    query, key, value = (tensor.unflatten(2, columns) for tensor in call[1:4])
    width = keys.k_text.shape[-1]
    if keys.k_thought is None or keys.v_thought is None:
        shape = (*key.shape[:2], layout.num_slots, layout.num_columns, width)
        keys.k_thought, keys.v_thought = key.new_empty(shape), value.new_empty(shape)
    behind = layout.slot + layout.at_once
    for kept, new in ((keys.k_thought, key), (keys.v_thought, value)):
        place = kept[:, :, layout.slot : behind].unflatten(3, (-1, repeats))
        place.copy_(_widened(new, width)[:, :, :, :, None])
    start, stop = layout.text_start[:, ::repeats], layout.text_stop[:, ::repeats]
    if keys.offset:
        start, stop = (start - keys.offset).clamp(min=0), (stop - keys.offset).clamp(min=0)
    k_thought, v_thought = (kept[:, :, :behind, ::repeats] for kept in (keys.k_thought, keys.v_thought))
    text = (keys.k_text, keys.v_text)
    out = _attend(query, *text, k_thought, v_thought, start, stop, **call.options())
    return out[..., : value.shape[-1]].flatten(2, 3).transpose(1, 2)


def _note_layer(module: nn.Module, layout: ThoughtLayout | HandedKeys) -> int:
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ValueError(
            f"{type(module).__name__} has no layer_idx; this model family cannot be used with thoughts"
        )
    layout.layers_seen[layer] = layout.layers_seen.get(layer, 0) + 1
    return layer


def _check_window(module: nn.Module, layer: int, window: int | None) -> None:
    """Reject a window that the configuration announces and the layer does not hand over."""
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


def check_layers(layout: ThoughtLayout | HandedKeys, decoder: PreTrainedModel) -> None:
    """After a pass: every layer must have used the layout exactly once, or thoughts were ignored."""
    config = text_config_of(decoder.config)
    kind, count = kind_of(decoder), config.num_hidden_layers
    seen, layout.layers_seen = layout.layers_seen, {}
    recurrent, layout.recurrent_seen = layout.recurrent_seen, {}
    attends, hands_on = layers_of_both_kinds(decoder)
    missing = sorted((attends - set(seen)) | (hands_on - set(recurrent)))
    repeated = sorted(
        {layer for each in (seen, recurrent) for layer, times in each.items() if times > 1}
    )
    implementation = config._attn_implementation
    if missing and implementation not in _FALLBACKS:
        raise ValueError(
            f"attn_implementation of the decoder was set to {implementation!r} after it was given"
            " thoughts, which it would ignore; choose it when loading the decoder"
        )
    if len(missing) == count and not repeated:
        raise ValueError(
            f"{kind} does not hand the thought layout down to its attention layers; it would silently"
            " run without thoughts"
        )
    if missing:
        raise ValueError(
            f"{kind}: {_layers(missing)} of {count} made no use of the thought layout, and would"
            " silently run without thoughts"
        )
    if repeated:
        raise ValueError(
            f"{kind}: {_layers(repeated)} of {count} attended more than once in one pass; such a model"
            " family cannot be used with thoughts"
        )
    if len(seen) > len(attends):
        raise ValueError(
            f"{kind} attended in {len(seen)} layers and its configuration announces {count}; such a"
            " model family cannot be used with thoughts"
        )


def _layers(numbers: list[int]) -> str:
    few = ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")
    return f"layer {few}" if len(numbers) == 1 else f"layers {few}"


def take_layouts(model: PreTrainedModel) -> None:
    """Let a decoder's layers, attention and others, take part in passes with a layout.

    Raises:
        ValueError: the decoder was loaded with an ``attn_implementation`` that cannot.
    """
    # The layers look their attention up in this very object at every call.
    model.config._attn_implementation = _implementation_name(model)
    hand_layouts_to_mixers(model)


def _implementation_name(model: PreTrainedModel) -> str:
    """The registered name for a decoder: what it was loaded with serves ordinary passes and text rows.

    Some families lack torch's fused attention, and some releases of transformers let a model with a
    soft-cap on its attention take it, which leaves the cap out: they get plain products.

    Raises:
        ValueError: the decoder was loaded with another ``attn_implementation``.
    """
    config = text_config_of(model.config)
    loaded = config._attn_implementation
    if loaded in _FALLBACKS:
        return loaded
    if loaded not in (None, "sdpa", "eager"):
        raise ValueError(
            f"attn_implementation is {loaded!r}; expected 'sdpa' or 'eager', which can be combined with"
            " thoughts (or none: the family's own)"
        )
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if not getattr(type(model), "_supports_sdpa", False) or capped:
        return "thought_plain"
    return "thought_eager" if loaded == "eager" else "thought"


for _name, _fallback in _FALLBACKS.items():
    AttentionInterface.register(_name, _attention(_name, _fallback))
    # Without a mask function transformers drops 2-D padding masks silently in ordinary passes.
    AttentionMaskInterface.register(_name, {"sdpa": sdpa_mask, "eager": eager_mask}[_fallback])
