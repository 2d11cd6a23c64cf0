"""The operators of linear_cross_entropy with first derivatives, which the forward pass takes along.

The operators are registered with ``torch.library``, opaque to ``torch.compile``, because how many rows
remain is known at run time only. Rows that cannot contribute are left out of ``Products``, so they cost
none.
"""

from __future__ import annotations

from typing import Any

import torch

from quietstar_ext.derivatives import first_only, reject_batched
from quietstar_ext.linear_cross_entropy import cpu, cuda
from quietstar_ext.linear_cross_entropy.call import (
    TENSORS,
    LinearCrossEntropy,
    LinearCrossEntropyBackward,
    Losses,
    Products,
    WithGradients,
)
from quietstar_ext.native import DTYPE_CODES, takes_cuda_path
from quietstar_ext.operators import register
from quietstar_ext.precision import compute_dtype, gradient_dtype

Wanted = tuple[bool, bool, bool, str]  # skip_zero_weight, of hidden, of weight, accumulate


def fused(
    call: LinearCrossEntropy, row_weights: torch.Tensor | None, skip_zero_weight: bool, accumulate: str
) -> Any:
    """nll [rows], or with row weights Σ row_weights · nll, and nll without gradient."""
    grads = torch.is_grad_enabled()  # inside the Function no tensor requires any
    wanted = grads and call.hidden.requires_grad, grads and call.weight.requires_grad
    if row_weights is None and not any(wanted):
        return forward_operator(*call)
    options = call[TENSORS:], (skip_zero_weight, *wanted, accumulate)
    return _LinearCrossEntropy.apply(*options, row_weights, *call[:TENSORS])


class _LinearCrossEntropy(torch.autograd.Function):
    """nll per row, or with row weights their sum (and nll besides).

    The forward pass takes along the gradients for the row weights; without any, for equal incoming
    gradients, as those of a sum or a mean are: three products in all. Where these differ after all,
    weight's gradient is computed again: five.

    A gradient is as large as the weight. Handed over to the one backward pass instead of copied, it is
    scaled in place and becomes ``weight.grad`` itself; copying took 4 per cent of a step at 2048 x 1024
    onto 32000. A second backward pass computes it again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: tuple[Any, ...],
        wanted: Wanted,
        row_weights: torch.Tensor | None,
        *tensors: torch.Tensor | None,
    ) -> Any:
        hidden = tensors[0]
        assert hidden is not None
        if row_weights is None:
            wide = compute_dtype(hidden.dtype)
            largest, unit = None, torch.ones(hidden.shape[0], dtype=wide, device=hidden.device)
        else:
            # 16-bit gradients are taken for weights of at most 1 and scaled at the end: weights of
            # 1/count would push them below what float16 can hold.
            largest = row_weights.new_ones(())
            if hidden.dtype.itemsize == 2 and row_weights.numel():
                largest = row_weights.abs().amax()
                largest = largest.masked_fill(largest == 0, 1)
            unit = row_weights / largest
        nll, *gradients = gradients_operator(*tensors, *options, unit, *wanted)
        ctx.gradients, ctx.options, ctx.wanted = None, options, wanted
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*gradients, largest, row_weights, *tensors)
        else:
            ctx.gradients = gradients
            ctx.save_for_backward(largest, row_weights, *tensors)
        if row_weights is None:
            return nll
        ctx.mark_non_differentiable(nll)
        return (row_weights * nll.masked_fill(row_weights == 0, 0)).sum(), nll

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        *gradients, largest, row_weights = ctx.saved_tensors[:-TENSORS]
        tensors, grad = ctx.saved_tensors[-TENSORS:], grads[0]
        name = "linear_cross_entropy" if row_weights is None else "linear_cross_entropy_sum"
        reject_batched(name, grad)
        if not torch.compiler.is_compiling():
            gradients, ctx.gradients = ctx.gradients, None  # None: an earlier pass has taken them
        with torch.no_grad():
            if row_weights is None:
                rest = grad, *(gradients or (None, None)), *ctx.wanted[1:]
                if torch.compiler.is_compiling():
                    results = backward_operator(*tensors, *ctx.options, *rest)
                else:
                    call = LinearCrossEntropy(*tensors, *ctx.options)
                    results = backward(LinearCrossEntropyBackward(call, *rest))
            else:
                if gradients is None:
                    unit = row_weights / largest
                    _, *gradients = gradients_operator(*tensors, *ctx.options, unit, *ctx.wanted)
                scale, dtype = grad * largest, tensors[0].dtype
                multiply = torch.mul if torch.compiler.is_compiling() else scale_
                results = [multiply(gradient, scale).to(dtype) for gradient in gradients]
        shown = [r if want else None for r, want in zip(results, ctx.wanted[1:3], strict=True)]
        return (None, None, None, *first_only(name, tensors[:2], shown), None, None)


def _run(products: Products) -> Losses:
    on_cuda = products.softmax.fused and takes_cuda_path(products.hidden)
    return (cuda if on_cuda else cpu).run(products)


def forward(call: LinearCrossEntropy) -> torch.Tensor:
    """nll [rows] in float32 or float64; no gradient is recorded."""
    valid_rows = call.targets != call.ignore_index
    return _run(Products(*call[:3], None, valid_rows, call.softmax(), False, False)).nll


def forward_and_backward(call: WithGradients) -> Losses:
    """The losses, and the gradients of Σ row_weights · nll."""
    inputs, row_weights, skip_zero_weight, *_ = call
    valid_rows = inputs.targets != inputs.ignore_index
    if skip_zero_weight:
        valid_rows &= row_weights != 0
    return _run(Products(*inputs[:3], row_weights, valid_rows, inputs.softmax(), *call[3:]))


def backward(call: LinearCrossEntropyBackward) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of Σ grad · nll in the dtype of hidden; undefined where not wanted."""
    inputs, grad, unit_hidden, unit_weight, want_hidden, want_weight, accumulate = call
    hidden, weight = inputs[:2]
    valid_rows = inputs.targets != inputs.ignore_index
    if unit_hidden is not None and unit_weight is not None:
        factor = _common_factor(grad, valid_rows, 4.0 * hidden.shape[0] * weight.numel())
        if factor is not None:
            return scale_(unit_hidden, factor), scale_(unit_weight, factor).to(weight.dtype)
        grad = grad.masked_fill(~valid_rows, 0)
        # Rows differ: a row of hidden's gradient is scaled, the sum for weight is taken again.
        if want_hidden:
            unit_hidden.mul_(grad[:, None])
            want_hidden = False
    valid_rows &= grad != 0
    wanted = want_hidden, want_weight, accumulate
    results = _run(Products(*inputs[:3], grad, valid_rows, inputs.softmax(), *wanted))
    grad_hidden = results.grad_hidden if unit_hidden is None else unit_hidden
    return grad_hidden, results.grad_weight.to(weight.dtype)


