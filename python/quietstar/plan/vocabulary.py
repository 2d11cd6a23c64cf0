"""Bytes that losses and draws over the vocabulary hold: chunks of logits, the output layer's gradient.

A chunk's size is the operators' own decision, by device (quietstar_ext/linear_cross_entropy,
quietstar_ext/linear_sample.py).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quietstar_ext.linear_cross_entropy import cpu, cuda
from quietstar_ext.linear_sample import CHUNK_BYTES, CUDA_CHUNK_BYTES

if TYPE_CHECKING:
    from quietstar.plan.costs import Step
    from quietstar.plan.sizes import Sizes

CHUNK_ROWS = cpu.MAX_ROWS


def vocabulary_bytes(sizes: Sizes, step: Step, rows: int) -> float:
    """What one cross entropy over ``rows`` rows holds besides them: a chunk of logits and, where the
    output layer is trained, its gradient."""
    d, v = sizes.width, sizes.vocabulary
    s = 4 if step.precision == "float32" else 2
    trained = step.rank is None
    cast = 2 * v * d if step.precision == "autocast" else 0  # the weight
    if step.device == "cpu":
        return cast + _on_cpu(rows, v, d, s, trained)
    return cast + _on_cuda(rows, v, d, s, trained)


def _on_cpu(rows: int, v: int, d: int, s: int, trained: bool) -> float:
    most, room = cpu.MAX_ROWS, cpu.WORKSPACE_BYTES
    if s == 2 and trained and 4 * v * d > room // 2:  # as the operator decides it
        most, room = max(rows, 1), cpu.LARGE_WORKSPACE_BYTES
    chunks = max(1, math.ceil(rows / min(most, max(1, room // (v * s)))))
    # In 16 bits the sum is in fp32, with a product before it is added; one chunk needs no sum.
    sixteen = 8 if chunks > 1 else 6
    return v * s * rows / chunks + v * d * (4 if s == 4 else sixteen) * trained


def _on_cuda(rows: int, v: int, d: int, s: int, trained: bool) -> float:
    room = cuda.WORKSPACE_BYTES
    one_chunk = rows * v * s <= room
    # The sum over chunks is in fp32 where that takes half of the room at most; the result is in 16 bits.
    wide = s == 2 and trained and not one_chunk and 4 * v * d <= room // 2
    logits = min(rows * v * s, room - 4 * v * d * wide)
    return logits + v * d * (s + 4 * wide) * trained


def drawn_logits_bytes(step: Step) -> int:
    """What the logits of thought tokens take at most, while they are drawn."""
    return CUDA_CHUNK_BYTES if step.device == "cuda" else CHUNK_BYTES
