"""Options of sample_tokens and measures of what it draws."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

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


def chi_square_deviation(counts: Tensor, probabilities: Tensor) -> float:
    """Standard deviations of the chi-square statistic from its mean (Wilson and Hilferty 1931)."""
    expected = probabilities * counts.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
