"""linear_sample in chunks of rows, and its operator."""

from __future__ import annotations

import torch

from quietstar_ext.linear_sample.call import LinearSample
from quietstar_ext.linear_sample.reference import reference
from quietstar_ext.native import takes_cuda_path
from quietstar_ext.operators import register
from quietstar_ext.precision import without_autocast
from quietstar_ext.sample_tokens.call import Drawn, check_all_sampled, check_sampled, no_tokens
from quietstar_ext.sample_tokens.fused import cuda_workspace_for, draw, draw_on_cuda, workspace_for

# Logits held at a time. The matrix product prepares the weight again for every chunk: with chunks of
# half the size it was a tenth slower at 2048 x 576 x 32000.
CHUNK_BYTES = 64 * 2**20
# On CUDA a chunk of logits that stays in L2 until it is sampled is best, but the product reads the
# weight again for every chunk: below some 500 rows it waits for that instead of the tensor cores (2
# operations per row and element, against 200 to 300 per byte that current devices do).
CUDA_CHUNK_BYTES = 32 * 2**20
CUDA_CHUNK_ROWS = 512
CUDA_MAX_BYTES = 256 * 2**20


def _run(call: LinearSample) -> Drawn:
    with without_autocast(call.hidden):
        if call.fused:
            return _run_fused(call)
        drawn = reference(call)
    check_all_sampled("hidden", drawn)
    return drawn


def _run_fused(call: LinearSample) -> Drawn:
    hidden, weight, softcap, logit_scale = call.hidden, call.weight, call.softcap, call.logit_scale
    rows, vocab = hidden.shape[0], weight.shape[0]
    if call.banned is not None:
        call = call._replace(banned=call.banned.contiguous())
    on_cuda = takes_cuda_path(hidden)
    scaled = not on_cuda and (softcap is not None or logit_scale != 1)
    if on_cuda:
        per_chunk = cuda_rows_per_chunk(rows, vocab * hidden.itemsize)
    else:
        # Scale and cap need a copy in float32, unless the product has that dtype already.
        copy = 4 if scaled and hidden.dtype != torch.float32 else 0
        per_chunk = max(1, CHUNK_BYTES // (vocab * (hidden.itemsize + copy)))
    product = hidden.new_empty(per_chunk if on_cuda else min(per_chunk, rows), vocab)
    if on_cuda:
        workspace = cuda_workspace_for(product, per_chunk, vocab, call.banned)
    else:
        workspace = workspace_for(vocab)
    results = no_tokens(hidden)
    for start in range(0, rows, per_chunk):
        stop = min(start + per_chunk, rows)
        drawn = Drawn(results.tokens[start:stop], results.logprobs[start:stop])
        logits = torch.mm(hidden[start:stop], weight.T, out=product[: stop - start])
        if on_cuda:
            draw_on_cuda(call.of_logits(logits, start), drawn, workspace, logit_scale, softcap)
            continue
        if scaled:
            logits = logits.float()
            logits.mul_(logit_scale if softcap is None else logit_scale / softcap)
            if softcap is not None:
                logits.tanh_().mul_(softcap)
        check_sampled("hidden", draw(call.of_logits(logits, start), drawn, workspace), start)
    return results


def cuda_rows_per_chunk(rows: int, bytes_per_row: int) -> int:
    """Rows of logits to hold at a time on CUDA: chunks of whole tiles of the product (128 rows) and
    about the same size, so that none reads the weight for a few rows."""
    max_rows = max(
        CUDA_CHUNK_BYTES // bytes_per_row,
        min(CUDA_CHUNK_ROWS, CUDA_MAX_BYTES // bytes_per_row),
        1,
    )
    if rows <= max_rows:
        return max(1, rows)
    if max_rows < 128:
        return max_rows
    chunks = -(-rows // (max_rows // 128 * 128))
    return -(-rows // (128 * chunks)) * 128


operator = register(
    "linear_sample",
    LinearSample,
    "(Tensor, Tensor)",
    _run,
    lambda call: no_tokens(call.hidden),
    "default",
)
