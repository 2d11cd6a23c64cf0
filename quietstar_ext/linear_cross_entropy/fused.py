"""The operators of linear_cross_entropy and what they run.

The operators are registered with ``torch.library``, opaque to ``torch.compile``, because how many rows
remain is known at run time only. Rows that cannot contribute are left out of ``Products``, so they cost
none.
"""

from __future__ import annotations

import torch

from quietstar_ext.linear_cross_entropy import cpu, cuda
from quietstar_ext.linear_cross_entropy.call import (
    LinearCrossEntropy,
    LinearCrossEntropyBackward,
    Losses,
    Products,
    WithGradients,
)
from quietstar_ext.native import DTYPE_CODES, takes_cuda_path
from quietstar_ext.operators import register
from quietstar_ext.precision import compute_dtype, gradient_dtype


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
        factor = _common_factor(grad, valid_rows, hidden, weight)
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
    assert call.unit_hidden is not None and call.unit_weight is not None
    # An operator does not change its arguments.
    units = call.unit_hidden.clone(), call.unit_weight.clone()
    return backward(call._replace(unit_hidden=units[0], unit_weight=units[1]))


def _common_factor(
    grad: torch.Tensor, valid_rows: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor | None:
    """The one value of grad [rows] in all valid_rows rows; None where they differ."""
    if takes_cuda_path(grad):
        return cuda.common_factor(grad, valid_rows, 4.0 * hidden.shape[0] * weight.numel())
    low, high = torch.aminmax(grad[valid_rows]) if bool(valid_rows.any()) else (grad.new_ones(()),) * 2
    return low if low == high else None


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


forward_operator = register("linear_cross_entropy_forward", LinearCrossEntropy, "Tensor", forward, _fake)
backward_operator = register(
    "linear_cross_entropy_backward",
    LinearCrossEntropyBackward,
    "(Tensor, Tensor)",
    _backward,
    _backward_fake,
)
gradients_operator = register(
    "linear_cross_entropy_forward_and_backward",
    WithGradients,
    "(Tensor, Tensor, Tensor)",
    forward_and_backward,
    _gradients_fake,
)
