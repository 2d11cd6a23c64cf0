"""Cross entropy straight from hidden states, without holding rows x vocabulary logits.

``linear_cross_entropy`` returns the loss of every row, ``linear_cross_entropy_sum`` their weighted
sum. Both take the gradients while the logits are there, so that they need three matrix products
instead of four: the sum because it knows every row's weight, the other by assuming that all are equal.
The chunked products are in ``cpu.py`` and ``cuda.py``, the CPU's step between them in ``softmax.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quietstar_ext import checks
from quietstar_ext.derivatives import derivatives_unsupported_reason
from quietstar_ext.dispatch import choose_impl
from quietstar_ext.linear_cross_entropy.call import LinearCrossEntropy
from quietstar_ext.linear_cross_entropy.fused import fused
from quietstar_ext.linear_cross_entropy.reference import reference, reference_sum
from quietstar_ext.native import native_unsupported_reason
from quietstar_ext.precision import autocast_inputs, compute_dtype, without_autocast

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
    on chunks of rows in at most 64 MiB besides its results, in bfloat16 and on CUDA 256 MiB (one row at
    least).

    Where a gradient will be asked for, the fused path takes it along in the forward pass, as if every
    row counted the same: a sum or a mean of the rows then needs three matrix products in all, and the
    gradients (one as large as weight) are held until the backward pass. If the rows' incoming
    gradients differ after all, weight's is computed again: up to five products. Weights that are known
    before the call belong in ``linear_cross_entropy_sum``.

    On CUDA the host may wait for the device to leave rows out, and to see whether the incoming
    gradients are equal (those of ``nll.sum()`` show it without). It does not where the products to save
    are few, nor in a CUDA graph; there only ``nll.sum()`` keeps to three products.

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
            chunk (8 chunks for 8192 rows onto 128,256 tokens), without a buffer; ``"auto"`` in
            float32 where the buffer takes no more than half of the 256 MiB. Else always in float32.
        impl: ``"auto"``, ``"fused"`` or ``"reference"``.

    Returns:
        nll [rows], float32 (float64 for float64 inputs), with gradients for hidden and weight.
        Softmax and sums are taken in that dtype. Under autocast hidden and weight are cast first,
        as for a matrix product.

    Raises:
        TypeError: an argument that must be a tensor is not one.
        ValueError: a shape, dtype, device, id or option does not fit; the message names the argument.
        RuntimeError: ``impl="fused"`` and there is no kernel for this call, or a second derivative is
            taken through a kernel (the reference has them).
    """
    options = temperature, ignore_index, softcap, logit_scale
    hidden, weight = autocast_inputs(hidden, weight)
    call = LinearCrossEntropy(hidden, weight, targets, None, *options)
    call = _checked(call, banned, accumulate)

    reason = _fused_unsupported_reason(hidden, weight)
    chosen = choose_impl("linear_cross_entropy", impl, reason, call)
    with without_autocast(hidden):
        nll: torch.Tensor = (
            reference(call) if chosen != "fused" else fused(call, None, False, accumulate)
        )
    return nll


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
    bfloat16 on the CPU four, where neither all logits fit the 256 MiB nor an fp32 copy of weight half of
    them.
    On CUDA the host waits once to leave rows out.

    Args:
        row_weights: [rows], float32 or the dtype that hidden is summed in; gets no gradient. Rows
            of weight 0 get no gradient either.
        skip_zero_weight: leave rows of weight 0 out altogether; their nll is then 0. False computes
            their nll.
        hidden, weight, targets, temperature, banned: as in ``linear_cross_entropy``.
        ignore_index, softcap, logit_scale, accumulate, impl: as there.

    Returns:
        the loss, a scalar with gradients for hidden and weight, and nll [rows] without gradient;
        both float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError, RuntimeError: as ``linear_cross_entropy``.
    """
    options = temperature, ignore_index, softcap, logit_scale
    hidden, weight = autocast_inputs(hidden, weight)
    call = LinearCrossEntropy(hidden, weight, targets, None, *options)
    call = _checked(call, banned, accumulate)
    wide = compute_dtype(hidden.dtype)
    checks.check_tensor(
        "row_weights", row_weights, [hidden.shape[0]], [torch.float32, wide], hidden.device
    )
    row_weights = row_weights.detach().to(wide)

    reason = _fused_unsupported_reason(hidden, weight)
    chosen = choose_impl("linear_cross_entropy_sum", impl, reason, call, row_weights=row_weights)
    with without_autocast(hidden):
        if chosen == "reference":
            return reference_sum(call, row_weights, skip_zero_weight)
        loss, nll = fused(call, row_weights, skip_zero_weight, accumulate)
    return loss, nll


def _fused_unsupported_reason(hidden: torch.Tensor, weight: torch.Tensor) -> str | None:
    """None where the fused path takes this call, otherwise half a sentence with the reason."""
    return native_unsupported_reason(hidden) or derivatives_unsupported_reason(hidden, weight)


def _checked(
    call: LinearCrossEntropy, banned: torch.Tensor | Sequence[int] | None, accumulate: str
) -> LinearCrossEntropy:
    """Check all arguments; return the call with the banned ids as a tensor and numbers as floats."""
    hidden, weight, targets, _, temperature, ignore_index, softcap, logit_scale = call
    checks.check_tensor("hidden", hidden, ["rows", "d"], checks.FLOAT_DTYPES)
    rows, size = hidden.shape
    checks.check_tensor("weight", weight, ["V", size], [hidden.dtype], hidden.device)
    checks.check_tensor("targets", targets, [rows], [torch.int64], hidden.device)
    vocabulary = weight.shape[0]
    if vocabulary == 0:
        raise ValueError("weight has no rows; expected a vocabulary of at least 1")
    checks.check_index_range("targets", targets, vocabulary, also=ignore_index)
    checks.check_positive("temperature", temperature)
    softcap, logit_scale = checks.check_scaling(softcap, logit_scale)
    checks.check_whole("ignore_index", ignore_index)
    checks.check_option("accumulate", accumulate, ACCUMULATE)
    ids = checks.banned_ids(banned, vocabulary, hidden.device)
    options = float(temperature), ignore_index, softcap, logit_scale
    return LinearCrossEntropy(hidden, weight, targets, ids, *options)
