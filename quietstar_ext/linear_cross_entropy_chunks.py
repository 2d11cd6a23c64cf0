"""The fused path of linear_cross_entropy: its operators, and row chunks through the CPU's GEMM.

A chunk of rows is multiplied with the vocabulary layer, the logits are turned in place into losses
and into gradients, and the gradients go through the GEMM again before the next chunk takes the same
memory. Rows that cannot contribute are gathered away first, so they cost no product. On a CUDA device
the same is done by ``linear_cross_entropy_cuda.py``.

On the CPU the logits of a chunk are word-major, ``weight @ hᵀ``, [V, rows]: the products of this
layout took 3 to 6 per cent less time than those of [rows, V], and the kernel needs no sum across
the lanes of a vector (``csrc/include/quietstar/linear_cross_entropy.h``).

Everything besides the results counts towards ``WORKSPACE_BYTES``: the chunk of logits, gathered rows,
the kernel's block sums, and for 16-bit inputs the fp32 sum of the weight's gradient. Where that sum
takes more than half of it, bfloat16 goes through the vocabulary a second time, block by block: one
product more (four instead of three), and still every sum is in fp32. One row at least is worked on.

Counted for rows x vocabulary logits of width d: 2·rows·V·d operations a product; the loss alone takes
one product, the loss with both gradients three.

The operators are registered with ``torch.library``, opaque to ``torch.compile``, because how many rows
remain is known at run time only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from quietstar_ext import linear_cross_entropy_cuda as cuda
from quietstar_ext.linear_cross_entropy_softmax import SoftmaxCrossEntropy
from quietstar_ext.native import DTYPE_CODES, takes_cuda_path
from quietstar_ext.precision import compute_dtype, gradient_dtype

WORKSPACE_BYTES = 64 * 2**20
# With 1024 rows, 8192 fp32 logits each no longer leave the 32 MB cache room for the operands: 2048 x 256
# onto 8192 took 0.93 times its bare products with 512 rows, 0.96 with 1024 (bfloat16 0.96 and 1.17).
MOST_ROWS = 512

_OPTIONS = "Tensor? banned, float temperature, int ignore_index, float? softcap, float logit_scale"
_INPUTS = "Tensor hidden, Tensor weight, Tensor targets"
_WANTED = "bool want_hidden, bool want_weight, str accumulate='auto'"

torch.library.define("quietstar::linear_cross_entropy_forward", f"({_INPUTS}, {_OPTIONS}) -> Tensor")
torch.library.define(
    "quietstar::linear_cross_entropy_backward",
    f"(Tensor grad, {_INPUTS}, Tensor unit_hidden, Tensor unit_weight, {_OPTIONS}, {_WANTED})"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    "quietstar::linear_cross_entropy_forward_and_backward",
    f"({_INPUTS}, Tensor row_weights, {_OPTIONS}, bool skip_zero_weight, {_WANTED})"
    " -> (Tensor, Tensor, Tensor)",
)


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    banned: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> torch.Tensor:
    """nll [rows] in float32 or float64; no gradient is recorded."""
    live = targets != ignore_index
    softmax = SoftmaxCrossEntropy(hidden, banned, temperature, softcap, logit_scale)
    return _run(hidden, weight, targets, None, live, softmax, False, False)[0]


def forward_and_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    banned: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    skip_zero_weight: bool,
    want_hidden: bool,
    want_weight: bool,
    accumulate: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """nll [rows], and the gradients of Σ row_weights · nll for hidden (its dtype) and for weight (its
    ``gradient_dtype``); empty where not wanted."""
    live = targets != ignore_index
    if skip_zero_weight:
        live &= row_weights != 0
    softmax = SoftmaxCrossEntropy(hidden, banned, temperature, softcap, logit_scale)
    return _run(
        hidden, weight, targets, row_weights, live, softmax, want_hidden, want_weight, accumulate
    )


def backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    unit_hidden: torch.Tensor | None,
    unit_weight: torch.Tensor | None,
    banned: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    want_hidden: bool,
    want_weight: bool,
    accumulate: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of Σ grad · nll in the dtype of hidden; undefined where not wanted.

    unit_hidden, unit_weight: those of Σ nll from ``forward_and_backward``, which are overwritten and
    returned; None where they are gone and everything is computed again.
    """
    live = targets != ignore_index
    fresh = unit_hidden is None or unit_weight is None
    if unit_hidden is not None and unit_weight is not None:
        factor = _common_factor(grad, live, hidden, weight)
        if factor is not None:
            return scale_(unit_hidden, factor), scale_(unit_weight, factor).to(weight.dtype)
        grad = grad.masked_fill(~live, 0)
        # Rows differ: a row of hidden's gradient is scaled, the sum for weight is taken again.
        if want_hidden:
            unit_hidden.mul_(grad[:, None])
    softmax = SoftmaxCrossEntropy(hidden, banned, temperature, softcap, logit_scale)
    live &= grad != 0
    _, grad_hidden, grad_weight = _run(
        *(hidden, weight, targets, grad, live, softmax),
        *(want_hidden and fresh, want_weight, accumulate),
    )
    return grad_hidden if unit_hidden is None else unit_hidden, grad_weight.to(weight.dtype)


