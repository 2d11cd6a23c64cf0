"""The fused path of linear_cross_entropy on a CUDA device: row chunks through cuBLAS.

A chunk of rows is multiplied with the vocabulary layer, one kernel turns the logits [rows, V] in place
into losses and gradients, and two more products take them before the next chunk has the same memory.

How many rows make a chunk: as many as ``WORKSPACE_BYTES`` holds. For R rows of width d onto V tokens in
16 bits, the three products are 6·R·V·d operations. What comes on top, at an H200's measured 697 TFLOP/s
and 4.2 TB/s and if nothing of it overlaps:

- the weight's gradient is read and written once per chunk, 4·V·d bytes, 111 / R of the products' time:
  43 per cent for 256 rows, 11 for 1024, 3 for 4096 (twice that where it is summed in fp32);
- the kernel reads and writes the logits once, 4·R·V bytes, 111 / d: 3 per cent at a width of 4096.

Chunks small enough for their logits to stay in 50 MB of L2 (195 rows of 128,256 tokens, 780 of 32,000)
would save part of the second at several times that in the first. These are counts. Measured, 8192 x 4096
onto 32,000 took 1.21, 1.08, 1.01, 1, 1 and 0.99 of the time with 32, 64, 128, 256, 512 and 1024 MiB.

Nothing here waits for the device but, outside of a graph's capture and where some 50 microseconds can
save products (``may_wait``), for which rows take part and whether incoming gradients are all equal. In a
capture all rows go through the products, those without loss as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quietstar_ext.aligned_products import (
    ROW_ALIGNMENT,
    aligned_parts,
    hidden_product,
    vocabulary_product,
)
from quietstar_ext.linear_cross_entropy.call import Losses, Products
from quietstar_ext.linear_cross_entropy.cpu import WeightGradient
from quietstar_ext.linear_cross_entropy.softmax import SoftmaxCrossEntropy
from quietstar_ext.native import cuda_device, cuda_kernels, fields
from quietstar_ext.precision import gradient_dtype

WORKSPACE_BYTES = 256 * 2**20
# Whole tiles of cuBLAS's kernels in a chunk.
ROW_UNIT = 128
# Operations that a wait must be able to save: about 0.1 ms of an H200's products.
WAIT_FOR_FLOP = 1e11


def run(products: Products) -> Losses:
    """The losses, and the gradients that are wanted."""
    hidden, weight, targets, row_weights, valid_rows, softmax, *_ = products
    want_hidden, want_weight, accumulate = products[6:]
    chunks = _Chunks(hidden, weight, valid_rows, 1 + want_hidden + want_weight, want_weight, accumulate)
    kernel = _Kernel(softmax, weight)
    new = hidden.new_empty if chunks.index is None else hidden.new_zeros
    grad_hidden = new(hidden.shape if want_hidden else (0,))
    # A float16 gradient is scaled later, and its sum may overflow before.
    sum_dtype = torch.float32 if chunks.wide else gradient_dtype(weight.dtype)
    grad_weight = WeightGradient(
        weight, want_weight, sum_dtype, parts=aligned_parts(weight.shape[0], weight.dtype)
    )

    targets = chunks.taken(targets)
    factors = None
    if row_weights is not None and (want_hidden or want_weight):
        factors = chunks.taken(row_weights.float())
    nll = hidden.new_empty(chunks.rows, dtype=torch.float32)
    for part in chunks.parts():
        h = chunks.hidden_rows(part)
        logits = chunks.logits(h)
        row_factors = None if factors is None else factors[part]
        kernel(logits, targets[part], chunks.valid_mask(part), nll[part], row_factors)
        grad_weight.add(logits, h)
        if want_hidden:
            chunks.put_product(grad_hidden, part, logits, h)
    if chunks.index is not None:
        nll = nll.new_zeros(hidden.shape[0]).index_copy_(0, chunks.index, nll)
    return Losses(nll, grad_hidden, grad_weight.result())


def may_wait(tensor: torch.Tensor, flop: float) -> bool:
    """Whether the host may wait for the device to save up to so many operations."""
    return flop >= WAIT_FOR_FLOP and not capturing(tensor)


def capturing(tensor: torch.Tensor) -> bool:
    """Whether what is done to the tensor now goes into a CUDA graph."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def scale_(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply a contiguous tensor in place by a scalar on its device. The device sees for itself if
    that is 1; then nothing is moved."""
    scale, count = scale.float(), tensor.numel()
    cuda_kernels().cuda_scale_in_place(*fields(tensor, tensor.dtype, count, scale), cuda_device(tensor))
    return tensor


class _Chunks:
    """How the work is cut, and the memory that all chunks share.

    Attributes:
        index: [rows] of the valid rows, where only these are worked on; None: all.
        rows: how many are worked on.
        wide: the weight's gradient is summed in fp32 and then rounded to 16 bits.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        valid_rows: torch.Tensor,
        products: int,
        sums: bool,
        accumulate: str,
    ):
        self._hidden, self._weight = hidden, weight
        self.rows, width = hidden.shape
        vocabulary = weight.shape[0]
        self.index: torch.Tensor | None = None
        self._valid_rows: torch.Tensor | None = valid_rows
        if may_wait(hidden, 2.0 * self.rows * vocabulary * width * products):
            index = valid_rows.nonzero()[:, 0]
            self.index = index if index.numel() < self.rows else None
            self.rows, self._valid_rows = index.numel(), None

        stride = -(-vocabulary // ROW_ALIGNMENT) * ROW_ALIGNMENT
        copies = self.index is not None or self._valid_rows is not None
        per_row = (stride + copies * width) * hidden.itemsize
        self.size = self._rows_in(WORKSPACE_BYTES, per_row)
        self.wide = False
        if sums and hidden.dtype == torch.bfloat16 and self.size < self.rows:
            sum_bytes = 4 * vocabulary * width
            fits = sum_bytes <= WORKSPACE_BYTES // 2
            self.wide = accumulate == "float32" or (accumulate == "auto" and fits)
            if self.wide and fits:
                self.size = self._rows_in(WORKSPACE_BYTES - sum_bytes, per_row)
        self._buffer = hidden.new_empty(min(self.size, self.rows), stride)

    def _rows_in(self, room: int, per_row: int) -> int:
        """Rows of a chunk: chunks of equal size, in whole units where there is room for one."""
        max_rows = max(1, room // per_row)
        max_rows -= max_rows % ROW_UNIT if max_rows >= ROW_UNIT else 0
        count = max(1, -(-self.rows // max_rows))
        size = max(1, -(-self.rows // count))
        return min(max_rows, -(-size // ROW_UNIT) * ROW_UNIT)

    def parts(self) -> Iterator[slice]:
        """Chunks, as slices of the rows that are worked on."""
        for start in range(0, self.rows, self.size):
            yield slice(start, min(start + self.size, self.rows))

    def taken(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor [all rows] of those that are worked on, contiguous."""
        return tensor.contiguous() if self.index is None else tensor.index_select(0, self.index)

    def valid_mask(self, part: slice) -> torch.Tensor | None:
        """Which rows of a chunk take part, None: all."""
        return None if self._valid_rows is None else self._valid_rows[part]

    def hidden_rows(self, part: slice) -> torch.Tensor:
        """[rows of the chunk, d]; rows that take no part may hold anything, and are zeros here."""
        if self.index is not None:
            return self._hidden.index_select(0, self.index[part])
        rows = self._hidden[part]
        return rows if self._valid_rows is None else rows.masked_fill(~self._valid_rows[part, None], 0)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """[rows of the chunk, V]; those of the next chunk take the same memory."""
        out = self._buffer[: h.shape[0], : self._weight.shape[0]]
        return vocabulary_product(h, self._weight, out)

    def put_product(
        self, grad_hidden: torch.Tensor, part: slice, gradient: torch.Tensor, h: torch.Tensor
    ) -> None:
        """Write the chunk's rows of gradient @ weight; h may be overwritten where it is a copy."""
        if self.index is None:
            hidden_product(gradient, self._weight, grad_hidden[part])
        else:
            product = hidden_product(gradient, self._weight, h)
            grad_hidden.index_copy_(0, self.index[part], product)


class _Kernel:
    """The step between the products, for chunks of logits."""

    def __init__(self, softmax: SoftmaxCrossEntropy, weight: torch.Tensor):
        self.softmax = softmax
        self.mask: torch.Tensor | None = None
        if softmax.banned is not None:
            vocab = weight.shape[0]
            self.mask = weight.new_zeros(vocab // 32 + 2, dtype=torch.int32)
            ids = fields(softmax.banned, softmax.banned.numel(), vocab, self.mask)
            cuda_kernels().cuda_banned_tokens(*ids, cuda_device(weight))

    def __call__(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        valid_rows: torch.Tensor | None,
        nll: torch.Tensor,
        row_weights: torch.Tensor | None,
    ) -> None:
        """Write nll, and with row_weights the gradients of Σ row_weights · nll over the logits."""
        softmax = self.softmax
        cuda_kernels().cuda_softmax_cross_entropy(
            fields(
                *(logits, logits.dtype, *logits.shape, logits.stride(0), targets),
                *(softmax.temperature, softmax.softcap, softmax.logit_scale, nll, row_weights),
                *(0, None, 0, None, None, None, 1, valid_rows, self.mask),
            ),
            cuda_device(logits),
        )
