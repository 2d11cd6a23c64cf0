"""Sampling from hidden states: the vocabulary product in chunks of rows that are never kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quietstar_ext import checks
from quietstar_ext.aligned_products import ROW_ALIGNMENT, vocabulary_product
from quietstar_ext.dispatch import choose_impl
from quietstar_ext.native import native_unsupported_reason, takes_cuda_path
from quietstar_ext.operators import register
from quietstar_ext.precision import autocast_inputs, without_autocast
from quietstar_ext.sample_tokens import reference as sampling_reference
from quietstar_ext.sample_tokens.call import (
    Drawn,
    SampleTokens,
    Sampling,
    check_all_sampled,
    check_sampled,
    checked_sampling,
    no_tokens,
)
from quietstar_ext.sample_tokens.fused import draw, workspace_for

# Logits held at a time. The matrix product prepares the weight again for every chunk: with chunks of
# half the size it was a tenth slower at 2048 x 576 x 32000.
CHUNK_BYTES = 64 * 2**20
# On CUDA the product reads the weight again for every chunk. On an H200, at 2048 x 4096 onto 128,256,
# chunks of 128, 256, 512, 1024 and 2048 rows took 1.54, 1.09, 1, 0.92 and 0.87 of the time.
CUDA_CHUNK_BYTES = 512 * 2**20


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
    results. The fused implementation holds at most 64 MiB of logits, on CUDA 512 MiB (a single row may
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
    checks.reject_vmap("linear_sample")
    checks.check_tensor("hidden", hidden, ["rows", "d"], checks.FLOAT_DTYPES)
    checks.check_tensor("weight", weight, ["vocab", hidden.shape[1]], None, hidden.device)
    hidden, weight = autocast_inputs(hidden, weight)
    checks.check_tensor("weight", weight, ["vocab", "d"], [hidden.dtype])
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows; expected a vocabulary of at least one token")
    options = temperature, top_k, top_p, min_p, banned, seed, offset
    sampling = checked_sampling(options, weight.shape[0], hidden.device)
    scaling = checks.check_scaling(softcap, logit_scale)
    hidden, weight, banned = hidden.detach(), weight.detach(), sampling.banned
    reason = native_unsupported_reason(hidden)
    chosen = choose_impl("linear_sample", impl, reason, hidden=hidden, weight=weight, banned=banned)
    return operator(hidden, weight, *sampling, *scaling, chosen == "fused")


class LinearSample(NamedTuple):
    """Arguments of the public function, checked."""

    hidden: Tensor  # [rows, d]
    weight: Tensor  # [vocab, d]
    sampling: Sampling
    softcap: float | None
    logit_scale: float
    fused: bool  # the kernel, or the reference

    def of_logits(self, logits: Tensor, first_row: int = 0) -> SampleTokens:
        """The call of sample_tokens for the logits [rows, vocab] of the rows from ``first_row`` on."""
        sampling = Sampling(*self.sampling[:6], self.sampling.offset + first_row)
        return SampleTokens(logits, sampling, self.fused)


def reference(call: LinearSample) -> Drawn:
    """All logits at once, in float64; a row that cannot be sampled gets token -1 and NaN."""
    logits = call.hidden.double() @ call.weight.double().T * call.logit_scale
    if call.softcap is not None:
        logits = call.softcap * (logits / call.softcap).tanh()
    return sampling_reference.reference(call.of_logits(logits))


def _run(call: LinearSample) -> Drawn:
    with without_autocast(call.hidden):
        if call.fused:
            return _run_fused(call)
        drawn = reference(call)
    check_all_sampled("hidden", drawn)
    return drawn


def _run_fused(call: LinearSample) -> Drawn:
    hidden, weight, sampling, softcap, logit_scale, _ = call
    rows, vocab = hidden.shape[0], weight.shape[0]
    on_cuda = takes_cuda_path(hidden)
    scaled = not on_cuda and (softcap is not None or logit_scale != 1)
    stride = vocab
    if on_cuda:
        stride += -vocab % ROW_ALIGNMENT
        per_chunk = cuda_rows_per_chunk(rows, stride * hidden.itemsize)
    else:
        # Scale and cap need a copy in float32, unless the product has that dtype already.
        copy = 4 if scaled and hidden.dtype != torch.float32 else 0
        per_chunk = min(max(1, CHUNK_BYTES // (vocab * (hidden.itemsize + copy))), rows)
    product = hidden.new_empty(per_chunk, stride)[:, :vocab]
    workspace = workspace_for(product, per_chunk, vocab, sampling.banned)
    results = no_tokens(hidden)
    for start in range(0, rows, per_chunk or 1):
        stop = min(start + per_chunk, rows)
        drawn = Drawn(results.tokens[start:stop], results.logprobs[start:stop])
        logits = product[: stop - start]
        if on_cuda:
            vocabulary_product(hidden[start:stop], weight, logits)
        else:
            torch.mm(hidden[start:stop], weight.T, out=logits)
        if scaled:  # on CUDA the kernel does it
            logits = logits.float()
            logits.mul_(logit_scale if softcap is None else logit_scale / softcap)
            if softcap is not None:
                logits.tanh_().mul_(softcap)
        bad = draw(call.of_logits(logits, start), drawn, workspace, logit_scale, softcap)
        check_sampled("hidden", bad if bad < 0 else start + bad)
    return results


def cuda_rows_per_chunk(rows: int, bytes_per_row: int) -> int:
    """Rows of logits to hold at a time on CUDA: chunks of whole tiles of the product (128 rows) and
    about the same size, so that none reads the weight for a few rows."""
    max_rows = max(CUDA_CHUNK_BYTES // bytes_per_row, 1)
    if rows <= max_rows:
        return max(1, rows)
    if max_rows < 128:
        return max_rows
    chunks = -(-rows // (max_rows // 128 * 128))
    return -(-rows // (128 * chunks)) * 128


operator = register("linear_sample", _run, lambda call: no_tokens(call.hidden), "default")
