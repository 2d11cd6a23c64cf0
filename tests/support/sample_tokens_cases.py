"""Options of sample_tokens and measures of what it draws."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quietstar_ext import sample_tokens
from quietstar_ext.sample_tokens.call import SampleTokens, Sampling
from quietstar_ext.sample_tokens.reference import reference as reference_of_sample_tokens

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 7.0},
    {"banned": [0, 3, 3]},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 700},
    {"top_p": 0.9},
    {"top_p": 0.2, "temperature": 2.0},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "banned": [1, 2], "temperature": 0.7},
]


def options_id(options: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items()) or "plain"


def fresh_seed() -> int:
    return int(torch.randint(2**62, ()))


def fused(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return sample_tokens(logits, **{"seed": 0, **options}, impl="fused")


def reference(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """In float64 on the CPU. Rows that cannot be sampled are marked, and no error as from the public
    function."""
    values: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "banned": None}
    values |= {name: options[name] for name in values if name in options}
    if values["banned"] is not None:
        values["banned"] = torch.as_tensor(values["banned"]).cpu()
    values |= {"seed": torch.tensor([options.get("seed", 0)]), "offset": options.get("offset", 0)}
    return reference_of_sample_tokens(SampleTokens(logits.cpu(), Sampling(**values), fused=False))


def same_draws(ours, theirs, edges: int = 1, atol: float = 3e-6, rtol: float = 1e-6) -> None:
    """Tokens and log-probabilities are equal but for draws that may fall on an interval's edge."""
    (tokens, logprobs), (wanted, wanted_logprobs) = ([t.cpu() for t in each] for each in (ours, theirs))
    same = tokens == wanted
    assert int((~same).sum()) <= edges
    torch.testing.assert_close(logprobs[same], wanted_logprobs[same], atol=atol, rtol=rtol)


def chi_square_deviation(counts: Tensor, probabilities: Tensor) -> float:
    """Standard deviations of the chi-square statistic from its mean (Wilson and Hilferty 1931)."""
    expected = probabilities * counts.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