def _backward(call: LinearCrossEntropyBackward) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as an operator, which does not change its arguments."""
    hidden, weight = (None if t is None else t.clone() for t in (call.unit_hidden, call.unit_weight))
    return backward(call._replace(unit_hidden=hidden, unit_weight=weight))


def _common_factor(grad: torch.Tensor, valid_rows: torch.Tensor, flop: float) -> torch.Tensor | None:
    """The one value of grad [rows] in all valid rows, a scalar on its device, or None where they differ
    or finding out is not worth the wait; flop is what knowing it saves. 1 where no row is valid: their
    gradients are 0, which an infinite factor would make NaN."""
    if grad.numel() == 0:
        return grad.new_ones(())
    if takes_cuda_path(grad):
        if grad.stride(0) == 0 or grad.numel() == 1:  # of a sum: one number, expanded
            return torch.where(valid_rows.any(), grad[0], 1)
        if not cuda.may_wait(grad, flop):
            return None
    low = grad.masked_fill(~valid_rows, torch.inf).amin()
    high = grad.masked_fill(~valid_rows, -torch.inf).amax()
    if bool(low > high):
        return grad.new_ones(())
    return low if bool(low >= high) and bool(low.isfinite()) else None


def scale_(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply a contiguous tensor in place; a scale of 1 costs nothing."""
    if takes_cuda_path(tensor) and tensor.dtype in DTYPE_CODES:
        return cuda.scale_(tensor, scale)
    return tensor if scale.device.type == "cpu" and float(scale) == 1 else tensor.mul_(scale)


def _fake(call: LinearCrossEntropy) -> torch.Tensor:
    hidden = call.hidden
    return hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype))


def _gradients_fake(call: WithGradients) -> Losses:
    hidden, weight = call.forward[:2]
    shape, dtype = weight.shape if call.want_weight else (0,), gradient_dtype(weight.dtype)
    grad_hidden = hidden.new_empty(hidden.shape if call.want_hidden else (0,))
    return Losses(_fake(call.forward), grad_hidden, weight.new_empty(shape, dtype=dtype))


def _backward_fake(call: LinearCrossEntropyBackward) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight = call.forward[:2]
    return (
        hidden.new_empty(hidden.shape if call.want_hidden else (0,)),
        weight.new_empty(weight.shape if call.want_weight else (0,)),
    )


forward_operator = register("linear_cross_entropy_forward", forward, _fake)
backward_operator = register("linear_cross_entropy_backward", _backward, _backward_fake)
gradients_operator = register(
    "linear_cross_entropy_forward_and_backward", forward_and_backward, _gradients_fake
)
