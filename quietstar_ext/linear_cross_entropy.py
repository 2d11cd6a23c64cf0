"""Cross entropy straight from hidden states, without holding rows x vocabulary logits.

``linear_cross_entropy`` returns the loss of every row, ``linear_cross_entropy_sum`` their weighted
sum. Both take the gradients while the logits are there, so that they need three matrix products
instead of four: the sum because it knows every row's weight, the other by assuming that all are equal.
The chunked products are in ``linear_cross_entropy_chunks.py`` and ``linear_cross_entropy_cuda.py``,
the CPU's step between them in ``linear_cross_entropy_softmax.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quietstar_ext import checks
from quietstar_ext import linear_cross_entropy_chunks as chunks
from quietstar_ext.derivatives import first_only, refuse_batched, why_not_differentiable
from quietstar_ext.dispatch import choose_impl
from quietstar_ext.native import why_not_native
from quietstar_ext.precision import autocast_inputs, compute_dtype, without_autocast
from quietstar_ext.reference.linear_cross_entropy import linear_cross_entropy as _reference
from quietstar_ext.reference.linear_cross_entropy import linear_cross_entropy_sum as _reference_sum

ACCUMULATE = ("auto", "float32", "parameter")


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
    accumulate: str = "auto",
    impl: str = "auto",
) -> torch.Tensor:
    """Negative log-likelihood of each row's target under a linear layer and a softmax.

    ::

        x = cap(logit_scale · hidden weightᵀ) / temperature    cap(a) = softcap · tanh(a / softcap)
        nll[r] = log Σ_{v not banned} exp(x[r, v]) - x[r, targets[r]]

    Rows whose target is ``ignore_index`` have nll 0 and no gradient, whatever their hidden state
    holds; the fused path leaves them out, so they cost no product (in a CUDA graph they do). It works
    on chunks of rows in at most 64 MiB besides its results, on CUDA 256 MiB (one row at least).

    Where a gradient will be asked for, the fused path takes it along in the forward pass, as if every
    row counted the same: then a sum or a mean of the rows needs three matrix products in all, and the
    gradients (one as large as weight) are held until the backward pass. If the rows' incoming
    gradients differ after all, weight's is computed again, of the rows where it is not 0: up to five
    products. Weights that are known before the call belong in ``linear_cross_entropy_sum``.

    On CUDA the host may wait for the device for two things: to leave rows out, and to see whether the
    incoming gradients are equal (those of ``nll.sum()`` show it without). It does not where the
    products to save are small, nor in a CUDA graph, which can be captured; there only ``nll.sum()``
    keeps to three products.

    Args:
        hidden: [rows, d], float32, bfloat16, float16 or float64 (reference only).
        weight: [V, d], dtype and device of hidden.
        targets: [rows] int64, in 0 .. V-1 or ``ignore_index``. Checked on the CPU only, where it
            costs no wait. Out of range on CUDA makes the row's nll and the gradients NaN (fused).
        temperature: greater than 0.
        banned: ids [n] that the softmax leaves out: an int64 tensor on hidden's device, a sequence
            of int, or None. The nll of a banned target is inf; not every id may be banned.
        ignore_index: the target that marks a row without a loss.
        softcap: c > 0, or None.
        logit_scale: factor on the logits, before the cap.
        accumulate: how weight's gradient is summed over chunks of rows, for bfloat16 on CUDA:
            ``"float32"`` in a buffer of 4·V·d bytes; ``"parameter"`` in bfloat16, rounded once per
            chunk (8 chunks for 8192 rows onto 128,256 words), without a buffer; ``"auto"`` in
            float32 where the buffer takes no more than half of the 256 MiB. Else always in float32.
        impl: ``"auto"``, ``"fused"`` or ``"reference"``.

    Returns:
        nll [rows], float32 (float64 for float64 inputs), with gradients for hidden and weight.
        Softmax and sums are taken in that dtype. Under autocast hidden and weight are cast first,
        as for a matrix product.

    Raises:
        TypeError: an argument that must be a tensor is none.
        ValueError: a shape, dtype, device, id or option does not fit; the message names the
            argument.
        RuntimeError: ``impl="fused"`` and there is no kernel for this call,
            or a second derivative is taken through a kernel (the reference has them).
    """
    hidden, weight = autocast_inputs(hidden, weight)
    banned = _check(hidden, weight, targets, temperature, banned, ignore_index, softcap, logit_scale)
    _check_accumulate(accumulate)
    temperature, logit_scale = float(temperature), float(logit_scale)
    softcap = None if softcap is None else float(softcap)

    chosen = choose_impl("linear_cross_entropy", impl, _why_not_fused(hidden, weight))
    with without_autocast(hidden):
        if chosen == "fused":
            options = (float(temperature), ignore_index, softcap, float(logit_scale))
            wanted = _wanted(hidden, weight)
            nll: torch.Tensor = _LinearCrossEntropy.apply(
                hidden, weight, targets, banned, options, wanted, accumulate
            )
            return nll
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
    accumulate: str = "auto",
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``Σ_r row_weights[r] · nll[r]``, for row weights that are known before the call.

    A mean over n rows has weights 1/n, a REINFORCE term weights -advantage/count. The fused path
    takes the gradients in the forward pass, row chunk by row chunk, and the backward pass only
    scales them, in place, and not at all if it comes with a gradient of 1: three matrix products. For
    bfloat16 on the CPU four, where an fp32 copy of weight does not fit into half of the 64 MiB.
    On CUDA the host waits once where rows may be left out, as in ``linear_cross_entropy``.

    Args:
        row_weights: [rows], float32 or the dtype that hidden is summed in; gets no gradient. Rows
            of weight 0 get no gradient either.
        skip_zero_weight: leave rows of weight 0 out altogether; their nll is then 0. False computes
            their nll.
        hidden, weight, targets, temperature, banned, ignore_index, softcap, logit_scale,
            accumulate, impl: as in ``linear_cross_entropy``.

    Returns:
        the loss, a scalar with gradients for hidden and weight, and nll [rows] without gradient;
        both float32 (float64 for float64 inputs).

    Raises:
        as ``linear_cross_entropy``.
    """
    hidden, weight = autocast_inputs(hidden, weight)
    banned = _check(hidden, weight, targets, temperature, banned, ignore_index, softcap, logit_scale)
    _check_accumulate(accumulate)
    temperature, logit_scale = float(temperature), float(logit_scale)
    softcap = None if softcap is None else float(softcap)
    wide = compute_dtype(hidden.dtype)
    checks.check_tensor(
        "row_weights", row_weights, [hidden.shape[0]], [torch.float32, wide], hidden.device
    )
    row_weights = row_weights.detach().to(wide)

    chosen = choose_impl("linear_cross_entropy_sum", impl, _why_not_fused(hidden, weight))
    with without_autocast(hidden):
        if chosen == "fused":
            options = (float(temperature), ignore_index, softcap, float(logit_scale), skip_zero_weight)
            wanted = _wanted(hidden, weight)
            loss, nll = _LinearCrossEntropySum.apply(
                hidden, weight, targets, row_weights, banned, options, wanted, accumulate
            )
            return loss, nll
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


