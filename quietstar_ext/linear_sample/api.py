"""Sampling from hidden states: the vocabulary product in chunks of rows that are never kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quietstar_ext import checks
from quietstar_ext.dispatch import choose_impl
from quietstar_ext.linear_sample.call import LinearSample
from quietstar_ext.linear_sample.fused import operator
from quietstar_ext.native import native_unsupported_reason
from quietstar_ext.precision import autocast_inputs
from quietstar_ext.sample_tokens.call import check_sampling, seed_tensor


def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    banned: torch.Tensor | Sequence[int] | None = None,
    seed: int | torch.Tensor,
    offset: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row from the logits ``hidden @ weight.T`` without ever holding them all.

    ``logits = softcap(hidden @ weight.T * logit_scale)`` with softcap(x) = c tanh(x / c); the rest is
    :func:`quietstar_ext.sample_tokens`, which describes the options, the random numbers and the
    results. The fused implementation holds at most 64 MiB of logits, on CUDA 256 MiB (a single row may
    need more); its product has the dtype of hidden, as the model's own would, and scale and cap are
    applied in float32. On CUDA it waits for nothing and can be captured in a graph.

    Args:
        hidden: [rows, d] float32, bfloat16, float16, or float64 (reference only).
        weight: [vocab, d], dtype and device of hidden. No gradient flows to either.
        softcap: c > 0, or None.
        logit_scale: factor on the product.

    Returns:
        tokens [rows] int64 and logprobs [rows] float32.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quietstar_ext.sample_tokens`.
    """
    checks.refuse_vmap("linear_sample")
    checks.check_tensor("hidden", hidden, ["rows", "d"], checks.FLOAT_DTYPES)
    checks.check_tensor("weight", weight, ["vocab", hidden.shape[1]], None, hidden.device)
    hidden, weight = autocast_inputs(hidden, weight)
    checks.check_tensor("weight", weight, ["vocab", "d"], [hidden.dtype])
    check_sampling(temperature, top_k, top_p, min_p)
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows; expected a vocabulary of at least one token")
    if softcap is not None:
        checks.check_positive("softcap", softcap)
    checks.check_number("logit_scale", logit_scale)
    checks.check_whole("offset", offset)
    banned = checks.banned_ids(banned, weight.shape[0], hidden.device)
    fused = choose_impl("linear_sample", impl, native_unsupported_reason(hidden)) == "fused"
    seed = seed_tensor(seed, hidden.device)
    sampling = float(temperature), top_k, float(top_p), float(min_p), banned, seed, offset
    cap = None if softcap is None else float(softcap)
    call = LinearSample(hidden.detach(), weight.detach(), *sampling, cap, float(logit_scale), fused)
    return operator(*call)
