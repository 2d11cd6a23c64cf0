"""Sampling from hidden states: the vocabulary product in chunks of rows that are never kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quietstar_ext import checks
from quietstar_ext.dispatch import choose_impl
from quietstar_ext.native import takes_cuda_path, why_not_native
from quietstar_ext.precision import autocast_inputs, without_autocast
from quietstar_ext.reference.linear_sample import linear_sample as _reference
from quietstar_ext.sample_tokens import (
    check_sampled,
    check_sampling,
    cuda_workspace_for,
    sample_tokens_into,
    sample_tokens_into_cuda,
    seed_tensor,
    workspace_for,
)

# Logits held at a time. The matrix product prepares the weight again for every chunk: with chunks of
# half the size it was a tenth slower at 2048 x 576 x 32000.
CHUNK_BYTES = 64 * 2**20
# On CUDA a chunk of logits that stays in L2 until it is sampled is best, but the product reads the
# weight again for every chunk: below some 500 rows it waits for that instead of the tensor cores (2
# operations per row and element, against 200 to 300 per byte that current devices do).
CUDA_CHUNK_BYTES = 32 * 2**20
CUDA_CHUNK_ROWS = 512
CUDA_MOST_BYTES = 256 * 2**20

_SCHEMA = (
    "(Tensor hidden, Tensor weight, float temperature, int top_k, float top_p, float min_p, "
    "Tensor? banned, Tensor seed, int offset, float? softcap, float logit_scale, bool fused) "
    "-> (Tensor, Tensor)"
)


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
    fused = choose_impl("linear_sample", impl, why_not_native(hidden)) == "fused"
    return torch.ops.quietstar.linear_sample(
        hidden.detach(),
        weight.detach(),
        float(temperature),
        top_k,
        float(top_p),
        float(min_p),
        banned,
        seed_tensor(seed, hidden.device),
        offset,
        None if softcap is None else float(softcap),
        float(logit_scale),
        fused,
    )


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    banned: torch.Tensor | None,
    seed: torch.Tensor,
    offset: int,
    softcap: float | None,
    logit_scale: float,
    fused: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    options = (temperature, top_k, top_p, min_p)
    with without_autocast(hidden):
        if fused:
            return _run_fused(hidden, weight, *options, banned, seed, offset, softcap, logit_scale)
        tokens, logprobs = _reference(
            hidden, weight, *options, banned, seed, offset, softcap, logit_scale
        )
    if hidden.device.type == "cpu" and bool((tokens < 0).any()):
        check_sampled("hidden", int((tokens < 0).int().argmax()))
    return tokens, logprobs


def _run_fused(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    banned: torch.Tensor | None,
    seed: torch.Tensor,
    offset: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, vocab = hidden.shape[0], weight.shape[0]
    tokens = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if banned is not None:
        banned = banned.contiguous()
    if takes_cuda_path(hidden):
        per_chunk = cuda_rows_per_chunk(rows, vocab * hidden.itemsize)
        product = hidden.new_empty(per_chunk, vocab)
        workspace = cuda_workspace_for(product, per_chunk, vocab, banned)
        for start in range(0, rows, per_chunk):
            stop = min(start + per_chunk, rows)
            sample_tokens_into_cuda(
                tokens[start:stop],
                logprobs[start:stop],
                torch.mm(hidden[start:stop], weight.T, out=product[: stop - start]),
                temperature,
                top_k,
                top_p,
                min_p,
                banned,
                seed,
                offset + start,
                workspace,
                logit_scale,
                softcap,
            )
        return tokens, logprobs
    scaled = softcap is not None or logit_scale != 1
    # Scale and cap need a copy in float32, unless the product has that dtype already.
    copy = 4 if scaled and hidden.dtype != torch.float32 else 0
    per_chunk = max(1, CHUNK_BYTES // (vocab * (hidden.itemsize + copy)))
    product = hidden.new_empty(min(per_chunk, rows), vocab)
    workspace = workspace_for(vocab)
    key = int(seed)
    for start in range(0, rows, per_chunk):
        stop = min(start + per_chunk, rows)
        logits = torch.mm(hidden[start:stop], weight.T, out=product[: stop - start])
        if scaled:
            logits = logits.float()
            factor = logit_scale if softcap is None else logit_scale / softcap
            logits.mul_(factor)
            if softcap is not None:
                logits.tanh_().mul_(softcap)
        row = sample_tokens_into(
            tokens[start:stop],
            logprobs[start:stop],
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            banned,
            key,
            offset + start,
            workspace,
        )
        check_sampled("hidden", row, start)
    return tokens, logprobs


def cuda_rows_per_chunk(rows: int, bytes_per_row: int) -> int:
    """Rows of logits to hold at a time on CUDA: chunks of whole tiles of the product (128 rows) and
    about the same size, so that none reads the weight for a few rows."""
    most = max(
        CUDA_CHUNK_BYTES // bytes_per_row,
        min(CUDA_CHUNK_ROWS, CUDA_MOST_BYTES // bytes_per_row),
        1,
    )
    if rows <= most:
        return max(1, rows)
    if most < 128:
        return most
    chunks = -(-rows // (most // 128 * 128))
    return -(-rows // (128 * chunks)) * 128


def _fake(hidden: torch.Tensor, *options: object, **named: object) -> tuple[torch.Tensor, torch.Tensor]:
    rows = hidden.shape[0]
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(rows, dtype=torch.float32)


torch.library.define("quietstar::linear_sample", _SCHEMA)
torch.library.impl("quietstar::linear_sample", "default", _run)
torch.library.register_fake("quietstar::linear_sample", _fake)
