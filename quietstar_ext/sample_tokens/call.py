"""A call of sample_tokens, and the checks of its options."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quietstar_ext import checks


class SampleTokens(NamedTuple):
    """Arguments of the public function, checked."""

    logits: torch.Tensor  # [rows, vocab]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    banned: torch.Tensor | None  # [n] int64
    seed: torch.Tensor  # [1] int64
    offset: int
    fused: bool  # the kernel, or the reference


class Drawn(NamedTuple):
    """Results, one per row."""

    tokens: torch.Tensor  # [rows] int64
    logprobs: torch.Tensor  # [rows] float32


def no_tokens(rows: torch.Tensor) -> Drawn:
    """Uninitialised results for a tensor of so many rows."""
    count = rows.shape[0]
    tokens = torch.empty(count, dtype=torch.int64, device=rows.device)
    return Drawn(tokens, torch.empty(count, dtype=torch.float32, device=rows.device))


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


def check_all_sampled(logits_name: str, drawn: Drawn) -> None:
    """The same for what the reference drew; not on a device, where looking would wait for it."""
    bad = drawn.tokens < 0
    if bad.device.type == "cpu" and bool(bad.any()):
        check_sampled(logits_name, int(bad.int().argmax()))
