"""linear_sample against the product with softmax and multinomial over full logits.

On a CPU
- 512 x 256 onto 8192: a rollout step of the small model; 512 x 1024 onto 32000: of a larger one.
On a GPU
- 4096 x 4096 onto 32,000 and 2048 x 4096 onto 128,256: rollout steps at the width and vocabularies of
  Mistral 7B and Llama 3; 16 x 4096 onto 128,256: generation, where the product waits for the weight.

On a GPU also the largest of these with other sizes of the chunk of logits that is held.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import DEVICE, ON_GPU, compare, device, finished, needs_gpu, record
from quietstar_ext import linear_sample

pytestmark = pytest.mark.device

SHAPES = (
    [(4096, 4096, 32_000), (2048, 4096, 128_256), (16, 4096, 128_256)]
    if ON_GPU
    else [(512, 256, 8192), (512, 1024, 32_000)]
)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
NAME = str(DTYPE).removeprefix("torch.")
PRODUCT = "its bare product"


def contestants(shape: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    rows, width, vocabulary = shape
    hidden = torch.randn(rows, width, device=DEVICE).to(DTYPE)
    weight = (torch.randn(vocabulary, width, device=DEVICE) / width**0.5).to(DTYPE)
    seed = torch.ones(1, dtype=torch.int64, device=DEVICE)

    def multinomial() -> Tensor:
        return torch.multinomial((hidden @ weight.T).softmax(-1, dtype=torch.float32), 1)

    def ours(**options: Any) -> Callable[[], object]:
        return lambda: linear_sample(hidden, weight, seed=seed, impl="fused", **options)

    found: dict[str, Callable[[], object]] = {
        "linear_sample": ours(),
        PRODUCT: lambda: hidden @ weight.T,
        "product + softmax + multinomial": multinomial,
    }
    if ON_GPU:
        found["linear_sample, soft-cap"] = ours(softcap=30.0)
        found["linear_sample, top_k 50, top_p 0.9"] = ours(top_k=50, top_p=0.9)
    else:
        found["reference"] = lambda: linear_sample(hidden, weight, seed=1, impl="reference")
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_linear_sample(benchmark: Any, shape: tuple[int, int, int]) -> None:
    rows, width, vocabulary = shape
    runs = contestants(shape)
    benchmark.pedantic(finished(runs["linear_sample"]), rounds=3)
    results = compare(runs, rounds=5)
    if ON_GPU:
        for name, row in results.items():
            row["peak_mb"] = device.peak_mb(runs[name])
    title = f"linear_sample, {rows} x {width} onto {vocabulary} {NAME}"
    record("linear_sample", title, results, benchmark, gflop=2e-9 * rows * width * vocabulary)
    print(f"  {1 / results[PRODUCT]['times_ours']:.3f} times its bare product")


@needs_gpu
def bench_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first contestant is the size in use."""
    module = importlib.import_module("quietstar_ext.linear_sample")
    shape = rows, width, vocabulary = SHAPES[1]
    per_row = vocabulary * DTYPE.itemsize
    in_use = module.cuda_rows_per_chunk(rows, per_row)
    ours = contestants(shape)["linear_sample"]

    def with_rows(count: int) -> Callable[[], object]:
        def run() -> object:
            monkeypatch.setattr(module, "CUDA_CHUNK_BYTES", count * per_row)
            return ours()

        return run

    sizes = [in_use, *(size for size in (128, 256, 512, 1024, 2048) if size != in_use)]
    results = compare({f"{size} rows": with_rows(size) for size in sizes}, rounds=5)
    title = f"linear_sample, {rows} x {width} onto {vocabulary} {NAME}, rows per chunk"
    record("linear_sample", title, results, gflop=2e-9 * rows * width * vocabulary)
