"""Sampling one token per row of logits, without noise, sort or softmax in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quietstar_ext import checks
from quietstar_ext.dispatch import choose_impl
from quietstar_ext.native import native_unsupported_reason
from quietstar_ext.sample_tokens.call import checked_sampling
from quietstar_ext.sample_tokens.fused import operator


def sample_tokens(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    banned: torch.Tensor | Sequence[int] | None = None,
    seed: int | torch.Tensor,
    offset: int = 0,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row from ``softmax(logits / temperature)``, exactly.

    The banned ids are removed, then of the rest the ``top_k`` largest are kept, then of those the
    fewest that hold ``top_p`` of their mass, then those with ``p >= min_p * max(p)``. A token that
    ties with the last one kept is kept, too. The draw inverts the cumulative distribution in the
    order of the ids at one uniform number per row: Philox4x32-10 with key ``seed`` and counter
    ``offset + row``. So the same seed gives the same tokens for any number of threads, and for a batch
    split in parts whose ``offset`` is the index of their first row.

    Args:
        logits: [rows, vocab] float32, bfloat16, float16, or float64 (reference only). The fused
            kernel reads rows of any stride in place and copies only where the elements of a row do
            not lie side by side. No gradient flows through.
        temperature: 0 takes the largest logit (the lowest id where several tie), else 1e-30 to 1e30.
        top_k: 0 keeps all.
        top_p: above 0 and up to 1, which keeps all.
        min_p: 0 (keeps all) to 1.
        banned: int64 tensor [n] or list of token ids never to draw, in any row.
        seed: int64 number, or an int64 tensor of one element on the device of logits. The kernel for
            CUDA reads the tensor when it runs, so a captured graph draws anew from a new seed in it.
        offset: counter of the first row.
        impl: ``"auto"``, ``"fused"`` or ``"reference"`` (which computes in float64).

    Returns:
        tokens [rows] int64 and logprobs [rows] float32: the natural logarithm of the token's
        probability in the distribution drawn from, that is after temperature, bans and truncation
        (so 0 at temperature 0).

    Raises:
        TypeError: logits is not a tensor.
        ValueError: an argument is out of range, or, for CPU tensors, a row cannot be sampled because
            it has a NaN or +inf or nothing is left of it. On other devices, where looking would wait
            for the device, such a row gets token -1 and log-probability NaN.
        RuntimeError: ``impl="fused"`` and there is no kernel for this call.
    """
    checks.reject_vmap("sample_tokens")
    checks.check_tensor("logits", logits, ["rows", "vocab"], checks.FLOAT_DTYPES)
    if logits.shape[1] == 0:
        raise ValueError("logits has no columns; expected a vocabulary of at least one token")
    options = temperature, top_k, top_p, min_p, banned, seed, offset
    sampling = checked_sampling(options, logits.shape[1], logits.device)
    reason = native_unsupported_reason(logits)
    chosen = choose_impl("sample_tokens", impl, reason, logits=logits, banned=sampling.banned)
    return operator(logits.detach(), *sampling, chosen == "fused")