def _common_factor(
    grad: torch.Tensor, live: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor | None:
    """The one value of grad [rows] in all live rows; None where they differ."""
    if takes_cuda_path(grad):
        return cuda.common_factor(grad, live, 4.0 * hidden.shape[0] * weight.numel())
    low, high = torch.aminmax(grad[live]) if bool(live.any()) else (grad.new_ones(()),) * 2
    return low if low == high else None


def scale_(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply a contiguous tensor in place; a scale of 1 costs nothing."""
    if takes_cuda_path(tensor) and tensor.dtype in DTYPE_CODES:
        return cuda.scale_(tensor, scale)
    return tensor if scale.device.type == "cpu" and float(scale) == 1 else tensor.mul_(scale)


def _backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    unit_hidden: torch.Tensor,
    unit_weight: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    units = unit_hidden.clone(), unit_weight.clone()  # an operator does not change its arguments
    return backward(grad, hidden, weight, targets, *units, *rest)


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    row_weights: torch.Tensor | None,
    live: torch.Tensor,
    softmax: SoftmaxCrossEntropy,
    want_hidden: bool,
    want_weight: bool,
    accumulate: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """nll [rows] and the gradients for hidden and weight (empty if not wanted) of the live rows."""
    if softmax.fused and takes_cuda_path(hidden):
        return cuda.run(
            *(hidden, weight, targets, row_weights, live, softmax),
            *(want_hidden, want_weight, accumulate),
        )
    wide = compute_dtype(hidden.dtype)
    chunks = _Chunks(hidden, weight, live, softmax.fused, sums=want_weight)
    new = hidden.new_empty if chunks.all_live else hidden.new_zeros
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
        return nll, grad_hidden, total_weight.result()
    grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    for first in range(0, weight.shape[0], chunks.words):
        words = weight[first : first + chunks.words]
        block = _WeightGradient(words, True, chunks)
        for rows, t, scale, largest, total in saved:
            h = hidden[rows]
            logits = chunks.product(h, words)
            softmax.gradient_(logits, t, scale, largest, total, first)
            block.add(logits, h)
        grad_weight[first : first + chunks.words] = block.result()
    return nll, grad_hidden, grad_weight


class _Chunks:
    """How the work is cut: chunks of live rows of equal size whose logits fit the workspace.

    Attributes:
        all_live: every row is live, and chunks are slices; otherwise they are index tensors.
        second_pass: the weight's gradient is summed in blocks of ``words`` words, in a second pass.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        live: torch.Tensor,
        fused: bool,
        sums: bool,
    ):
        dtype, wide = hidden.dtype, compute_dtype(hidden.dtype)
        vocabulary, width = weight.shape
        self.fused = fused
        self.index = live.nonzero()[:, 0]
        self.live_rows = self.index.numel()
        self.all_live = self.live_rows == live.numel()
        room = WORKSPACE_BYTES
        # A block of the weight's gradient in fp32, and its product before it is added.
        self.words = max(1, room // 4 // max(1, width * (wide.itemsize + dtype.itemsize)))
        self.second_pass = False
        sum_bytes = width * vocabulary * wide.itemsize
        if fused and sums and dtype == torch.bfloat16 and self._size(room, hidden, weight)[1] > 1:
            self.second_pass = sum_bytes > room // 2
            room -= room // 4 if self.second_pass else sum_bytes + room // 4
        elif fused and sums and dtype == torch.float16:
            room -= room // 4
        self.size, _ = self._size(room, hidden, weight)
        rows = min(self.size, self.live_rows)
        self._buffer = hidden.new_empty(rows * vocabulary if fused else 0)

    def _size(self, room: int, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[int, int]:
        """Rows of a chunk, and number of chunks."""
        vocabulary, width = weight.shape
        if self.fused:
            # Logits, gathered hidden rows and gradient rows, the kernel's sums and copies.
            per_row = vocabulary * hidden.itemsize + 600
            per_row += 0 if self.all_live else 2 * width * hidden.itemsize
        else:
            # PyTorch's steps hold the raw products, y, its slope and a product of theirs at a time.
            wide = compute_dtype(hidden.dtype)
            per_row = vocabulary * (4 * wide.itemsize + hidden.itemsize)
        most = min(MOST_ROWS, max(1, room // per_row))
        count = max(1, -(-self.live_rows // most))
        size = -(-self.live_rows // count)
        if most >= 16:  # whole vectors and cache lines of rows
            size = min(-(-size // 16) * 16, most // 16 * 16)
        return max(1, size), -(-self.live_rows // max(1, size))

    def rows(self) -> Iterator[slice | torch.Tensor]:
        for start in range(0, self.live_rows, self.size):
            stop = min(start + self.size, self.live_rows)
            yield slice(start, stop) if self.all_live else self.index[start:stop]

    def product(self, h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Logits [rows, words]; the next product takes the same memory."""
        if not self.fused:
            return h @ weight.T
        rows, words = h.shape[0], weight.shape[0]
        return torch.mm(weight, h.T, out=self._buffer[: rows * words].view(words, rows)).T


class _WeightGradient:
    """Σ over chunks of logit gradientsᵀ @ hidden rows, in fp32 (fp64) until ``result``."""

    def __init__(self, weight: torch.Tensor, wanted: bool, chunks: _Chunks):
        self.wanted = wanted
        self.dtype = gradient_dtype(weight.dtype)
        self.shape = weight.shape if wanted else (0,)
        self.words = chunks.words
        self.like = weight
        # A single product needs no sum; float16 may overflow before the weights are applied.
        self.single = chunks.live_rows <= chunks.size and weight.dtype != torch.float16
        self.sum: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor, h: torch.Tensor) -> None:
        """gradient [rows, words], h [rows, d]."""
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
            for first in range(0, self.shape[0], self.words):
                block = slice(first, first + self.words)
                self.sum[block] += gradient.T[block] @ h

    def result(self) -> torch.Tensor:
        """The sum in its dtype, zeros where nothing was added."""
        if self.sum is None:
            return self.like.new_zeros(self.shape, dtype=self.dtype)
        return self.sum.to(self.dtype)


for _name, _run_it in (
    ("forward", forward),
    ("backward", _backward),
    ("forward_and_backward", forward_and_backward),
):
    torch.library.impl(f"quietstar::linear_cross_entropy_{_name}", ("cpu", "cuda"))(_run_it)


@torch.library.register_fake("quietstar::linear_cross_entropy_forward")
def _(hidden, weight, targets, banned, temperature, ignore_index, softcap, logit_scale):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype))


@torch.library.register_fake("quietstar::linear_cross_entropy_backward")
def _(grad, hidden, weight, *rest):  # type: ignore[no-untyped-def]
    want_hidden, want_weight = rest[8:10]
    return (
        hidden.new_empty(hidden.shape if want_hidden else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,)),
    )


@torch.library.register_fake("quietstar::linear_cross_entropy_forward_and_backward")
def _(hidden, weight, *rest):  # type: ignore[no-untyped-def]
    want_hidden, want_weight = rest[8:10]
    return (
        hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype)),
        hidden.new_empty(hidden.shape if want_hidden else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,), dtype=gradient_dtype(weight.dtype)),
    )
