"""Means over items with bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Resampled means that are drawn at once: bounds the memory at items * CHUNK indices.
CHUNK = 256


@dataclass(frozen=True)
class Interval:
    """A mean over items and its confidence interval (``low == high == mean`` for a single item)."""

    mean: float
    low: float
    high: float
    items: int

    def to_dict(self) -> dict[str, float]:
        """As plain data."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "items": self.items}


def bootstrap(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean (Efron and Tibshirani 1993, chapter 13): items are redrawn
    with replacement ``resamples`` times and the interval holds ``level`` of the means.

    Raises:
        ValueError: for no values, or a level outside 0 to 1.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or len(data) == 0:
        raise ValueError(f"values has shape {list(data.shape)}; expected at least one item")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number between 0 and 1")
    generator = np.random.default_rng(seed)
    means = [
        data[generator.integers(0, len(data), (min(CHUNK, resamples - first), len(data)))].mean(axis=1)
        for first in range(0, resamples, CHUNK)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(data.mean()), float(low), float(high), len(data))
