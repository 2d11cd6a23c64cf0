"""The fused path of linear_cross_entropy on the CPU: row chunks through its GEMM.

A chunk of rows is multiplied with the vocabulary layer, the logits are turned in place into losses
and into gradients, and the gradients go through the GEMM again before the next chunk takes the same
memory: one product of 2·rows·V·d operations for the loss, three with both gradients. Rows that cannot
contribute are gathered away first.

The logits of a chunk are token-major, ``weight @ hᵀ``, [V, rows]: the products of this layout took 3 to
6 per cent less time than those of [rows, V], and the kernel needs no sum across the lanes of a vector
(``csrc/include/quietstar/linear_cross_entropy.h``).

Everything besides the results counts towards ``WORKSPACE_BYTES``: the chunk of logits, gathered rows,
the kernel's block sums, and for 16-bit inputs the fp32 sum of the weight's gradient. Where that sum
takes more than half of it, bfloat16 has ``LARGE_WORKSPACE_BYTES``: best all logits at once, whose
product needs no sum; else the sum and larger chunks; else it goes through the vocabulary a second time,
block by block: one product more, and still every sum is in fp32. One row at least is worked on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quietstar_ext.linear_cross_entropy.call import Losses, Products
from quietstar_ext.precision import compute_dtype, gradient_dtype

WORKSPACE_BYTES = 64 * 2**20
LARGE_WORKSPACE_BYTES = 256 * 2**20
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
    # A single product needs no sum; float16 may overflow before the weights are applied.
    single = chunks.count_valid <= chunks.size and weight.dtype != torch.float16
    how = weight.dtype if single else wide, chunks.block_vocab
    total_weight = WeightGradient(weight, want_weight and not chunks.second_pass, *how)
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
        block = WeightGradient(part, True, *how)
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
        room, most = WORKSPACE_BYTES, MAX_ROWS
        # A block of the weight's gradient in fp32, and its product before it is added.
        block = room // 4
        self.block_vocab = max(1, block // max(1, width * (wide.itemsize + dtype.itemsize)))
        self.second_pass = False
        sum_bytes = width * vocabulary * wide.itemsize
        if fused and sums and dtype == torch.bfloat16 and self._size(room, most, hidden, weight)[1] > 1:
            large = sum_bytes > room // 2
            if large:
                room, most = LARGE_WORKSPACE_BYTES, self.count_valid + 15  # whole vectors
            if not large or self._size(room, most, hidden, weight)[1] > 1:
                self.second_pass = sum_bytes > room // 2
                room -= block + (0 if self.second_pass else sum_bytes)
        elif fused and sums and dtype == torch.float16:
            room -= block
        self.size, _ = self._size(room, most, hidden, weight)
        rows = min(self.size, self.count_valid)
        self._buffer = hidden.new_empty(rows * vocabulary if fused else 0)

    def _size(self, room: int, most: int, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[int, int]:
        """Rows of a chunk (``most`` of them), and number of chunks."""
        vocabulary, width = weight.shape
        if self.fused:
            # Logits, gathered hidden rows and gradient rows, the kernel's sums and copies.
            per_row = vocabulary * hidden.itemsize + 600
            per_row += 0 if self.all_valid else 2 * width * hidden.itemsize
        else:
            # PyTorch's steps hold the raw products, y, its slope and a product of theirs at a time.
            wide = compute_dtype(hidden.dtype)
            per_row = vocabulary * (4 * wide.itemsize + hidden.itemsize)
        max_rows = max(1, min(most, room // per_row))
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


class WeightGradient:
    """Σ over chunks of logit gradientsᵀ @ hidden rows.

    Args:
        wanted: otherwise nothing is computed, and the result is empty.
        sum_dtype: in which chunks are added up; float32 or that of weight.
        block_vocab: how many tokens' 16-bit products are added to a float32 sum at a time; None: the
            products are in float32 themselves.
        parts: of the vocabulary, a product each; None: one for all.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        wanted: bool,
        sum_dtype: torch.dtype,
        block_vocab: int | None = None,
        parts: list[slice] | None = None,
    ):
        self.weight, self.wanted = weight, wanted
        self.sum_dtype, self.block_vocab = sum_dtype, block_vocab
        self.parts = parts or [slice(0, weight.shape[0])]
        self.sum: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor, h: torch.Tensor) -> None:
        """gradient [rows, vocab], h [rows, d]."""
        a, beta = gradient.T, int(self.sum is not None)  # 0: what stands in the memory is ignored
        if not self.wanted:
            return
        if self.sum is None:
            self.sum = h.new_empty(self.weight.shape, dtype=self.sum_dtype)
        if a.dtype != self.sum_dtype and self.block_vocab is not None:
            blocks = self.sum.split(self.block_vocab), a.split(self.block_vocab)
            for rows, part in zip(*blocks, strict=True):
                rows.copy_(part @ h) if beta == 0 else rows.add_(part @ h)
            return
        for tokens in self.parts:
            total, part = self.sum[tokens], a[tokens]
            if a.dtype == self.sum_dtype:
                total.addmm_(part, h, beta=beta)
            elif a.device.type == "cuda":
                torch.addmm(total, part, h, beta=beta, out_dtype=torch.float32, out=total)
            else:  # a test: PyTorch has this product on devices only
                total.addmm_(part.float(), h.float(), beta=beta)

    def result(self) -> torch.Tensor:
        """The sum, which another factor will scale, in its dtype; zeros where nothing was added."""
        dtype = gradient_dtype(self.weight.dtype)
        if self.sum is None:
            return self.weight.new_zeros(self.weight.shape if self.wanted else (0,), dtype=dtype)
        return self.sum.to(dtype)
