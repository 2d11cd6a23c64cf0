"""linear_cross_entropy with first derivatives, which the forward pass takes along."""

from __future__ import annotations

from typing import Any

import torch

from quietstar_ext.derivatives import first_only, reject_batched
from quietstar_ext.linear_cross_entropy import fused
from quietstar_ext.linear_cross_entropy.call import (
    TENSORS,
    LinearCrossEntropy,
    LinearCrossEntropyBackward,
)
from quietstar_ext.precision import compute_dtype

Wanted = tuple[bool, bool, str]  # of hidden, of weight, and ``accumulate``


def fused_rows(call: LinearCrossEntropy, accumulate: str) -> torch.Tensor:
    """nll [rows]."""
    wanted = *_wanted(call), accumulate
    nll: torch.Tensor = _LinearCrossEntropy.apply(call[TENSORS:], wanted, *call[:TENSORS])
    return nll


def fused_sum(
    call: LinearCrossEntropy, row_weights: torch.Tensor, skip_zero_weight: bool, accumulate: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ row_weights · nll, and nll [rows] without gradient."""
    wanted = skip_zero_weight, *_wanted(call), accumulate
    loss, nll = _LinearCrossEntropySum.apply(call[TENSORS:], wanted, row_weights, *call[:TENSORS])
    return loss, nll


def _wanted(call: LinearCrossEntropy) -> tuple[bool, bool]:
    """Which gradients will be asked for; inside a Function's forward no tensor requires any."""
    grads = torch.is_grad_enabled()
    return grads and call.hidden.requires_grad, grads and call.weight.requires_grad


def _keep(ctx: Any, gradients: tuple[torch.Tensor, torch.Tensor], *inputs: torch.Tensor | None) -> None:
    """Keep gradients for one backward pass, and what is needed to compute them again for a second.

    A gradient is as large as the weight. Handed over instead of copied, it is scaled in place and
    becomes ``weight.grad`` itself; copying took 4 per cent of a step at 2048 x 1024 onto 32000.
    """
    if torch.compiler.is_compiling():
        ctx.save_for_backward(*gradients, *inputs)
    else:
        ctx.save_for_backward(*inputs)
        ctx.gradients = gradients


def _take(ctx: Any) -> tuple[tuple[torch.Tensor, torch.Tensor] | None, Any]:
    """The gradients, None if an earlier backward pass has taken them, and the inputs."""
    if torch.compiler.is_compiling():
        return ctx.saved_tensors[:2], ctx.saved_tensors[2:]
    gradients, ctx.gradients = ctx.gradients, None
    return gradients, ctx.saved_tensors


class _LinearCrossEntropy(torch.autograd.Function):
    """nll per row.

    The forward pass takes along the gradients for equal incoming gradients, as those of a sum or a
    mean are: three products in all. Where they differ, weight's gradient is computed again: five.
    """

    @staticmethod
    def forward(
        ctx: Any, options: tuple[Any, ...], wanted: Wanted, *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        hidden = tensors[0]
        if not any(wanted[:2]):
            return fused.forward_operator(*tensors, *options)
        assert hidden is not None
        ones = torch.ones(hidden.shape[0], dtype=compute_dtype(hidden.dtype), device=hidden.device)
        nll, *gradients = fused.gradients_operator(*tensors, *options, ones, False, *wanted)
        _keep(ctx, (gradients[0], gradients[1]), *tensors)
        ctx.options, ctx.wanted = options, wanted
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        reject_batched("linear_cross_entropy", grads[0])
        gradients, tensors = _take(ctx)
        rest = grads[0], *(gradients or (None, None)), *ctx.wanted
        with torch.no_grad():
            if torch.compiler.is_compiling():
                results = fused.backward_operator(*tensors, *ctx.options, *rest)
            else:
                call = LinearCrossEntropy(*tensors, *ctx.options)
                results = fused.backward(LinearCrossEntropyBackward(call, *rest))
        shown = first_only("linear_cross_entropy", tensors[:2], _where(ctx.wanted, results))
        return (None, None, *shown, None, None)


class _LinearCrossEntropySum(torch.autograd.Function):
    """Weighted sum of nll; the forward pass takes the gradients along (three products in all)."""

    @staticmethod
    def forward(
        ctx: Any,
        options: tuple[Any, ...],
        wanted: tuple[bool, bool, bool, str],
        row_weights: torch.Tensor,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # 16-bit gradients are taken for weights of at most 1 and scaled at the end: weights of
        # 1/count would push them below what float16 can hold.
        hidden, largest = tensors[0], row_weights.new_ones(())
        assert hidden is not None
        if hidden.dtype.itemsize == 2 and row_weights.numel():
            largest = row_weights.abs().amax()
            largest = largest.masked_fill(largest == 0, 1)
        nll, *gradients = fused.gradients_operator(*tensors, *options, row_weights / largest, *wanted)
        _keep(ctx, (gradients[0], gradients[1]), largest, row_weights, *tensors)
        ctx.options, ctx.wanted = options, wanted
        ctx.mark_non_differentiable(nll)
        return (row_weights * nll.masked_fill(row_weights == 0, 0)).sum(), nll

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        reject_batched("linear_cross_entropy_sum", grads[0])
        gradients, (largest, row_weights, *tensors) = _take(ctx)
        dtype = tensors[0].dtype
        with torch.no_grad():
            scale = grads[0] * largest
            if gradients is None:
                _, *again = fused.gradients_operator(
                    *tensors, *ctx.options, row_weights / largest, *ctx.wanted
                )
                gradients = (again[0], again[1])
            if torch.compiler.is_compiling():
                results = [(gradient * scale).to(dtype) for gradient in gradients]
            else:
                results = [fused.scale_(gradient, scale).to(dtype) for gradient in gradients]
        wanted = ctx.wanted[1:]
        shown = first_only("linear_cross_entropy_sum", tensors[:2], _where(wanted, results))
        return (None, None, None, *shown, None, None)


def _where(wanted: Wanted, results: Any) -> list[torch.Tensor | None]:
    return [result if want else None for want, result in zip(wanted[:2], results, strict=True)]
