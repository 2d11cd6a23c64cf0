"""Cross entropy straight from hidden states, without holding rows x vocabulary logits.

``linear_cross_entropy`` returns the loss of every row, ``linear_cross_entropy_sum`` their weighted
sum. The sum knows every row's gradient before the backward pass, so it takes the gradients while
the logits are there: three matrix products instead of four. The chunked products are in
``linear_cross_entropy_chunks.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quietstar_ext import checks
from quietstar_ext import linear_cross_entropy_chunks as chunks
from quietstar_ext.dispatch import choose_impl
from quietstar_ext.precision import autocast_inputs, compute_dtype, without_autocast
from quietstar_ext.reference.linear_cross_entropy import linear_cross_entropy as _reference
from quietstar_ext.reference.linear_cross_entropy import linear_cross_entropy_sum as _reference_sum


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    banned: torch.Tensor | Sequence[int] | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
) -> torch.Tensor:
    """Negative log-likelihood of each row's target under a linear layer and a softmax.

    ::

        x = cap(logit_scale · hidden weightᵀ) / temperature    cap(a) = softcap · tanh(a / softcap)
        nll[r] = log Σ_{v not banned} exp(x[r, v]) - x[r, targets[r]]

    Rows whose target is ``ignore_index`` have nll 0 and no gradient, whatever their hidden state
    holds. The fused path works on chunks of rows in at most 64 MiB (one row at least) and leaves
    out ignored rows, and in the backward pass every row whose incoming gradient is 0; each costs no
    product.

    Args:
        hidden: [rows, d], float32, bfloat16, float16 or float64 (reference only).
        weight: [V, d], dtype and device of hidden.
        targets: [rows] int64, in 0 .. V-1 or ``ignore_index``. Checked on the CPU only, where it
            costs no wait; out of range on CUDA is an error of PyTorch's or undefined.
        temperature: greater than 0.
        banned: ids [n] that the softmax leaves out: an int64 tensor on hidden's device, a sequence
            of int, or None. The nll of a banned target is inf; not every id may be banned.
        ignore_index: the target that marks a row without a loss.
        softcap: c > 0, or None.
        logit_scale: factor on the logits, before the cap.
        impl: ``"auto"``, ``"fused"`` or ``"reference"``.

    Returns:
        nll [rows], float32 (float64 for float64 inputs), with gradients for hidden and weight.
        Softmax and sums are taken in that dtype. Under autocast hidden and weight are cast first,
        as for a matrix product.

    Raises:
        TypeError: an argument that must be a tensor is none.
        ValueError: a shape, dtype, device, id or option does not fit; the message names the
            argument.
        RuntimeError: ``impl="fused"`` and there is no kernel for this call.
    """
    hidden, weight = autocast_inputs(hidden, weight)
    banned = _check(hidden, weight, targets, temperature, banned, ignore_index, softcap)

    chosen = choose_impl("linear_cross_entropy", impl, _why_not_fused(hidden))
    with without_autocast(hidden):
        if chosen == "fused":
            return _fused(
                hidden, weight, targets, banned, temperature, ignore_index, softcap, logit_scale
            )
        return _reference(
            hidden,
            weight,
            targets,
            temperature=temperature,
            banned=banned,
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
        )


def linear_cross_entropy_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    *,
    temperature: float = 1.0,
    banned: torch.Tensor | Sequence[int] | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    skip_zero_weight: bool = True,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``Σ_r row_weights[r] · nll[r]``, for row weights that are known before the call.

    A mean over n rows has weights 1/n, a REINFORCE term weights -advantage/count. The fused path
    takes the gradients in the forward pass, row chunk by row chunk, and the backward pass only
    scales them: three matrix products where ``linear_cross_entropy`` needs four.

    Args:
        row_weights: [rows], float32 or the dtype that hidden is summed in; gets no gradient. Rows
            of weight 0 get no gradient either.
        skip_zero_weight: leave rows of weight 0 out altogether; their nll is then 0. False computes
            their nll.
        hidden, weight, targets, temperature, banned, ignore_index, softcap, logit_scale, impl: as
            in ``linear_cross_entropy``.

    Returns:
        the loss, a scalar with gradients for hidden and weight, and nll [rows] without gradient;
        both float32 (float64 for float64 inputs).

    Raises:
        as ``linear_cross_entropy``.
    """
    hidden, weight = autocast_inputs(hidden, weight)
    banned = _check(hidden, weight, targets, temperature, banned, ignore_index, softcap)
    wide = compute_dtype(hidden.dtype)
    checks.check_tensor(
        "row_weights", row_weights, [hidden.shape[0]], [torch.float32, wide], hidden.device
    )
    row_weights = row_weights.detach().to(wide)

    chosen = choose_impl("linear_cross_entropy_sum", impl, _why_not_fused(hidden))
    with without_autocast(hidden):
        if chosen == "fused":
            return _fused_sum(
                hidden,
                weight,
                targets,
                row_weights,
                banned,
                temperature,
                ignore_index,
                softcap,
                logit_scale,
                skip_zero_weight,
            )
        return _reference_sum(
            hidden,
            weight,
            targets,
            row_weights,
            temperature=temperature,
            banned=banned,
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            skip_zero_weight=skip_zero_weight,
        )


