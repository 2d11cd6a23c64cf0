"""linear_sample against the product with softmax and multinomial over full logits.

512 x 256 onto 8192: a rollout step of the small model; 512 x 1024 onto 32000: of a larger one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import compare, show, write
from quietstar_ext import linear_sample

SHAPES = [(512, 256, 8192), (512, 1024, 32_000)]
_tables: dict[str, Any] = {}


def contestants(shape: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    rows, width, vocabulary = shape
    hidden = torch.randn(rows, width)
    weight = torch.randn(vocabulary, width) / width**0.5

    def multinomial() -> Tensor:
        return torch.multinomial((hidden @ weight.T).softmax(-1), 1)

    return {
        "linear_sample": lambda: linear_sample(hidden, weight, seed=1, impl="fused"),
        "its bare product": lambda: hidden @ weight.T,
        "product + softmax + multinomial": multinomial,
        "reference": lambda: linear_sample(hidden, weight, seed=1, impl="reference"),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_linear_sample(benchmark: Any, shape: tuple[int, int, int]) -> None:
    rows, width, vocabulary = shape
    runs = contestants(shape)
    benchmark.pedantic(runs["linear_sample"], rounds=3)
    results = compare(runs, rounds=5)
    benchmark.extra_info.update({key: row["times_ours"] for key, row in results.items()})
    title = f"linear_sample, {rows} x {width} onto {vocabulary} float32"
    show(title, results)
    gigaflop = 2e-9 * rows * width * vocabulary
    print(f"  {gigaflop:.1f} GFLOP, {gigaflop / results['linear_sample']['best_ms'] * 1e3:.0f} GFLOP/s")
    _tables[title] = results
    write("linear_sample", _tables)
