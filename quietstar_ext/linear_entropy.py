"""Entropy of the distributions behind hidden states, with gradients, in chunks of rows.

For logits x [V] of a row, p = softmax(x) over the ids that are not banned:

    H = -Σ_v p_v log p_v        dH/dx_v = -p_v (log p_v + H)

Like ``linear_cross_entropy_sum``, the forward pass takes the gradients along while a chunk's logits are
there, so rows x vocabulary is never held and the backward pass only scales: three matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quietstar_ext.aligned_products import (
    aligned_parts,
    aligned_rows,
    hidden_product,
    vocabulary_product,
)
from quietstar_ext.derivatives import first_only
from quietstar_ext.linear_cross_entropy.softmax import SoftmaxCrossEntropy
from quietstar_ext.native import takes_cuda_path
from quietstar_ext.precision import autocast_inputs, compute_dtype, without_autocast

WORKSPACE_BYTES = 64 * 2**20
MAX_ROWS = 256


def linear_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    row_weights: Tensor,
    *,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """``Σ_r row_weights[r] · H[r]`` in nats, a scalar with gradients for hidden and weight.

    The logits are ``cap(logit_scale · hidden weightᵀ) / temperature``, as in ``linear_cross_entropy``.

    Args:
        hidden: [rows, d] floating.
        weight: [V, d], dtype and device of hidden.
        row_weights: [rows], no gradient; rows of weight 0 cost nothing.
        banned: [n] int64, ids that the softmax leaves out.
    """
    hidden, weight = autocast_inputs(hidden, weight)
    options = banned, float(temperature), softcap, float(logit_scale)
    grads = torch.is_grad_enabled()
    wanted = (grads and hidden.requires_grad, grads and weight.requires_grad)
    row_weights = row_weights.detach().to(compute_dtype(hidden.dtype))
    with without_autocast(hidden):
        total: Tensor = _EntropySum.apply(hidden, weight, row_weights, options, wanted)
    return total


class _Products:
    """The products with a weight [V, d]; on CUDA, of aligned lengths."""

    def __init__(self, weight: Tensor):
        self.weight, self.aligned = weight, takes_cuda_path(weight) and weight.dtype.itemsize == 2
        whole = [slice(0, weight.shape[0])]
        self.parts = aligned_parts(weight.shape[0], weight.dtype) if self.aligned else whole

    def logits(self, h: Tensor) -> Tensor:
        """[rows, d] -> [rows, V]."""
        if not self.aligned:
            return h @ self.weight.T
        return vocabulary_product(h, self.weight, aligned_rows(len(h), len(self.weight), h))

    def operand(self, gradient: Tensor) -> Tensor:
        """A gradient of the logits [rows, V], as the other two products take it."""
        if not self.aligned:
            return gradient.to(self.weight.dtype)
        return aligned_rows(len(gradient), len(self.weight), self.weight).copy_(gradient)

    def of_hidden(self, gradient: Tensor) -> Tensor:
        """[rows, V] -> [rows, d]."""
        if not self.aligned:
            return gradient @ self.weight
        return hidden_product(
            gradient, self.weight, self.weight.new_empty(len(gradient), self.weight.shape[1])
        )

    def add_of_weight(self, total: Tensor, gradient: Tensor, h: Tensor) -> None:
        """Add what rows with gradient [rows, V] contribute to the weight's, ``total`` [V, d]."""
        for part in self.parts:
            total[part] += gradient[:, part].T @ h


class _EntropySum(torch.autograd.Function):
    """Weighted sum of row entropies; the forward pass takes the gradients along."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        row_weights: Tensor,
        options: tuple[Any, ...],
        wanted: tuple[bool, bool],
    ) -> Tensor:
        # Weights of 1/count would push 16-bit gradients below what they can hold: scaled at the end.
        largest = row_weights.new_ones(())
        if row_weights.numel():
            largest = row_weights.abs().amax()
            largest = largest.masked_fill(largest == 0, 1)
        scaled, softmax = row_weights / largest, SoftmaxCrossEntropy(hidden, *options)
        total = row_weights.new_zeros(())
        grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=scaled.dtype) if wanted[1] else None
        # The logits, log p, p and one product of theirs are there at a time.
        rows = WORKSPACE_BYTES // (weight.shape[0] * (3 * scaled.itemsize + hidden.itemsize))
        products = _Products(weight)
        for index in scaled.nonzero()[:, 0].split(max(1, min(MAX_ROWS, rows))):
            h = hidden[index]
            x, slope = softmax.scaled(products.logits(h))
            logp = x - x.logsumexp(1, keepdim=True)
            p = logp.exp()
            logp.masked_fill_(p == 0, 0.0)  # of banned ids
            entropy = -(p * logp).sum(1)
            total += scaled[index] @ entropy
            if not any(wanted):
                continue
            gradient = logp.add_(entropy[:, None]).mul_(p).mul_(-scaled[index, None]).mul_(slope)
            gradient = products.operand(gradient)
            if grad_hidden is not None:
                grad_hidden[index] = products.of_hidden(gradient)
            if grad_weight is not None:
                products.add_of_weight(grad_weight, gradient, h)
        ctx.save_for_backward(hidden, weight, grad_hidden, grad_weight, largest)
        return total * largest

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight, *gradients, largest = ctx.saved_tensors
        with torch.no_grad():
            grad = grad * largest
            results = [None if g is None else (g * grad).to(hidden.dtype) for g in gradients]
        return (*first_only("linear_entropy_sum", (hidden, weight), results), None, None, None)
