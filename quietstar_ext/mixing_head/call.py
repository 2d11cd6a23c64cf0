"""A call of mixing_head's kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quietstar_ext.native import fields

# The tensors of MixingHead in csrc/include/quietstar/mixing_head.h, in its order.
_TENSORS = (
    *("index", "base", "thought", "from_base", "product", "b1", "h1", "h2", "b2", "w3", "mixed", "w"),
    *("gate", "grad_mixed", "grad_gate", "grad_thought", "grad_base", "grad_h1", "grad_from_base"),
    *("grad_h2", "grad_b1", "grad_b2", "grad_w3", "first", "order", "workspace"),
)

Sizes = tuple[int, int, int, int, bool]  # dtype's number, rows, positions, width, sigmoid


def kernel_fields(sizes: Sizes, tensors: dict[str, Tensor | None], threads: int = 1) -> tuple[Any, ...]:
    """The kernels' struct, from contiguous tensors by their names there."""
    return fields(*sizes, *map(tensors.get, _TENSORS), threads)


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
