"""Attention of thought slots over a text range and their own column, in plain PyTorch."""

from __future__ import annotations

import torch

from quietstar_ext.precision import compute_dtype
from quietstar_ext.thought_attention.call import ThoughtAttention


def reference(call: ThoughtAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, Hq, Sq, M, D] and lse [B, Hq, Sq, M].

    The text scores are one batched product and the slot scores a product within each column, so the
    memory is that of [B, Hq, Sq, M, N + Sk] scores and never of slots x slots.
    """
    q, k_text, v_text, k_thought, v_thought, text_start, text_stop, sinks, scale, window, softcap = call
    batch, q_heads, slots, columns, size = q.shape
    heads, groups = k_text.shape[1], q_heads // k_text.shape[1]
    dtype = compute_dtype(q.dtype)
    k_text, v_text, k_thought, v_thought = (t.to(dtype) for t in (k_text, v_text, k_thought, v_thought))
    rows = (q.to(dtype) * scale).reshape(batch, heads, groups, slots, columns, size)

    text_scores = rows.flatten(2, 4) @ k_text.transpose(-1, -2)
    text_scores = text_scores.reshape(batch, heads, groups, slots, columns, k_text.shape[2])
    slot_scores = torch.einsum("bhgsmd,bhtmd->bhgsmt", rows, k_thought)
    if softcap:
        text_scores = softcap * torch.tanh(text_scores / softcap)
        slot_scores = softcap * torch.tanh(slot_scores / softcap)
    text_seen, slot_seen = visible(
        text_start, text_stop, slots, k_thought.shape[2], k_text.shape[2], window
    )
    text_scores = text_scores.masked_fill(~text_seen[:, None, None], -torch.inf)
    slot_scores = slot_scores.masked_fill(~slot_seen, -torch.inf)

    # One softmax over both parts, shifted by its largest logit. The shift cancels, so it needs no
    # gradient; where there is no logit at all it is 0, which turns every weight into exp(-inf) = 0.
    top = torch.maximum(_largest(text_scores), _largest(slot_scores))
    if sinks is not None:
        sinks = sinks.to(dtype).reshape(heads, groups, 1, 1)
        top = torch.maximum(top, sinks.detach())
    top = top.masked_fill(top == -torch.inf, 0)
    text_weights = torch.exp(text_scores - top[..., None])
    slot_weights = torch.exp(slot_scores - top[..., None])
    total = text_weights.sum(-1) + slot_weights.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    out = (text_weights.flatten(2, 4) @ v_text).reshape(rows.shape)
    out = out + torch.einsum("bhgsmt,bhtmd->bhgsmd", slot_weights, v_thought)

    empty = total == 0
    total = total.masked_fill(empty, 1)
    out = out / total[..., None]
    lse = (top + torch.log(total)).masked_fill(empty, -torch.inf)
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:-1])


def visible(
    text_start: torch.Tensor,
    text_stop: torch.Tensor,
    query_slots: int,
    key_slots: int,
    text_length: int,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys a query sees: text [B, Sq or 1, M, N] and slots [Sq, 1, Sk], as booleans."""
    key = torch.arange(text_length, device=text_start.device)
    slot = torch.arange(key_slots - query_slots, key_slots, device=text_start.device)[:, None]
    start, stop = text_start[:, None, :, None].long(), text_stop[:, None, :, None].long()
    text_seen = (key >= start) & (key < stop)
    if window:
        depth = slot[:, :, None] + 1
        text_seen = text_seen & (key >= stop + depth - window)
    key_slot = torch.arange(key_slots, device=text_start.device)
    slot_seen = key_slot <= slot
    if window:
        slot_seen = slot_seen & (slot - key_slot < window)
    return text_seen, slot_seen[:, None]


def _largest(scores: torch.Tensor) -> torch.Tensor:
    """The row maximum, without gradient; -inf for rows of no entries."""
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -torch.inf)
    return scores.detach().amax(-1)