def _why_not_fused(hidden: torch.Tensor) -> str | None:
    """None where the fused path takes this call, otherwise half a sentence with the reason.

    The fused path is ``_fused`` below; it waits for the kernel that takes the place of
    ``linear_cross_entropy_chunks.softmax_cross_entropy_``.
    """
    return f"there is no softmax_cross_entropy kernel for {hidden.device.type} in this build"


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    banned: torch.Tensor | Sequence[int] | None,
    ignore_index: int,
    softcap: float | None,
) -> torch.Tensor | None:
    """Check all arguments; return the banned ids as a tensor or None."""
    checks.check_tensor("hidden", hidden, ["rows", "d"], checks.FLOAT_DTYPES)
    rows, size = hidden.shape
    checks.check_tensor("weight", weight, ["V", size], [hidden.dtype], hidden.device)
    checks.check_tensor("targets", targets, [rows], [torch.int64], hidden.device)
    vocabulary = weight.shape[0]
    if vocabulary == 0:
        raise ValueError("weight has no rows; expected a vocabulary of at least 1")
    checks.check_index_range("targets", targets, vocabulary, also=ignore_index)
    checks.check_positive("temperature", temperature)
    if softcap is not None:
        checks.check_positive("softcap", softcap)
    return checks.banned_ids(banned, vocabulary, hidden.device)


def _fused(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    banned: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> torch.Tensor:
    options = (float(temperature), ignore_index, softcap, float(logit_scale))
    nll: torch.Tensor
    nll = _LinearCrossEntropy.apply(hidden, weight, targets, banned, options)
    return nll


def _fused_sum(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    options = (float(temperature), ignore_index, softcap, float(logit_scale), skip_zero_weight)
    # Asked here, because inside the Function's forward no tensor requires a gradient any more.
    grads = torch.is_grad_enabled()
    wanted = (grads and hidden.requires_grad, grads and weight.requires_grad)
    loss, nll = _LinearCrossEntropySum.apply(
        hidden, weight, targets, row_weights, banned, options, wanted
    )
    return loss, nll


class _LinearCrossEntropy(torch.autograd.Function):
    """nll per row; the backward pass computes the logits again (four products in all)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        banned: torch.Tensor | None,
        options: tuple[float, int, float | None, float],
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, targets, banned)
        ctx.options = options
        return chunks.forward(hidden, weight, targets, banned, *options)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        hidden, weight, targets, banned = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        grad_hidden, grad_weight = chunks.backward(
            grads[0], hidden, weight, targets, banned, *ctx.options, *wanted
        )
        return (
            grad_hidden if wanted[0] else None,
            grad_weight if wanted[1] else None,
            None,
            None,
            None,
        )


class _LinearCrossEntropySum(torch.autograd.Function):
    """Weighted sum of nll; the forward pass takes the gradients along (three products in all)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        row_weights: torch.Tensor,
        banned: torch.Tensor | None,
        options: tuple[float, int, float | None, float, bool],
        wanted: tuple[bool, bool],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Gradients are taken for weights of at most 1 and scaled at the end: weights of 1/count
        # would push them below what float16 can hold.
        largest = row_weights.abs().amax() if row_weights.numel() else row_weights.new_zeros(())
        unit_weights = row_weights / largest.masked_fill(largest == 0, 1)
        nll, grad_hidden, grad_weight = chunks.forward_and_backward(
            hidden, weight, targets, unit_weights, banned, *options, *wanted
        )
        ctx.save_for_backward(grad_hidden, grad_weight, largest)
        ctx.wanted = wanted
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(nll)
        return (row_weights * nll.masked_fill(row_weights == 0, 0)).sum(), nll

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_hidden, grad_weight, largest = ctx.saved_tensors
        scale = grads[0] * largest
        return (
            (grad_hidden * scale).to(ctx.dtype) if ctx.wanted[0] else None,
            (grad_weight * scale).to(ctx.dtype) if ctx.wanted[1] else None,
            *(None,) * 5,
        )
