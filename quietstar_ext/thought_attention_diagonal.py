"""The kernel of the slot part alone (``csrc/cuda/thought_diagonal.cu``): how tensors reach it."""

from __future__ import annotations

import torch

from quietstar_ext.native import DTYPE_CODES, cuda_device, cuda_kernels


def _place(tensor: torch.Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Address and strides; a tensor of numbers per row [B, H, S, M] counts as one of rows."""
    if tensor is None:
        return 0, (0,) * 5
    strides = tensor.stride()
    return tensor.data_ptr(), strides if len(strides) == 5 else (*strides, 1)


def diagonal_forward(
    q: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    text_out: torch.Tensor | None,
    text_lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> None:
    """Write out [B, Hq, Sq, M, D] and lse [B, Hq, Sq, M] fp32: slots and text part merged.

    Every tensor may have any strides but the last, which is 1. text_out and text_lse: as out and lse,
    or None without text. sinks: [Hq] fp32 contiguous, or None.
    """
    cuda_kernels().cuda_thought_diagonal(
        DTYPE_CODES[q.dtype],
        _sizes(q, k_thought),
        _place(q),
        _place(k_thought),
        _place(v_thought),
        _place(text_out),
        _place(text_lse),
        _place(out),
        _place(lse),
        0 if sinks is None else sinks.data_ptr(),
        scale,
        *cuda_device(q),
    )


def diagonal_backward(
    q: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    text_dq: torch.Tensor | None,
    dq: torch.Tensor,
    dk_thought: torch.Tensor,
    dv_thought: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
) -> None:
    """Write dq (with text_dq added, where it is given), dk_thought, dv_thought and delta."""
    cuda_kernels().cuda_thought_diagonal_backward(
        DTYPE_CODES[q.dtype],
        _sizes(q, k_thought),
        _place(q),
        _place(k_thought),
        _place(v_thought),
        _place(out),
        _place(lse),
        scale,
        _place(dout),
        _place(text_dq),
        _place(dq),
        _place(dk_thought),
        _place(dv_thought),
        _place(delta),
        *cuda_device(q),
    )


def _sizes(q: torch.Tensor, k_thought: torch.Tensor) -> tuple[int, ...]:
    batch, q_heads, slots, columns, size = q.shape
    return batch, q_heads, k_thought.shape[1], slots, k_thought.shape[2], columns, size
