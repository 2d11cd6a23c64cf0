"""The fused path of linear_cross_entropy on the CPU: row chunks through its GEMM.

A chunk of rows is multiplied with the vocabulary layer, the logits are turned in place into losses
and into gradients, and the gradients go through the GEMM again before the next chunk takes the same
memory. Rows that cannot contribute are gathered away first, so they cost no product. On a CUDA device
the same is done by ``cuda.py``.

On the CPU the logits of a chunk are token-major, ``weight @ hᵀ``, [V, rows]: the products of this
layout took 3 to 6 per cent less time than those of [rows, V], and the kernel needs no sum across
the lanes of a vector (``csrc/include/quietstar/linear_cross_entropy.h``).

Everything besides the results counts towards ``WORKSPACE_BYTES``: the chunk of logits, gathered rows,
the kernel's block sums, and for 16-bit inputs the fp32 sum of the weight's gradient. Where that sum
takes more than half of it, bfloat16 goes through the vocabulary a second time, block by block: one
product more (four instead of three), and still every sum is in fp32. One row at least is worked on.

Counted for rows x vocabulary logits of width d: 2·rows·V·d operations a product; the loss alone takes
one product, the loss with both gradients three.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quietstar_ext.linear_cross_entropy.call import Losses, Products
from quietstar_ext.precision import compute_dtype, gradient_dtype

WORKSPACE_BYTES = 64 * 2**20
# With 1024 rows, 8192 fp32 logits each no longer leave the 32 MB cache room for the operands: 2048 x 256
# onto 8192 took 0.93 times its bare products with 512 rows, 0.96 with 1024 (bfloat16 0.96 and 1.17).
MAX_ROWS = 512


def run(products: Products) -> Losses:
    """The losses, and the gradients that are wanted."""
    hidden, weight, targets, row_weights, valid_rows, softmax, want_hidden, want_weight, _ = products
    wide = compute_dtype(hidden.dtype)
    chunks = _Chunks(hidden, weight, valid_rows, softmax.fused, sums=want_weight)
    new = hidden.new_empty if chunks.all_valid else hidden.new_zeros
    nll = new(hidden.shape[0], dtype=wide)
    grad_hidden = new(hidden.shape if want_hidden else (0,))
    total_weight = _WeightGradient(weight, want_weight and not chunks.second_pass, chunks)
    saved = []
    for rows in chunks.rows():
        h, t = hidden[rows], targets[rows].contiguous()
        logits = chunks.product(h, weight)
        nll[rows], largest, total = softmax.loss(logits, t)
        if not (want_hidden or want_weight) or row_weights is None:
            continue
        scale = row_weights[rows].to(wide).contiguous()
        if chunks.second_pass:
            saved.append((rows, t, scale, largest, total))
            if not want_hidden:
                continue
        softmax.gradient_(logits, t, scale, largest, total)
        if want_hidden and isinstance(rows, slice):
            torch.mm(logits, weight, out=grad_hidden[rows])
        elif want_hidden:
            grad_hidden[rows] = logits @ weight
        total_weight.add(logits, h)
    if not chunks.second_pass:
        return Losses(nll, grad_hidden, total_weight.result())
    grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    for first in range(0, weight.shape[0], chunks.block_vocab):
        part = weight[first : first + chunks.block_vocab]
        block = _WeightGradient(part, True, chunks)
        for rows, t, scale, largest, total in saved:
            h = hidden[rows]
            logits = chunks.product(h, part)
            softmax.gradient_(logits, t, scale, largest, total, first)
            block.add(logits, h)
        grad_weight[first : first + chunks.block_vocab] = block.result()
    return Losses(nll, grad_hidden, grad_weight)


class _Chunks:
    """How the work is cut: chunks of valid rows of equal size whose logits fit the workspace.

    Attributes:
        all_valid: every row is valid, and chunks are slices; otherwise they are index tensors.
        second_pass: the weight's gradient is summed in blocks of ``block_vocab`` tokens, in a
            second pass.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        valid_rows: torch.Tensor,
        fused: bool,
        sums: bool,
    ):
        dtype, wide = hidden.dtype, compute_dtype(hidden.dtype)
        vocabulary, width = weight.shape
        self.fused = fused
        self.index = valid_rows.nonzero()[:, 0]
        self.count_valid = self.index.numel()
        self.all_valid = self.count_valid == valid_rows.numel()
        room = WORKSPACE_BYTES
        # A block of the weight's gradient in fp32, and its product before it is added.
        self.block_vocab = max(1, room // 4 // max(1, width * (wide.itemsize + dtype.itemsize)))
        self.second_pass = False
        sum_bytes = width * vocabulary * wide.itemsize
        if fused and sums and dtype == torch.bfloat16 and self._size(room, hidden, weight)[1] > 1:
            self.second_pass = sum_bytes > room // 2
            room -= room // 4 if self.second_pass else sum_bytes + room // 4
        elif fused and sums and dtype == torch.float16:
            room -= room // 4
        self.size, _ = self._size(room, hidden, weight)
        rows = min(self.size, self.count_valid)
        self._buffer = hidden.new_empty(rows * vocabulary if fused else 0)

    def _size(self, room: int, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[int, int]:
        """Rows of a chunk, and number of chunks."""
        vocabulary, width = weight.shape
        if self.fused:
            # Logits, gathered hidden rows and gradient rows, the kernel's sums and copies.
            per_row = vocabulary * hidden.itemsize + 600
            per_row += 0 if self.all_valid else 2 * width * hidden.itemsize
        else:
            # PyTorch's steps hold the raw products, y, its slope and a product of theirs at a time.
            wide = compute_dtype(hidden.dtype)
            per_row = vocabulary * (4 * wide.itemsize + hidden.itemsize)
        max_rows = min(MAX_ROWS, max(1, room // per_row))
        count = max(1, -(-self.count_valid // max_rows))
        size = -(-self.count_valid // count)
        if max_rows >= 16:  # whole vectors and cache lines of rows
            size = min(-(-size // 16) * 16, max_rows // 16 * 16)
        return max(1, size), -(-self.count_valid // max(1, size))

    def rows(self) -> Iterator[slice | torch.Tensor]:
        for start in range(0, self.count_valid, self.size):
            stop = min(start + self.size, self.count_valid)
            yield slice(start, stop) if self.all_valid else self.index[start:stop]

    def product(self, h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocab]; the next product takes the same memory."""
        if not self.fused:
            return h @ weight.T
        rows, vocab = h.shape[0], weight.shape[0]
        return torch.mm(weight, h.T, out=self._buffer[: rows * vocab].view(vocab, rows)).T


class _WeightGradient:
    """Σ over chunks of logit gradientsᵀ @ hidden rows, in fp32 (fp64) until ``result``."""

    def __init__(self, weight: torch.Tensor, wanted: bool, chunks: _Chunks):
        self.wanted = wanted
        self.dtype = gradient_dtype(weight.dtype)
        self.shape = weight.shape if wanted else (0,)
        self.block_vocab = chunks.block_vocab
        self.like = weight
        # A single product needs no sum; float16 may overflow before the weights are applied.
        self.single = chunks.count_valid <= chunks.size and weight.dtype != torch.float16
        self.sum: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor, h: torch.Tensor) -> None:
        """gradient [rows, vocab], h [rows, d]."""
        if not self.wanted:
            return
        wide = compute_dtype(h.dtype)
        if self.sum is None and (self.single or h.dtype == wide):
            self.sum = gradient.T @ h
        elif self.sum is not None and h.dtype == wide:
            self.sum.addmm_(gradient.T, h)
        else:
            if self.sum is None:
                self.sum = h.new_zeros(self.shape, dtype=wide)
            for first in range(0, self.shape[0], self.block_vocab):
                block = slice(first, first + self.block_vocab)
                self.sum[block] += gradient.T[block] @ h

    def result(self) -> torch.Tensor:
        """The sum in its dtype, zeros where nothing was added."""
        if self.sum is None:
            return self.like.new_zeros(self.shape, dtype=self.dtype)
        return self.sum.to(self.dtype)