def _why_not_fused(hidden: torch.Tensor, weight: torch.Tensor) -> str | None:
    """None where the fused path takes this call, otherwise half a sentence with the reason."""
    return why_not_native(hidden) or why_not_differentiable(hidden, weight)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    banned: torch.Tensor | Sequence[int] | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
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
    checks.check_number("logit_scale", logit_scale)
    checks.check_whole("ignore_index", ignore_index)
    return checks.banned_ids(banned, vocabulary, hidden.device)


def _check_accumulate(accumulate: str) -> None:
    if accumulate not in ACCUMULATE:
        raise ValueError(f"accumulate is {accumulate!r}; expected one of {', '.join(ACCUMULATE)}")


def _wanted(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[bool, bool]:
    """Which gradients will be asked for; inside a Function's forward no tensor requires any."""
    grads = torch.is_grad_enabled()
    return grads and hidden.requires_grad, grads and weight.requires_grad


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
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        banned: torch.Tensor | None,
        options: tuple[float, int, float | None, float],
        wanted: tuple[bool, bool],
        accumulate: str,
    ) -> torch.Tensor:
        if not any(wanted):
            return torch.ops.quietstar.linear_cross_entropy_forward(
                hidden, weight, targets, banned, *options
            )
        ones = torch.ones(hidden.shape[0], dtype=compute_dtype(hidden.dtype), device=hidden.device)
        nll, *gradients = torch.ops.quietstar.linear_cross_entropy_forward_and_backward(
            hidden, weight, targets, ones, banned, *options, False, *wanted, accumulate
        )
        _keep(ctx, (gradients[0], gradients[1]), hidden, weight, targets, banned)
        ctx.options, ctx.wanted, ctx.accumulate = options, wanted, accumulate
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        refuse_batched("linear_cross_entropy", grads[0])
        gradients, (hidden, weight, targets, banned) = _take(ctx)
        run = chunks.backward
        if torch.compiler.is_compiling():
            run = torch.ops.quietstar.linear_cross_entropy_backward
        with torch.no_grad():
            results = run(
                grads[0],
                *(hidden, weight, targets),
                *(gradients or (None, None)),
                *(banned, *ctx.options, *ctx.wanted, ctx.accumulate),
            )
        shown = first_only("linear_cross_entropy", (hidden, weight), _where(ctx.wanted, results))
        return (*shown, *(None,) * 5)


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
        accumulate: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # 16-bit gradients are taken for weights of at most 1 and scaled at the end: weights of
        # 1/count would push them below what float16 can hold.
        largest = row_weights.new_ones(())
        if hidden.dtype.itemsize == 2 and row_weights.numel():
            largest = row_weights.abs().amax()
            largest = largest.masked_fill(largest == 0, 1)
        nll, *gradients = torch.ops.quietstar.linear_cross_entropy_forward_and_backward(
            *(hidden, weight, targets, row_weights / largest, banned),
            *(*options, *wanted, accumulate),
        )
        _keep(ctx, (gradients[0], gradients[1]), largest, hidden, weight, targets, row_weights, banned)
        ctx.options, ctx.wanted, ctx.accumulate = options, wanted, accumulate
        ctx.mark_non_differentiable(nll)
        return (row_weights * nll.masked_fill(row_weights == 0, 0)).sum(), nll

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        refuse_batched("linear_cross_entropy_sum", grads[0])
        gradients, (largest, hidden, weight, targets, row_weights, banned) = _take(ctx)
        with torch.no_grad():
            scale = grads[0] * largest
            if gradients is None:
                _, *again = torch.ops.quietstar.linear_cross_entropy_forward_and_backward(
                    *(hidden, weight, targets, row_weights / largest, banned),
                    *(*ctx.options, *ctx.wanted, ctx.accumulate),
                )
                gradients = (again[0], again[1])
            if torch.compiler.is_compiling():
                results = [(gradient * scale).to(hidden.dtype) for gradient in gradients]
            else:
                results = [chunks.scale_(gradient, scale).to(hidden.dtype) for gradient in gradients]
        shown = first_only("linear_cross_entropy_sum", (hidden, weight), _where(ctx.wanted, results))
        return (*shown, *(None,) * 6)


def _where(wanted: tuple[bool, bool], results: Any) -> list[torch.Tensor | None]:
    return [result if want else None for want, result in zip(wanted, results, strict=True)]
