"""The kernel of the slot part alone (``csrc/cuda/thought_diagonal.cu``): how tensors reach it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from quietstar_ext.native import cuda_device, cuda_kernels, fields
from quietstar_ext.thought_attention.call import place


class ThoughtDiagonal(NamedTuple):
    """Slots and text part, merged. Every tensor may have any strides but the last, which is 1."""

    q: Tensor  # [B, Hq, Sq, M, D]
    k_thought: Tensor  # [B, Hkv, Sk, M, D]
    v_thought: Tensor  # [B, Hkv, Sk, M, D]
    text_out: Tensor | None  # as out; None without text
    text_lse: Tensor | None  # as lse
    sinks: Tensor | None  # [Hq] float32 contiguous
    out: Tensor  # [B, Hq, Sq, M, D]
    lse: Tensor  # [B, Hq, Sq, M] float32
    scale: float


class ThoughtDiagonalBackward(NamedTuple):
    """Its backward pass; text_out, text_lse and sinks of the forward call are not looked at."""

    forward: ThoughtDiagonal
    dout: Tensor
    text_dq: Tensor | None  # added to dq
    dq: Tensor
    dk_thought: Tensor
    dv_thought: Tensor
    delta: Tensor  # as lse


def diagonal_forward(call: ThoughtDiagonal) -> None:
    """Write out and lse."""
    cuda_kernels().cuda_thought_diagonal(_fields(call), cuda_device(call.q))


def diagonal_backward(call: ThoughtDiagonalBackward) -> None:
    """Write dq (with text_dq added, where it is given), dk_thought, dv_thought and delta."""
    taken = (_fields(call.forward), *map(place, call[1:]))
    cuda_kernels().cuda_thought_diagonal_backward(taken, cuda_device(call.forward.q))


def _fields(call: ThoughtDiagonal) -> tuple[Any, ...]:
    batch, q_heads, slots, columns, size = call.q.shape
    heads, key_slots = call.k_thought.shape[1:3]
    return fields(
        *(call.q.dtype, batch, q_heads, heads, slots, key_slots, columns, size),
        *(*map(place, (*call[:5], call.out, call.lse)), call.sinks, call.scale),
    )
