"""A call of mixing_head's kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MixingHead(NamedTuple):
    """Arguments of the public function, checked; the fields that are tensors come first."""

    base: Tensor  # [P, d]
    thought: Tensor  # [rows, d]
    w1: Tensor  # [d, 2d]
    b1: Tensor  # [d]
    w2: Tensor  # [d, d]
    b2: Tensor  # [d]
    w3: Tensor  # [1, d]
    base_index: Tensor | None  # [rows] int64
    sigmoid: bool

    def laid_out(self) -> MixingHead:
        """With all that the kernels read without gaps; the matrices of the products may have any."""
        base, thought, w1, b1, w2, b2, w3, index, sigmoid = self
        base, thought, b1, b2, w3 = (t.contiguous() for t in (base, thought, b1, b2, w3))
        index = None if index is None else index.contiguous()
        return MixingHead(base, thought, w1, b1, w2, b2, w3, index, sigmoid)

    def gradient_shapes(self) -> tuple[torch.Size, ...]:
        """Of base, thought and the five parameters."""
        return tuple(tensor.shape for tensor in self[:7])


class Mixed(NamedTuple):
    """Results, and what the backward pass takes of them."""

    mixed: Tensor  # [rows, d]
    w: Tensor  # [rows, 1]
    gate: Tensor  # [rows] float32: w before rounding
    h1: Tensor  # [rows, d]
    h2: Tensor  # [rows, d]; on CUDA as it is before relu


class MixingHeadBackward(NamedTuple):
    """Its backward pass."""

    forward: MixingHead
    gate: Tensor
    h1: Tensor
    h2: Tensor
    grad_mixed: Tensor  # [rows, d]
    grad_w: Tensor  # [rows, 1]
    wanted: tuple[bool, ...]  # which of the seven gradients
