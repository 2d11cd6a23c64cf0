"""mixing_head against its bare matrix products, and the same head in modules: gather, cat,
nn.Sequential, lerp.

On a CPU
- 3072 rows over 256 positions, width 256: four talk steps, three rationales of a 256-token text.
- 2048 rows over 512 positions, width 1024: four talk steps at 512 positions of a larger model.
On a GPU: four talk steps and two rationales of a 1024-token text, at the widths of Mistral 7B (the
paper's model) and of a 0.5 B model, whose products no longer hide what lies between them.

The bare products are those that the head cannot do without, on matrices that are there already; the
positions' part of the first layer is one, with as many rows as positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import DEVICE, ON_GPU, compare, finished, record
from quietstar_ext import mixing_head

pytestmark = pytest.mark.device

SHAPES = [(1024, 8192, 4096), (1024, 8192, 896)] if ON_GPU else [(256, 3072, 256), (512, 2048, 1024)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRODUCTS = "its bare products"


def contestants(
    shape: tuple[int, int, int], dtype: torch.dtype, backward: bool
) -> dict[str, Callable[[], object]]:
    positions, rows, width = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=DEVICE).to(dtype)

    base = draw(positions, width).requires_grad_(backward)
    thought = draw(rows, width).requires_grad_(backward)
    index = torch.arange(rows, device=DEVICE) % positions
    layers = nn.Sequential(
        *(nn.Linear(2 * width, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, 1, bias=False),
    ).to(DEVICE, dtype)
    layers.requires_grad_(backward)
    parameters = list(layers.parameters())
    grad = draw(rows, width)
    b, z, w1, w2 = (t.detach() for t in (base, thought, parameters[0], parameters[2]))

    def modules() -> Tensor:
        gathered = base[index]
        return torch.lerp(gathered, thought, layers(torch.cat([gathered, thought], 1)))

    def products() -> None:
        w_base, w_thought = w1[:, :width], w1[:, width:]
        from_base, h1 = b @ w_base.T, z @ w_thought.T
        h2 = h1 @ w2.T
        if backward:
            grad_h1 = h2 @ w2
            for rows_of, inputs, weight in ((grad_h1, z, w_thought), (from_base, b, w_base)):
                rows_of @ weight
                rows_of.T @ inputs
            h2.T @ h1

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

    found: dict[str, Callable[[], object]] = {
        "mixing_head": ours("fused"),
        PRODUCTS: products,
        "cat + nn.Sequential + lerp": step(modules),
        "reference": ours("reference"),
    }
    if ON_GPU and dtype == torch.bfloat16:
        found["torch.compile of the modules"] = step(torch.compile(modules))
    return found


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_mixing_head(benchmark: Any, shape: tuple[int, int, int], dtype: str, direction: str) -> None:
    positions, rows, width = shape
    runs = contestants(shape, DTYPES[dtype], direction != "forward")
    benchmark.pedantic(finished(runs["mixing_head"]), rounds=5)
    results = compare(runs, rounds=9)
    title = f"mixing_head, {rows} rows over {positions}, width {width} {dtype}, {direction}"
    products = 2e-9 * width**2 * (2 * rows + positions) * (3 if direction != "forward" else 1)
    record("mixing_head", title, results, benchmark, gflop=products)
    print(f"  {1 / results[PRODUCTS]['times_ours']:.3f} times its bare products")
