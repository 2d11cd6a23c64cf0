"""One layer's recurrences in one pass: over the text, over the columns' slots, or over both."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from quietstar.thinking.layout import HandedKeys, LayerStates, ThoughtLayout
from quietstar.thinking.recurrent.convolution import inputs_behind, over_columns, over_text
from quietstar.thinking.recurrent.linear_attention import (
    AnchorStates,
    Folding,
    Rows,
    TextMemory,
    over_slots,
)
from quietstar.thinking.recurrent.linear_attention import over_text as attend_over_text
from quietstar.thinking.shared_start import join_rows, split_rows


class LayerPass:
    """What a layer's convolution and scan are replaced by while it runs with a layout.

    Args:
        layer: its index.
        cache: in an ordinary pass over cached text (:class:`HandedKeys`), where the states come from
            and go to.
    """

    def __init__(self, layout: ThoughtLayout | HandedKeys, layer: int, cache: Any = None):
        self._layout, self._layer, self._cache = layout, layer, cache
        self._states = layout.states.setdefault(layer, LayerStates())

    # ---- convolutions ---------------------------------------------------------------------------

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        """[B, D, L] -> [B, D, L]; weight [D, k], bias [D]."""
        rows = x.transpose(1, 2).to(weight.dtype)
        if isinstance(self._layout, HandedKeys):
            out = self._convolve_cached(self._layout, rows, weight, bias)
        else:
            out = self._convolve(self._layout, rows, weight, bias)
        if activation is not None:
            out = ACT2FN[activation](out)
        return out.transpose(1, 2).to(x.dtype)

    def _convolve(self, layout: ThoughtLayout, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        states, before = self._states, weight.shape[1] - 1
        text_start = None if layout.plain_text else layout.row_start
        if layout.phase == "text":
            states.inputs = x
            return over_text(x, weight, bias, text_start)
        if layout.phase == "packed":
            text, slots = split_rows(x[:, None], layout.text_length, layout.columns)
            text, slots = text[:, 0], slots[:, 0]
            behind = inputs_behind(text, layout.anchors, layout.text_start, before)
            out = over_columns(torch.cat([behind, slots], dim=1), weight, bias)
            text = over_text(text, weight, bias, text_start)
            return join_rows(text[:, :, None], out[:, None], layout.columns)[:, :, 0]
        columns = x.unflatten(1, (layout.at_once, -1))
        if states.behind is None:
            assert states.inputs is not None
            anchors, start = (t[:, :: layout.repeats] for t in (layout.anchors, layout.text_start))
            states.behind = inputs_behind(states.inputs, anchors, start, before)
        history = torch.cat([states.behind.to(columns), columns], dim=1)
        states.behind = history[:, layout.at_once :].repeat_interleave(layout.repeats, dim=2)
        return over_columns(history, weight, bias).flatten(1, 2)

    def _convolve_cached(
        self, handed: HandedKeys, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        start, size = handed.row_start, weight.shape[1]
        assert start is not None
        place = torch.arange(x.shape[1], device=x.device)
        x = x.masked_fill((place < start)[..., None], 0)  # padding
        layer = self._cache.layers[self._layer]
        past = None
        if layer.has_previous_state[0]:
            past = layer.conv_states[0][..., layer.conv_states[0].shape[-1] + 1 - size :].transpose(1, 2)
        behind = F.pad(x, (0, 0, size - 1, 0)) if past is None else torch.cat([past.to(x), x], dim=1)
        self._states.behind = behind[:, behind.shape[1] + 1 - size :, None]
        out = over_text(x, weight, bias, start, past)
        self._cache.update_conv_state(x.transpose(1, 2), self._layer, conv_kernel_size=size)
        return out

    # ---- linear attention -----------------------------------------------------------------------

    def attend(self, rows: Rows, transposed: bool = False) -> Tensor:
        """Outputs [B, H, L, V] of rows [B, H, L, ...].

        Args:
            transposed: whether the family's cache has states as [B, H, V, K].
        """
        device = rows.query.device.type
        with torch.autocast(device, enabled=False):
            rows = rows.each(torch.Tensor.float)
            if isinstance(self._layout, HandedKeys):
                return self._attend_cached(self._layout, rows, transposed)
            return self._attend(self._layout, rows)

    def _attend(self, layout: ThoughtLayout, rows: Rows) -> Tensor:
        states = self._states
        if layout.phase == "text":
            out, states.memory, _ = attend_over_text(rows, layout.row_start)
            return out
        if layout.phase == "packed":
            sizes = (layout.text_length, layout.columns)
            parts: list[Any] = [(None, None) if t is None else split_rows(t, *sizes) for t in rows]
            text, slots = (Rows(*found) for found in zip(*parts, strict=True))
            out, memory, _ = attend_over_text(text, layout.row_start)
            grid, _ = over_slots(slots, AnchorStates(memory, _folding(layout, memory)))
            joined = join_rows(out.transpose(1, 2), grid, layout.columns)
            return joined.transpose(1, 2)
        assert states.memory is not None
        count = (layout.at_once, layout.num_columns // layout.repeats)
        columns = rows.each(lambda t: t.unflatten(2, count))
        anchors = AnchorStates(states.memory, _folding(layout, states.memory))
        out, slots_so_far = over_slots(columns, anchors, states.slots)
        states.slots = slots_so_far.repeated(layout.repeats)
        return out.flatten(2, 3)

    def _attend_cached(self, handed: HandedKeys, rows: Rows, transposed: bool) -> Tensor:
        layer = self._cache.layers[self._layer]
        past = layer.recurrent_states[0] if layer.is_recurrent_states_initialized[0] else None
        if past is not None and transposed:
            past = past.mT
        assert handed.row_start is not None
        out, _, state = attend_over_text(rows, handed.row_start, past)
        self._states.memory = TextMemory.of_state(state)
        self._cache.update_recurrent_state(state.mT if transposed else state, self._layer)
        return out


def _folding(layout: ThoughtLayout, memory: TextMemory) -> Folding:
    """Of a pass's columns, the same for all layers."""
    _, _, chunks, size, _ = memory.keys.shape
    key = (layout.repeats if layout.phase == "slot" else 1, size, chunks)
    if key not in layout.foldings:
        anchors, start = (t[:, :: key[0]] for t in (layout.anchors, layout.text_start))
        if layout.goes_on_from_states:
            start = torch.full_like(start, -1)  # the whole text lies before the chunk
        layout.foldings[key] = Folding(anchors, start, size, chunks)
    return layout.foldings[key]
