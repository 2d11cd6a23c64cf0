"""mixing_head against the same head in modules: gather, cat, nn.Sequential, lerp.

3072 rows over 256 positions, width 256: four talk steps, three rationales of a 256-token text.
2048 rows over 512 positions, width 1024: four talk steps at 512 positions of a larger model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import compare, show, write
from quietstar_ext import mixing_head

SHAPES = [(256, 3072, 256), (512, 2048, 1024)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_tables: dict[str, Any] = {}


def contestants(
    shape: tuple[int, int, int], dtype: torch.dtype, backward: bool
) -> dict[str, Callable[[], object]]:
    positions, rows, width = shape
    base = torch.randn(positions, width).to(dtype).requires_grad_(backward)
    thought = torch.randn(rows, width).to(dtype).requires_grad_(backward)
    index = torch.arange(rows) % positions
    layers = nn.Sequential(
        *(nn.Linear(2 * width, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, 1, bias=False),
    ).to(dtype)
    layers.requires_grad_(backward)
    parameters = list(layers.parameters())
    grad = torch.randn(rows, width).to(dtype)

    def modules() -> Tensor:
        b = base[index]
        return torch.lerp(b, thought, layers(torch.cat([b, thought], 1)))

    def step(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for tensor in (base, thought, *parameters):
                tensor.grad = None
            mixed = forward()
            if backward:
                mixed.backward(grad)

        return run

    def ours(impl: str) -> Callable[[], None]:
        return step(lambda: mixing_head(base, thought, *parameters, base_index=index, impl=impl)[0])

    return {
        "mixing_head": ours("fused"),
        "cat + nn.Sequential + lerp": step(modules),
        "reference": ours("reference"),
    }


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_mixing_head(benchmark: Any, shape: tuple[int, int, int], dtype: str, direction: str) -> None:
    positions, rows, width = shape
    runs = contestants(shape, DTYPES[dtype], direction != "forward")
    benchmark.pedantic(runs["mixing_head"], rounds=5)
    results = compare(runs, rounds=9)
    benchmark.extra_info.update({key: row["times_ours"] for key, row in results.items()})
    title = f"mixing_head, {rows} rows over {positions}, width {width} {dtype}, {direction}"
    show(title, results)
    products = 2e-9 * width**2 * (2 * rows + positions) * (3 if direction != "forward" else 1)
    best = results["mixing_head"]["best_ms"]
    print(f"  {products:.2f} GFLOP, {products / best * 1e3:.0f} GFLOP/s at best")
    _tables[title] = results
    write("mixing_head", _tables)
