"""Products with a weight [vocab, d] on CUDA, cut so that every length of theirs is an aligned one."""

from __future__ import annotations

import torch

from quietstar_ext.native import takes_cuda_path
from quietstar_ext.precision import autocast_inputs

# Products of 16-bit matrices are much slower where a length is no multiple of 16 bytes: two meta tokens
# behind a vocabulary of 128,256 made a third of a 1B model's product time, half of it wasted.
_ALIGNED = 8
# Rows of logits begin at a multiple of this many elements, whatever the vocabulary: products and
# kernels then read and write aligned memory.
ROW_ALIGNMENT = 64


def aligned_parts(vocab: int, dtype: torch.dtype) -> list[slice]:
    """A vocabulary as products over it take it on CUDA: the aligned part, and a short tail."""
    aligned = vocab - vocab % _ALIGNED
    if dtype.itemsize != 2 or aligned in (0, vocab):
        return [slice(0, vocab)]
    return [slice(0, aligned), slice(aligned, vocab)]


def vocabulary_product(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """hidden @ weightᵀ into ``out`` [rows, vocab], of any row stride, as products of aligned lengths."""
    for part in aligned_parts(weight.shape[0], weight.dtype):
        torch.mm(hidden, weight[part].T, out=out[:, part])
    return out


def aligned_rows(rows: int, vocab: int, like: torch.Tensor) -> torch.Tensor:
    """Memory for logits [rows, vocab] as products take it on CUDA; dtype and device are ``like``'s."""
    return like.new_empty(rows, -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT)[:, :vocab]


def hidden_product(gradient: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """gradient [rows, vocab] @ weight into ``out`` [rows, d], the same way.

    The tail comes first: rounded to 16 bits it is small, and the long product is added before the sum
    is rounded.
    """
    *longest, last = aligned_parts(weight.shape[0], weight.dtype)
    torch.mm(gradient[:, last], weight[last], out=out)
    for part in longest:
        out.addmm_(gradient[:, part], weight[part])
    return out


def linear_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [..., d] @ weightᵀ, [..., vocab], without gradients; under autocast as autocast has it."""
    (taken,) = autocast_inputs(weight[:0])
    parts = aligned_parts(weight.shape[0], weight.dtype)
    if not takes_cuda_path(hidden) or len(parts) == 1 or taken.dtype != weight.dtype:
        return hidden @ weight.T
    rows = hidden.reshape(-1, hidden.shape[-1])
    product = vocabulary_product(rows, weight, aligned_rows(rows.shape[0], weight.shape[0], rows))
    return product.view(*hidden.shape[:-1], weight.shape[0])
