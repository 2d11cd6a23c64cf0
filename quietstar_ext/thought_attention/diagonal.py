"""The kernel of the slot part alone (``csrc/cuda/thought_diagonal.cu``): how tensors reach it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from quietstar_ext.native import DTYPE_CODES, cuda_device, cuda_kernels
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
    cuda_kernels().cuda_thought_diagonal(
        DTYPE_CODES[call.q.dtype],
        _sizes(call),
        *map(_place, call[:5]),
        *map(_place, (call.out, call.lse)),
        0 if call.sinks is None else call.sinks.data_ptr(),
        call.scale,
        *cuda_device(call.q),
    )


def diagonal_backward(call: ThoughtDiagonalBackward) -> None:
    """Write dq (with text_dq added, where it is given), dk_thought, dv_thought and delta."""
    forward = call.forward
    cuda_kernels().cuda_thought_diagonal_backward(
        DTYPE_CODES[forward.q.dtype],
        _sizes(forward),
        *map(_place, (*forward[:3], forward.out, forward.lse)),
        forward.scale,
        *map(_place, call[1:]),
        *cuda_device(forward.q),
    )


def _place(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Address and strides; a tensor of numbers per row [B, H, S, M] counts as one of rows."""
    if tensor is None:
        return 0, (0,) * 5
    address, strides = place(tensor)
    return address, strides if len(strides) == 5 else (*strides, 1)


def _sizes(call: ThoughtDiagonal) -> tuple[int, ...]:
    batch, q_heads, slots, columns, size = call.q.shape
    return batch, q_heads, call.k_thought.shape[1], slots, call.k_thought.shape[2], columns, size
