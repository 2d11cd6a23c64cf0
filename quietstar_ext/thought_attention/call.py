"""A call of thought_attention's kernels: what all its implementations take."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class ThoughtAttention(NamedTuple):
    """Arguments of the public function, checked; the fields that are tensors come first."""

    q: Tensor  # [B, Hq, Sq, M, D]
    k_text: Tensor  # [B, Hkv, N, D]
    v_text: Tensor  # [B, Hkv, N, D]
    k_thought: Tensor  # [B, Hkv, Sk, M, D]
    v_thought: Tensor  # [B, Hkv, Sk, M, D]
    text_start: Tensor  # [B, M] int32
    text_stop: Tensor  # [B, M] int32
    sinks: Tensor | None  # [Hq]
    scale: float
    window: int  # 0: none
    softcap: float  # 0: none

    def laid_out(self, like: Callable[[Tensor], Tensor] | None = None) -> ThoughtAttention:
        """With its tensors as the kernels read them; q and the text's go through ``like``."""
        text = map(like or last_contiguous, self[:3])
        slots = map(last_contiguous, self[3:5])
        start, stop = self.text_start.contiguous(), self.text_stop.contiguous()
        sinks = None if self.sinks is None else self.sinks.float().contiguous()
        return ThoughtAttention._make((*text, *slots, start, stop, sinks, *self[TENSORS:]))


TENSORS = 8


class ThoughtAttentionBackward(NamedTuple):
    """Its backward pass."""

    forward: ThoughtAttention
    out: Tensor  # as q
    lse: Tensor  # [B, Hq, Sq, M] float32
    dout: Tensor  # as q
    dlse: Tensor | None  # as lse


# Of q, k_text, v_text, k_thought and v_thought; and delta, as lse.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def last_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, copied only where the elements of a row do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def rows_at_packs(tensor: Tensor, first: int) -> bool:
    """Whether rows begin at multiples of 16 bytes and their elements lie side by side; ``first`` is the
    address of the first one, or its distance from one that is such a multiple."""
    return (
        tensor.stride(-1) == 1
        and first % 16 == 0
        and all(
            size == 1 or stride * tensor.itemsize % 16 == 0
            for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        )
    )


def new_lse(q: Tensor) -> Tensor:
    """Uninitialised [B, Hq, Sq, M], one number per query row."""
    return q.new_empty(q.shape[:-1], dtype=torch.float32)


def place(tensor: Tensor | None) -> tuple[int, ...]:
    """Address and strides but the last, as the kernels take a tensor; of text [B, H, N, D], where the
    column is always 0, and of numbers [B, H, S, M] all strides."""
    return (0,) * 5 if tensor is None else (tensor.data_ptr(), *tensor.stride()[:4])
