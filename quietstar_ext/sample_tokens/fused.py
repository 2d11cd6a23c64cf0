"""The kernels of sample_tokens, and its operator."""

from __future__ import annotations

import torch

from quietstar_ext.native import (
    DTYPE_CODES,
    cuda_device,
    cuda_kernels,
    fields,
    native,
    takes_cuda_path,
)
from quietstar_ext.operators import register
from quietstar_ext.sample_tokens.call import (
    Drawn,
    SampleTokens,
    check_all_sampled,
    check_sampled,
    no_tokens,
)
from quietstar_ext.sample_tokens.reference import reference


def draw(
    call: SampleTokens,
    drawn: Drawn,
    workspace: torch.Tensor,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> int:
    """Run the kernel; returns the first row that cannot be sampled, or -1.

    On CUDA it is launched and not waited for, so the result is -1. Row n draws with the counter
    ``offset + n``, on CUDA from ``softcap(logits[n] * logit_scale)``.

    Args:
        call: all tensors on the device of logits, which has no gaps within a row.
        drawn: written; contiguous.
        workspace: of :func:`workspace_for`.
    """
    logits, (temperature, top_k, top_p, min_p, banned, seed, offset), _ = call
    banned = None if banned is None else banned.contiguous()
    taken = fields(
        *(logits, logits.dtype, *logits.shape, logits.stride(0), temperature, top_k, top_p, min_p),
        *(banned, 0 if banned is None else banned.numel(), seed, offset, *drawn, workspace),
        *(torch.get_num_threads(), logit_scale, softcap),
    )
    if takes_cuda_path(logits):
        cuda_kernels().cuda_sample_tokens(taken, cuda_device(logits))
        return -1
    return native().sample_tokens(taken)


def workspace_for(
    like: torch.Tensor, rows: int, vocab: int, banned: torch.Tensor | None
) -> torch.Tensor:
    """Scratch memory on the device of ``like`` for logits [rows, vocab] of its dtype.

    On the CPU some 8 bytes per token and thread; on CUDA some bytes per 500 or 1000 tokens of a row
    where the rows are few, and a bit per token where many are banned.
    """
    if takes_cuda_path(like):
        count = 0 if banned is None else banned.numel()
        size = cuda_kernels().cuda_sample_tokens_workspace(
            DTYPE_CODES[like.dtype], rows, vocab, count, cuda_device(like)
        )
    else:
        size = native().sample_tokens_workspace(vocab, torch.get_num_threads())
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def _run(call: SampleTokens) -> Drawn:
    logits, sampling, fused = call
    if not fused:
        drawn = reference(call)
        check_all_sampled("logits", drawn)
        return drawn
    rows, vocab = logits.shape
    if logits.stride(1) != 1 and vocab > 1:
        call = call._replace(logits=logits.contiguous())
    drawn = no_tokens(logits)
    check_sampled("logits", draw(call, drawn, workspace_for(logits, rows, vocab, sampling.banned)))
    return drawn


operator = register("sample_tokens", _run, lambda call: no_tokens(call.logits), "default")
