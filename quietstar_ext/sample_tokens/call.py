"""A call of sample_tokens, and the checks of its options."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quietstar_ext import checks


class Sampling(NamedTuple):
    """The options that sampling from logits and from hidden states share."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    banned: Tensor | None  # [n] int64
    seed: Tensor  # [1] int64
    offset: int


class SampleTokens(NamedTuple):
    """Arguments of the public function, checked."""

    logits: Tensor  # [rows, vocab]
    sampling: Sampling
    fused: bool  # the kernel, or the reference


class Drawn(NamedTuple):
    """Results, one per row."""

    tokens: Tensor  # [rows] int64
    logprobs: Tensor  # [rows] float32


def no_tokens(rows: Tensor) -> Drawn:
    """Uninitialised results for a tensor of so many rows."""
    count = rows.shape[0]
    tokens = torch.empty(count, dtype=torch.int64, device=rows.device)
    return Drawn(tokens, torch.empty(count, dtype=torch.float32, device=rows.device))


def checked_sampling(options: tuple[Any, ...], vocab: int, device: torch.device) -> Sampling:
    """``Sampling`` of a public function's options, in its order, which may hold lists and integers.

    Raises ``TypeError`` or ``ValueError`` that names the first that is out of range.
    """
    temperature, top_k, top_p, min_p, banned, seed, offset = options
    for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        checks.check_number(name, value)
    checks.check_whole("top_k", top_k, 0)
    checks.check_whole("offset", offset)
    if not (temperature == 0 or 1e-30 <= temperature <= 1e30):
        raise ValueError(f"temperature is {temperature}; expected 0 or a number from 1e-30 to 1e30")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected a number above 0 and up to 1")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p is {min_p}; expected a number from 0 to 1")
    banned = checks.banned_ids(banned, vocab, device)
    if not isinstance(seed, Tensor):
        checks.check_whole("seed", seed)
        seed = torch.full((1,), seed, dtype=torch.int64, device=device)
    elif seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(
            f"seed is a {checks.dtype_name(seed.dtype)} tensor of {seed.numel()} elements on "
            f"{seed.device}; expected int64, one element, on {device}"
        )
    return Sampling(float(temperature), top_k, float(top_p), float(min_p), banned, seed, offset)


def check_sampled(logits_name: str, row: int) -> None:
    """Raise ``ValueError`` for the first row that cannot be sampled; ``row`` is -1 if there is none."""
    if row >= 0:
        raise ValueError(
            f"{logits_name} row {row} cannot be sampled: it has a NaN or +inf, or no token is left; "
            "expected a finite largest logit outside the banned ids"
        )


def check_all_sampled(logits_name: str, drawn: Drawn) -> None:
    """The same for what the reference drew; not on a device, where looking would wait for it."""
    bad = drawn.tokens < 0
    if bad.device.type == "cpu" and bool(bad.any()):
        check_sampled(logits_name, int(bad.int().argmax()))
