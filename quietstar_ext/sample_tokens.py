"""Sampling one token per row of logits, without noise, sort or softmax in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quietstar_ext import checks
from quietstar_ext.dispatch import choose_impl
from quietstar_ext.native import (
    DTYPE_CODES,
    cuda_device,
    cuda_kernels,
    native,
    takes_cuda_path,
    why_not_native,
)
from quietstar_ext.reference.sample_tokens import sample_tokens as _reference

_SCHEMA = (
    "(Tensor logits, float temperature, int top_k, float top_p, float min_p, Tensor? banned, "
    "Tensor seed, int offset, bool fused) -> (Tensor, Tensor)"
)


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
        TypeError: logits is no tensor.
        ValueError: an argument is out of range, or, for CPU tensors, a row cannot be sampled because
            it has a NaN or +inf or nothing is left of it. On other devices, where looking would wait
            for the device, such a row gets token -1 and log-probability NaN.
        RuntimeError: ``impl="fused"`` and there is no kernel for this call.
    """
    checks.refuse_vmap("sample_tokens")
    checks.check_tensor("logits", logits, ["rows", "vocab"], checks.FLOAT_DTYPES)
    check_sampling(temperature, top_k, top_p, min_p)
    if logits.shape[1] == 0:
        raise ValueError("logits has no columns; expected a vocabulary of at least one token")
    banned = checks.banned_ids(banned, logits.shape[1], logits.device)
    checks.check_whole("offset", offset)
    fused = choose_impl("sample_tokens", impl, why_not_native(logits)) == "fused"
    return torch.ops.quietstar.sample_tokens(
        logits.detach(),
        float(temperature),
        top_k,
        float(top_p),
        float(min_p),
        banned,
        seed_tensor(seed, logits.device),
        offset,
        fused,
    )


def check_sampling(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Require sampling options in range; ``ValueError`` names the first that is not."""
    for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        checks.check_number(name, value)
    checks.check_whole("top_k", top_k)
    if not (temperature == 0 or 1e-30 <= temperature <= 1e30):
        raise ValueError(f"temperature is {temperature}; expected 0 or a number from 1e-30 to 1e30")
    if not top_k >= 0:
        raise ValueError(f"top_k is {top_k}; expected 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a number above 0 and up to 1")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p is {min_p}; expected a number from 0 to 1")


def seed_tensor(seed: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The seed as an int64 tensor of one element on ``device``."""
    if isinstance(seed, torch.Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
            name = str(seed.dtype).removeprefix("torch.")
            raise ValueError(
                f"seed is a {name} tensor of {seed.numel()} elements on {seed.device}; expected "
                f"int64, one element, on {device}"
            )
        return seed
    checks.check_whole("seed", seed)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def check_sampled(logits_name: str, row: int, first_row: int = 0) -> None:
    """Raise ``ValueError`` for the first row that a kernel could not sample, if ``row`` is one."""
    if row >= 0:
        raise ValueError(
            f"{logits_name} row {first_row + row} cannot be sampled: it has a NaN or +inf, or no "
            "token is left; expected a finite largest logit outside the banned ids"
        )


def sample_tokens_into(
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
    logits: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    banned: torch.Tensor | None,
    seed: int,
    offset: int,
    workspace: torch.Tensor,
) -> int:
    """Run the CPU kernel; returns the first row that cannot be sampled, or -1.

    tokens [rows] int64 and logprobs [rows] float32 are written and must be contiguous; workspace is
    what :func:`workspace_for` returned for this vocabulary.
    """
    return native().sample_tokens(
        logits.data_ptr(),
        DTYPE_CODES[logits.dtype],
        logits.shape[0],
        logits.shape[1],
        logits.stride(0),
        temperature,
        top_k,
        top_p,
        min_p,
        0 if banned is None else banned.data_ptr(),
        0 if banned is None else banned.numel(),
        seed,
        offset,
        tokens.data_ptr(),
        logprobs.data_ptr(),
        workspace.data_ptr(),
        torch.get_num_threads(),
    )


def sample_tokens_into_cuda(
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
    logits: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    banned: torch.Tensor | None,
    seed: torch.Tensor,
    offset: int,
    workspace: torch.Tensor,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Launch the CUDA kernel and return without waiting for it.

    All tensors lie on the device of logits; tokens and logprobs as for :func:`sample_tokens_into`,
    workspace from :func:`cuda_workspace_for`. Row n draws from
    ``softcap(logits[n] * logit_scale)`` with the counter ``offset + n``.
    """
    cuda_kernels().cuda_sample_tokens(
        logits.data_ptr(),
        DTYPE_CODES[logits.dtype],
        logits.shape[0],
        logits.shape[1],
        logits.stride(0),
        (temperature, top_p, min_p, logit_scale, 0.0 if softcap is None else softcap),
        top_k,
        0 if banned is None else banned.data_ptr(),
        0 if banned is None else banned.numel(),
        seed.data_ptr(),
        offset,
        tokens.data_ptr(),
        logprobs.data_ptr(),
        workspace.data_ptr(),
        *cuda_device(logits),
    )


def cuda_workspace_for(
    like: torch.Tensor, rows: int, vocab: int, banned: torch.Tensor | None
) -> torch.Tensor:
    """Scratch memory on the device of ``like`` for logits of its dtype: some bytes per 500 or 1000
    tokens of a row where the rows are few, and a bit per token where many are banned."""
    count = 0 if banned is None else banned.numel()
    size = cuda_kernels().cuda_sample_tokens_workspace(
        DTYPE_CODES[like.dtype], rows, vocab, count, *cuda_device(like)
    )
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def workspace_for(vocab: int) -> torch.Tensor:
    """Scratch memory for the CPU kernel, all threads together: some 8 bytes per token and thread."""
    size = native().sample_tokens_workspace(vocab, torch.get_num_threads())
    return torch.empty(size, dtype=torch.uint8)


def _run(
    logits: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    banned: torch.Tensor | None,
    seed: torch.Tensor,
    offset: int,
    fused: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not fused:
        tokens, logprobs = _reference(logits, temperature, top_k, top_p, min_p, banned, seed, offset)
        if logits.device.type == "cpu" and bool((tokens < 0).any()):
            check_sampled("logits", int((tokens < 0).int().argmax()))
        return tokens, logprobs
    rows, vocab = logits.shape
    if logits.stride(1) != 1 and vocab > 1:
        logits = logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if banned is not None:
        banned = banned.contiguous()
    options = (tokens, logprobs, logits, temperature, top_k, top_p, min_p, banned)
    if takes_cuda_path(logits):
        workspace = cuda_workspace_for(logits, rows, vocab, banned)
        sample_tokens_into_cuda(*options, seed, offset, workspace)
    else:
        check_sampled("logits", sample_tokens_into(*options, int(seed), offset, workspace_for(vocab)))
    return tokens, logprobs


def _fake(logits: torch.Tensor, *options: object, **named: object) -> tuple[torch.Tensor, torch.Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)


torch.library.define("quietstar::sample_tokens", _SCHEMA)
torch.library.impl("quietstar::sample_tokens", "default", _run)
torch.library.register_fake("quietstar::sample_tokens", _fake)
