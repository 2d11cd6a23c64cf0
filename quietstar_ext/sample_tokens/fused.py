"""The kernels of sample_tokens, and its operator."""

from __future__ import annotations

from typing import Any

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


def draw(call: SampleTokens, drawn: Drawn, workspace: torch.Tensor) -> int:
    """Run the CPU kernel; returns the first row that cannot be sampled, or -1.

    ``drawn`` is written and must be contiguous; workspace is what :func:`workspace_for` returned for
    this vocabulary.
    """
    return native().sample_tokens(_fields(call, drawn, workspace, torch.get_num_threads()))


def _fields(
    call: SampleTokens,
    drawn: Drawn,
    workspace: torch.Tensor,
    threads: int = 1,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Any, ...]:
    logits, temperature, top_k, top_p, min_p, banned, seed, offset, _ = call
    return fields(
        *(logits, logits.dtype, *logits.shape, logits.stride(0), temperature, top_k, top_p, min_p),
        *(banned, 0 if banned is None else banned.numel(), seed, offset, *drawn, workspace),
        *(threads, logit_scale, softcap),
    )


def draw_on_cuda(
    call: SampleTokens,
    drawn: Drawn,
    workspace: torch.Tensor,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Launch the CUDA kernel and return without waiting for it.

    All tensors lie on the device of logits; ``drawn`` as for :func:`draw`, workspace from
    :func:`cuda_workspace_for`. Row n draws from ``softcap(logits[n] * logit_scale)`` with the counter
    ``offset + n``.
    """
    taken = _fields(call, drawn, workspace, 1, logit_scale, softcap)
    cuda_kernels().cuda_sample_tokens(taken, cuda_device(call.logits))


def cuda_workspace_for(
    like: torch.Tensor, rows: int, vocab: int, banned: torch.Tensor | None
) -> torch.Tensor:
    """Scratch memory on the device of ``like`` for logits of its dtype: some bytes per 500 or 1000
    tokens of a row where the rows are few, and a bit per token where many are banned."""
    count = 0 if banned is None else banned.numel()
    size = cuda_kernels().cuda_sample_tokens_workspace(
        DTYPE_CODES[like.dtype], rows, vocab, count, cuda_device(like)
    )
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def workspace_for(vocab: int) -> torch.Tensor:
    """Scratch memory for the CPU kernel, all threads together: some 8 bytes per token and thread."""
    size = native().sample_tokens_workspace(vocab, torch.get_num_threads())
    return torch.empty(size, dtype=torch.uint8)


def _run(call: SampleTokens) -> Drawn:
    logits, banned = call.logits, call.banned
    if not call.fused:
        drawn = reference(call)
        check_all_sampled("logits", drawn)
        return drawn
    rows, vocab = logits.shape
    if logits.stride(1) != 1 and vocab > 1:
        call = call._replace(logits=logits.contiguous())
    if banned is not None:
        call = call._replace(banned=banned.contiguous())
    drawn = no_tokens(logits)
    if takes_cuda_path(logits):
        draw_on_cuda(call, drawn, cuda_workspace_for(logits, rows, vocab, banned))
    else:
        check_sampled("logits", draw(call, drawn, workspace_for(vocab)))
    return drawn


operator = register(
    "sample_tokens",
    SampleTokens,
    "(Tensor, Tensor)",
    _run,
    lambda call: no_tokens(call.logits),
    "default",
)
